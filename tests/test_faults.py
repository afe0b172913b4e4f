"""Nothing is lost: signals, closed pipes, environments that raise, full disks, kills at random moments."""

import io
import json
import multiprocessing
import os
import pty
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import scripted
import torch
from conftest import ROOT, SMALL, TESTS, environment, evaluations, load, run_folder

import sac

# Without an end, on a real task; the networks are those of test_cli.py and already compiled
ENDLESS = [
    *SMALL["sac"].split(),
    "--device",
    "cpu",
    "--env-id",
    "Hopper-v4",
    "--num-envs",
    "5",
    "--learning-starts",
    "800",
]
ENDLESS += ["--eval-frequency", "500", "--eval-episodes", "5", "--checkpoint-frequency", "1000000000"]
ENDLESS += ["--total-timesteps", "1000000000"]

# A scripted task with large observations; a good part of such a run is spent on writing checkpoints
WRITING = (
    "--env-id scripted:Wide-v0 --no-compile --device cpu --hidden-size 8 --batch-size 8 --num-envs 2"
    " --learning-starts 100 --eval-frequency 50 --eval-episodes 1 --buffer-size 1000 --checkpoint-frequency 70"
).split()

# Scripted tasks in this process
FLAGS = "--device cpu --hidden-size 8 --batch-size 8 --learning-starts 30 --eval-episodes 1 --num-envs 2".split()


def wait(condition, process=None):
    """Until the condition holds; returns what it returned."""
    deadline = time.time() + 200
    while not (result := condition()):
        assert process is None or process.poll() is None, "the process has ended"
        assert time.time() < deadline
        time.sleep(0.01)
    return result


def evaluated(path, step):
    """Whether the run in `path` has been evaluated at this step."""
    return any(f"\n{step}," in table.read_text() for table in path.glob("runs/*/evaluations.csv"))


@pytest.fixture
def start(tmp_path):
    """Start sac.py as a subprocess; returns the process, which ends with the test."""
    processes = []

    def start(*arguments):
        command = [sys.executable, str(ROOT / "sac.py"), *map(str, arguments)]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=environment(), **streams))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def goes_on(inside, folder, *arguments):
    """The run can be resumed."""
    further = load(folder)["step"] + 10
    process = inside("sac", "--resume", folder, "--total-timesteps", further, *arguments)
    assert process.returncode == 0, process.stderr
    assert load(folder)["step"] == further


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_write_a_checkpoint_first(start, inside, tmp_path, number):
    process = start(*ENDLESS, "--compile" if number == signal.SIGTERM else "--no-compile")
    wait(lambda: evaluated(tmp_path, 1000), process)  # it learns
    process.send_signal(number)
    output = "".join(process.communicate(timeout=100))
    assert process.returncode == 128 + number and "Traceback" not in output, output
    folder = run_folder(tmp_path)
    assert load(folder)["step"] >= 1000 and load(folder)["updates"] >= 40
    goes_on(inside, folder)


def test_ctrl_c_in_a_terminal_during_the_compilation(tmp_path):
    """The terminal sends it to all processes of the group, those that compile included. Nothing has been done yet."""
    variables = environment(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, [sys.executable, str(ROOT / "sac.py"), *ENDLESS], variables)
    os.set_blocking(terminal, False)
    output, pressed, deadline = b"", None, time.time() + 200
    while True:
        if time.time() > deadline:
            os.kill(pid, signal.SIGKILL)
        try:
            output += os.read(terminal, 10_000)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:  # the terminal's other end is closed
            break
        if pressed is None and b"compiling" in output:
            pressed = time.time() + 3
        if pressed and time.time() > pressed:
            os.write(terminal, b"\x03")
            pressed = float("inf")
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130, output.decode()
    assert b"Traceback (most" not in output and b"KeyboardInterrupt" not in output, output.decode()
    assert b"stopping before the next step" in output
    checkpoint = load(run_folder(tmp_path))
    assert checkpoint["step"] == checkpoint["updates"] == 0


def test_further_signals_during_the_save_do_not_disturb_it(start, tmp_path):
    process = start(*WRITING, "--checkpoint-frequency", 10**9)
    wait(lambda: evaluated(tmp_path, 500), process)
    while process.poll() is None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(number)
            time.sleep(0.001)
    process.communicate()
    assert process.returncode != 0 and load(run_folder(tmp_path))["step"] >= 500


def test_a_first_signal_during_the_last_save_does_not_disturb_it(inside, tmp_path, monkeypatch):
    def interrupted(path, content, write=sac.write):
        if path.name == "checkpoint.pt":
            signal.raise_signal(signal.SIGTERM)
        write(path, content)

    monkeypatch.setattr(sac, "write", interrupted)
    assert inside("sac", "--env-id", "Scripted-v0", *FLAGS, "--total-timesteps", 40).returncode == 143
    assert load(run_folder(tmp_path))["step"] == 40


