"""Nothing is lost: runs killed at random moments, full and read-only disks, random arguments, long runs."""

import csv
import dataclasses
import importlib
import json
import math
import multiprocessing
import os
import random
import resource
import subprocess
import time

import hypothesis
import pytest
import torch
from conftest import TESTS, ROOT
from hypothesis import strategies
from test_cli import RL_SCRIPTS, SMALL, refused, run_folder, steps

CPU = torch.device("cpu")


# Killed anywhere


def killable(script, folder, settings):
    """Start or go on with a run, in a process of its own."""
    torch.set_num_threads(1)
    module = importlib.import_module(script)
    agent, args = getattr(module, RL_SCRIPTS[script]), module.Args(**settings)
    whole = (folder / "checkpoint.pt").exists()
    module.train(agent, args, folder, module.load_checkpoint(str(folder), agent.__name__) if whole else None, CPU)


@pytest.fixture
def processes(monkeypatch):
    """Processes that start fast, since a server has imported everything for them."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(TESTS)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_faults", "scripted", "sdac", "sac", "td3", "qsm"])
    return context


def test_a_run_killed_thirty_times_loses_nothing(processes, tmp_path):
    """One run, killed 30 times at random moments and resumed each time; a good part of it is spent writing."""
    import sdac

    settings = dict(
        env_id="scripted:Wide-v0", device="cpu", hidden_size=8, num_particles=2, num_reverse_samples=2, diffusion_steps=2,
        batch_size=8, buffer_size=2000, num_envs=2, learning_starts=100, total_timesteps=10**6, eval_frequency=50,
        eval_episodes=1, checkpoint_frequency=70,
    )  # fmt: skip
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(sdac.Args(**settings))))
    dice, killed_while_writing, last = random.Random(0), 0, -1
    for attempt in range(30):
        started, now = tmp_path / "evaluations.csv", time.time()
        written = started.stat().st_mtime_ns if started.exists() else 0
        process = processes.Process(target=killable, args=("sdac", tmp_path, settings))
        process.start()
        while not started.exists() or started.stat().st_mtime_ns == written:  # until training starts
            assert process.is_alive() and time.time() - now < 60
            time.sleep(0.01)
        time.sleep(dice.uniform(0.0, 1.0))
        if attempt % 2:  # every other time, a moment later while a checkpoint is being written
            while not (tmp_path / "checkpoint.pt.new").exists():
                assert process.is_alive()
                time.sleep(0.0005)
            time.sleep(dice.uniform(0.0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -9
        killed_while_writing += (tmp_path / "checkpoint.pt.new").exists()
        if (tmp_path / "checkpoint.pt").exists():
            checkpoint = sdac.load_checkpoint(str(tmp_path), "SDAC")  # checks every checksum
            assert checkpoint["step"] >= last
            last = checkpoint["step"]
            table = steps(tmp_path)
            assert table[: len(checkpoint["evaluations"])] == [row[0] for row in checkpoint["evaluations"]]
            assert table == list(range(50, 50 * len(table) + 1, 50))  # none doubled, missing or cut short
    assert killed_while_writing >= 5 and last > 500
    end = (last // 50 + 3) * 50
    process = processes.Process(target=killable, args=("sdac", tmp_path, settings | {"total_timesteps": end}))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert steps(tmp_path) == list(range(50, end + 1, 50))
    assert not (tmp_path / "checkpoint.pt.new").exists()


# Disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB that can be mounted anew with other options."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no permission to mount a file system")
        return disk

    yield mount
    subprocess.run(["umount", str(disk)], capture_output=True)


LONG = "--env-id Hopper-v4 --num-envs 5 --total-timesteps 100000 --learning-starts 100000 --eval-frequency 100000"


@pytest.mark.parametrize("script", ["td3"])
def test_a_full_disk_stops_the_run_and_leaves_a_whole_checkpoint(run, small_disk, script):
    disk = small_disk("size=4m")
    process = run(script, *LONG.split(), "--checkpoint-frequency", 2000, *SMALL[script].split(), cwd=disk)
    refused(process, "checkpoint.pt", "No space left", "still whole")
    folder = run_folder(disk)
    module = importlib.import_module(script)
    checkpoint = module.load_checkpoint(str(folder), RL_SCRIPTS[script])
    assert checkpoint["step"] >= 2000 and not (folder / "checkpoint.pt.new").exists()
    assert subprocess.run(["mount", "-o", "remount,size=64m", str(disk)]).returncode == 0
    further = run(script, "--resume", folder, "--total-timesteps", checkpoint["step"] + 500, cwd=disk)
    assert further.returncode == 0, further.stderr


@pytest.mark.parametrize("script", ["td3"])
def test_a_read_only_folder(run, small_disk, script):
    disk = small_disk("size=64m")
    short = [*LONG.split(), *SMALL[script].split(), "--total-timesteps", "500"]
    assert run(script, *short, cwd=disk).returncode == 0
    folder = run_folder(disk)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert subprocess.run(["mount", "-o", "remount,ro", str(disk)]).returncode == 0
    refused(run(script, *short, cwd=disk), "can't make the run folder", "Read-only")
    refused(run(script, "--resume", folder, "--total-timesteps", 1000, cwd=disk), "can't write", "Read-only")
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_toy_on_a_full_or_read_only_disk(run, small_disk):
    short = "--iterations 5 --samples 100 --diffusion-steps 5 --batch-size 8 --num-reverse-samples 4 --hidden-size 8"
    disk = small_disk("size=4k")
    refused(run("toy_rssm", *short.split(), cwd=disk), "can't write", "No space left")
    assert subprocess.run(["mount", "-o", "remount,ro", str(disk)]).returncode == 0
    refused(run("toy_rssm", *short.split(), cwd=disk), "can't write", "Read-only")


# Random arguments


def values(kind):
    numbers = strategies.one_of(
        strategies.integers(-3, 10),
        strategies.integers(),
        strategies.floats(),
        strategies.floats(-1, 2),
        strategies.sampled_from(["", "x", "1e3", "0x10", "--", "None", "1_000", "-0.0", "∞"]),
    )
    words = strategies.one_of(
        strategies.text(max_size=5), strategies.sampled_from(["cpu", "auto", "replay", "policy", "a/b"])
    )
    return words.map(str) if kind == "str" else numbers.map(str)


def argument_lists(module):
    fields = [f for f in dataclasses.fields(module.Args) if f.type != "bool"]
    switches = [f for f in dataclasses.fields(module.Args) if f.type == "bool"]
    pairs = [values(f.type).map(lambda v, f=f: [f"--{f.name.replace('_', '-')}={v}"]) for f in fields]
    flags = [strategies.sampled_from([[f"--{f.name}"], [f"--no-{f.name}"]]) for f in switches]
    odd = strategies.sampled_from([["--nonsense"], ["stray"], ["--gamma"], ["--gamma", "0.9", "--gamma", "2"]])
    return strategies.lists(strategies.one_of(*pairs, *flags, odd), min_size=1, max_size=4).map(lambda x: sum(x, []))


@pytest.mark.parametrize("script", RL_SCRIPTS)
def test_random_arguments_are_accepted_or_refused_in_one_line(script, monkeypatch):
    module, outcomes = importlib.import_module(script), {"accepted": 0, "refused": 0}

    @hypothesis.settings(
        max_examples=300,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(argument_lists(module))
    def check(arguments):
        monkeypatch.setattr("sys.argv", [f"{script}.py", *arguments])
        try:
            args = module.parse_arguments()
            module.check_arguments(args)
        except module.Failure as failure:
            outcomes["refused"] += 1
            assert str(failure) and len(str(failure).splitlines()) == 1
            return
        outcomes["accepted"] += 1
        for name, (low, high) in module.RANGES.items():
            assert low <= getattr(args, name) <= high and math.isfinite(getattr(args, name))

    check()
    assert outcomes["accepted"] >= 10 and outcomes["refused"] >= 100 and sum(outcomes.values()) >= 300, outcomes


def test_random_arguments_to_the_toy(monkeypatch, capsys):
    import toy_rssm

    outcomes = {"accepted": 0, "refused": 0}

    @hypothesis.settings(
        max_examples=300,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(argument_lists(toy_rssm))
    def check(arguments):
        monkeypatch.setattr("sys.argv", ["toy_rssm.py", *arguments])
        try:
            args = toy_rssm.parse_arguments()
        except SystemExit as stop:
            outcomes["refused"] += 1
            assert stop.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
            return
        outcomes["accepted"] += 1
        assert all(low <= getattr(args, name) <= high for name, (low, high) in toy_rssm.RANGES.items())

    check()
    assert outcomes["accepted"] >= 10 and outcomes["refused"] >= 100, outcomes


# Long runs


def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def test_memory_stays_flat_over_fifty_thousand_steps_and_files_are_closed(tmp_path):
    import td3

    memory = {}

    class Watched(td3.TD3):
        def update(self, batch, step):
            if step % 500 == 0:
                memory[step] = resident_mb()
            return super().update(batch, step)

    Watched.__name__ = "TD3"
    args = td3.Args(
        env_id="scripted:Quiet-v0", device="cpu", hidden_size=8, batch_size=16, buffer_size=1000, num_envs=10,
        learning_starts=1000, total_timesteps=55_000, eval_frequency=5000, eval_episodes=2, checkpoint_frequency=5000,
    )  # fmt: skip
    (tmp_path / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    before = set(os.listdir("/proc/self/fd"))
    td3.train(Watched, args, tmp_path, None, CPU)
    assert set(os.listdir("/proc/self/fd")) == before
    with open(tmp_path / "evaluations.csv") as file:
        assert len(list(csv.DictReader(file))) == 11
    settled = [megabytes for step, megabytes in sorted(memory.items()) if step >= 400]
    assert len(settled) >= 10 and max(settled[1:]) - settled[1] < 8, memory