def test_a_signal_where_exceptions_are_lost_ends_the_run_after_a_whole_step(inside, tmp_path, monkeypatch):
    """As in the callbacks of weak references, of which torch.compile has many. The 10 updates lie in 5 steps of 2."""

    class Lost:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def interrupted(*arguments, move_average=sac.move_average, calls=[]):
        calls.append(Lost() if len(calls) == 8 else None)
        calls[-1] = None
        move_average(*arguments)

    monkeypatch.setattr(sac, "move_average", interrupted)
    arguments = ["--env-id", "Scripted-v0", *FLAGS, "--updates-per-step", 2, "--total-timesteps", 400]
    assert inside("sac", *arguments).returncode == 143
    checkpoint = load(run_folder(tmp_path))
    assert (checkpoint["step"], checkpoint["updates"]) == (40, 10) and len(checkpoint["buffer"]["columns"][0]) == 40


def test_a_signal_that_is_ignored_stays_ignored(inside, tmp_path, monkeypatch, request):
    """As nohup wants it."""

    def interrupted(*arguments, evaluate=sac.evaluate):
        signal.raise_signal(signal.SIGHUP)
        return evaluate(*arguments)

    monkeypatch.setattr(sac, "evaluate", interrupted)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    arguments = ["--env-id", "Scripted-v0", *FLAGS, "--eval-frequency", 10, "--total-timesteps", 20]
    assert inside("sac", *arguments).returncode == 0
    assert load(run_folder(tmp_path))["step"] == 20


def test_ctrl_c_ends_an_evaluation_without_a_traceback(start, inside, tmp_path):
    inside("sac", "--env-id", "Scripted-v0", *FLAGS, "--total-timesteps", 10)
    process = start("--evaluate", run_folder(tmp_path), "--env-id", "scripted:Endless-v0")
    assert process.stdout.readline() == "start\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert "mean" not in out and "Traceback" not in err and process.returncode == 130


def test_a_signal_ends_an_evaluation_which_a_resumed_run_makes_up_for(inside, tmp_path):
    """Its episodes have no end."""

    class Interrupted(sac.SAC):
        def act(self, observations, explore):
            if not explore:
                signal.raise_signal(signal.SIGTERM)
            return super().act(observations, explore)

    arguments = ["--env-id", "Endless-v0", *FLAGS, "--eval-frequency", 40, "--total-timesteps", 60]
    assert inside("sac", *arguments, agent=Interrupted).returncode == 143
    folder = run_folder(tmp_path)
    assert load(folder)["step"] == 40 and not (folder / "evaluations.csv").exists()
    assert inside("sac", "--resume", folder, "--env-id", "Scripted-v0").returncode == 0
    assert [row[0] for row in evaluations(folder)] == [40, 60]


def test_ctrl_c_while_an_environment_starts(inside, tmp_path):
    process = inside("sac", "--env-id", "InterruptedReset-v0", *FLAGS, "--total-timesteps", 20)
    assert process.returncode == 130 and load(run_folder(tmp_path))["step"] == 0


# Closed pipes


def test_stdout_closed(tmp_path):
    command = f"{sys.executable} {ROOT / 'sac.py'} {' '.join(WRITING)} --total-timesteps 200 | head -1"
    process = subprocess.run(command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert "run folder" in process.stdout and "Traceback" not in process.stderr
    assert load(run_folder(tmp_path))["step"] == 200


@pytest.mark.parametrize("redirection", ["2>&-", ">&-", ">&- 2>&-"])
def test_a_stream_closed_from_the_start(tmp_path, redirection):
    command = f"{sys.executable} {ROOT / 'sac.py'} {' '.join(WRITING)} --total-timesteps 200 {redirection}"
    process = subprocess.run(command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert load(run_folder(tmp_path))["step"] == 200


def test_a_full_standard_output_leaves_no_run_folder(tmp_path):
    command = f"{sys.executable} {ROOT / 'sac.py'} {' '.join(WRITING)} > /dev/full"
    process = subprocess.run(command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert process.returncode != 0 and not (tmp_path / "runs").exists()


def test_a_pipe_to_a_viewer_that_is_left_after_a_while(inside, monkeypatch, tmp_path):
    class Closed(io.StringIO):
        """A pipe to a viewer that the user leaves after a while."""

        def isatty(self):
            return True

        def write(self, text):
            if evaluated(tmp_path, 500):
                raise BrokenPipeError

    with monkeypatch.context() as patch, pytest.raises(BrokenPipeError):
        patch.setattr("sys.stderr", Closed())
        inside("sac", *ENDLESS)
    sac.tqdm.set_lock(threading.RLock())  # it did not release its own
    assert load(run_folder(tmp_path))["step"] >= 500
    goes_on(inside, run_folder(tmp_path))


# Environments


def test_an_environment_that_raises_keeps_its_traceback_and_the_run_can_go_on(inside, tmp_path):
    with pytest.raises(ValueError, match="the simulator exploded") as raised:
        inside("sac", "--env-id", "Raising-v0", *FLAGS, "--total-timesteps", 300)
    assert str(raised.traceback[-1].path) == scripted.__file__
    checkpoint = load(run_folder(tmp_path))
    assert checkpoint["updates"] == 44 and len(checkpoint["buffer"]["columns"][0]) == 118
    goes_on(inside, run_folder(tmp_path))


def test_an_environment_that_raises_while_it_is_evaluated(inside, monkeypatch, tmp_path):
    """The third instance is the evaluation's."""
    monkeypatch.setattr(scripted.OnlyTwo, "made", 0)
    with pytest.raises(ConnectionError, match="the cable is in use"):
        inside("sac", "--env-id", "OnlyTwo-v0", *FLAGS, "--total-timesteps", 100)
    assert load(run_folder(tmp_path))["step"] == 100


@pytest.mark.parametrize(
    "env_id, error, message",
    [
        ("RaisingReset-v0", ValueError, "no such track"),
        ("NoSeed-v0", TypeError, "seed"),
        ("OnlyTwo-v0", ConnectionError, "the cable is in use"),
    ],
)
def test_an_environment_that_can_not_start_leaves_no_run_folder(inside, monkeypatch, tmp_path, env_id, error, message):
    monkeypatch.setattr(scripted.OnlyTwo, "made", 0)
    with pytest.raises(error, match=message):
        inside("sac", "--env-id", env_id, *FLAGS, "--num-envs", 3)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("env_id, status", [("Scripted-v0", 0), ("HugeReward-v0", 2)])
def test_environments_are_closed(inside, monkeypatch, env_id, status):
    monkeypatch.setattr(scripted.Scripted, "open", 0)
    assert inside("sac", "--env-id", env_id, *FLAGS, "--total-timesteps", 130).returncode == status
    assert scripted.Scripted.open == 0


def test_an_environment_that_changes_the_directory(inside, tmp_path):
    assert inside("sac", "--env-id", "Wandering-v0", *FLAGS, "--total-timesteps", 20).returncode == 0
    assert load(run_folder(tmp_path))["step"] == 20


def test_an_environment_that_knows_no_render_mode(inside):
    assert inside("sac", "--env-id", "NoRenderMode-v0", *FLAGS, "--total-timesteps", 20).returncode == 0


# Guests and strangers


def test_main_outside_the_main_thread(inside, tmp_path):
    thread = threading.Thread(target=inside, args=["sac", "--env-id", "Scripted-v0", *FLAGS, "--total-timesteps", 20])
    thread.start()
    thread.join()
    assert load(run_folder(tmp_path))["step"] == 20


def test_runs_that_start_in_the_same_second_have_their_own_folders(inside, tmp_path):
    for _ in range(3):
        assert inside("sac", "--env-id", "Scripted-v0", *FLAGS, "--total-timesteps", 10).returncode == 0
    assert len(list((tmp_path / "runs").iterdir())) == 3


@pytest.fixture
def trained(inside, tmp_path):
    """The folder of a run of 100 steps."""
    inside("sac", "--env-id", "Scripted-v0", *FLAGS, "--total-timesteps", 100)
    return run_folder(tmp_path)


@pytest.mark.parametrize("name", ["args.json", "evaluations.csv"])
def test_links_in_a_strangers_folder_lead_nothing_astray(inside, trained, tmp_path, name):
    victim = tmp_path / "victim"
    before = (trained / name).read_bytes()
    victim.write_bytes(before)
    (trained / name).unlink()
    (trained / name).symlink_to(victim)
    assert inside("sac", "--resume", trained, "--total-timesteps", 110).returncode == 0
    assert victim.read_bytes() == before and len(evaluations(trained)) == 2


def test_a_strangers_folder_starts_no_logging_and_no_evaluation(inside, monkeypatch, trained):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    arguments = json.loads((trained / "args.json").read_text())
    strange = arguments | {"track": True, "wandb_entity": "somebody", "evaluate": str(trained)}
    (trained / "args.json").write_text(json.dumps(strange))
    assert inside("sac", "--resume", trained, "--total-timesteps", 110).returncode == 0
    assert load(trained)["step"] == 110


@pytest.mark.parametrize("flags", [["--evaluate"], ["--total-timesteps", 110, "--resume"]])
def test_a_strangers_run_folder_imports_no_module_unless_the_command_line_names_it(
    inside, monkeypatch, tmp_path, flags
):
    inside("sac", "--env-id", "Scripted-v0", *FLAGS, "--total-timesteps", 100)
    folder = run_folder(tmp_path)
    arguments = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(arguments | {"env_id": "payload:Scripted-v0"}))
    (tmp_path / "payload.py").write_text("open('was-here', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "payload", raising=False)

    process = inside("sac", *flags, folder)
    assert process.returncode == 2 and "--env-id payload:Scripted-v0" in process.stderr
    assert not (tmp_path / "was-here").exists()

    process = inside("sac", *flags, folder, "--env-id", "payload:Scripted-v0")
    assert process.returncode == 0 and (tmp_path / "was-here").exists()


def test_half_cheetah_runs_without_warnings_from_mujoco(run, tmp_path):
    flags = f"--env-id HalfCheetah-v4 --no-compile --total-timesteps 10 --eval-episodes 2 {SMALL['sac']}"
    process = run("sac", *flags.split())
    assert process.returncode == 0 and "warning" not in (process.stdout + process.stderr).lower()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


# Disks and kills


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no permission to mount a file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], capture_output=True)


def test_a_full_disk_leaves_the_old_checkpoint_whole(run, small_disk):
    """Checkpoints grow by 40 kB a step; while one is written, the old one is still there."""
    process = run("sac", *WRITING, "--checkpoint-frequency", 20, cwd=small_disk)
    assert process.returncode not in (0, 2) and "Traceback" in process.stderr
    folder = run_folder(small_disk)
    saved = load(folder)
    assert saved["step"] >= 40 and not list(folder.glob("*.pt.*"))

    (small_disk / "large").write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize))
    process = run("sac", "--resume", folder, "--env-id", "scripted:Wide-v0", cwd=small_disk)
    assert process.returncode != 0
    assert json.loads((folder / "args.json").read_text())["env_id"] == "scripted:Wide-v0"
    assert load(folder)["step"] == saved["step"]


@pytest.fixture
def children(monkeypatch, tmp_path):
    """Start sac.py as a process forked from one that has imported everything, which is fast; it ends with the test."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(TESTS)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sac", "scripted"])
    processes = []

    def start(*arguments):
        processes.append(context.Process(target=child, args=(tmp_path, *arguments)))
        processes[-1].start()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


def child(cwd, *arguments):
    """What such a process does."""
    import sac

    os.chdir(cwd)
    torch.set_num_threads(1)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["sac.py", "--no-compile", *map(str, arguments)]
    sac.main(sac.SAC)


def tables_written(path):
    """When."""
    return [table.stat().st_mtime_ns for table in path.glob("runs/*/evaluations.csv")]


def test_a_run_killed_ten_times_loses_nothing(children, tmp_path):
    dice, last, arguments = random.Random(0), 0, [*WRITING, "--total-timesteps", 10**6]
    for _ in range(10):
        before = tables_written(tmp_path)
        process = children(*arguments)
        wait(lambda: tables_written(tmp_path) != before)  # training has started
        wait(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
        time.sleep(dice.uniform(0, 1))
        process.kill()
        process.join()
        folder = run_folder(tmp_path)
        checkpoint = load(folder)
        assert checkpoint["step"] >= last
        torch.load(folder / "policy.pt", weights_only=True)
        last = checkpoint["step"]
        arguments = ["--resume", folder, "--env-id", "scripted:Wide-v0"]
    assert last > 100  # it got on; 350 on two cores that were busy with other work
    end = (last // 50 + 3) * 50
    process = children(*arguments, "--total-timesteps", end)
    process.join(100)
    assert process.exitcode == 0
    assert [row[0] for row in evaluations(folder)] == list(range(50, end + 1, 50))


def test_every_checkpoint_of_two_processes_on_one_run_folder_is_whole(children, inside, tmp_path):
    inside("sac", *WRITING, "--env-id", "Wide-v0", "--total-timesteps", 200)
    folder = run_folder(tmp_path)
    more = ["--resume", folder, "--total-timesteps", 800, "--checkpoint-frequency", 20]
    pair = [children(*more) for _ in range(2)]
    seen = set()
    while any(process.is_alive() for process in pair):
        seen.add(load(folder)["step"])
    assert [process.exitcode for process in pair] == [0, 0]
    assert len(seen) > 1 and not list(folder.glob("*.pt.*"))
