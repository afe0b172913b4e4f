"""The command line of the RL scripts as subprocesses in an empty folder, on real tasks: train, interrupt, resume,
evaluate, record, track, and every kind of bad input."""

import csv
import importlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, environment

RL_SCRIPTS = {"sdac": "SDAC", "sac": "SAC", "td3": "TD3", "qsm": "QSM"}
SMALL = {
    "sdac": "--num-particles 4 --num-reverse-samples 8 --diffusion-steps 4 --hidden-size 32",
    "sac": "--hidden-size 32",
    "td3": "--hidden-size 32",
    "qsm": "--hidden-size 32",
}
SHORT = "--num-envs 5 --total-timesteps 1000 --learning-starts 800 --eval-frequency 500 --eval-episodes 2 --seed 3"

each_script = pytest.mark.parametrize("script", RL_SCRIPTS)


@pytest.fixture
def inside(tmp_path, monkeypatch, capsys):
    """The same as `run` within this process, without the seconds that a start takes: for input that is refused."""

    def inside(script, *arguments):
        module = importlib.import_module(script)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            module.main(getattr(module, RL_SCRIPTS[script]))
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=stop.value.code, stdout=out, stderr=err)

    yield inside
    torch.set_flush_denormal(False)  # as it was before


def short(script, env_id="Hopper-v4"):
    return ["--env-id", env_id, *SHORT.split(), *SMALL[script].split()]


def run_folder(path):
    (folder,) = (path / "runs").iterdir()
    return folder


def steps(folder):
    with open(folder / "evaluations.csv") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def refused(process, *words):
    """One line that names the words, status 2, no traceback."""
    assert process.returncode == 2, process.stdout + process.stderr
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1, process.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished short run of each script, made when first asked for."""
    made = {}

    def finished(script):
        if script not in made:
            path = tmp_path_factory.mktemp(script)
            command = [sys.executable, str(ROOT / f"{script}.py"), *short(script)]
            subprocess.run(command, cwd=path, env=environment(), check=True, capture_output=True, timeout=300)
            made[script] = run_folder(path)
        return made[script]

    return finished


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of that run, to be resumed or damaged."""
    return lambda script: shutil.copytree(finished(script), tmp_path / "runs" / finished(script).name)


@each_script
def test_a_run_leaves_what_it_promises(finished, script):
    folder = finished(script)
    assert folder.name.startswith(f"Hopper-v4__{script}__3__")
    arguments = json.loads((folder / "args.json").read_text())
    assert arguments["env_id"] == "Hopper-v4" and arguments["total_timesteps"] == 1000
    assert steps(folder) == [500, 1000]
    assert list(folder.glob("events.out.tfevents.*"))
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 1000 and checkpoint["updates"] == 40
    left = {path.name.split(".")[0] for path in folder.iterdir()}
    assert left == {"args", "evaluations", "events", "checkpoint"}


@each_script
def test_a_script_copied_alone_into_an_empty_folder_runs(tmp_path, script):
    shutil.copy(ROOT / f"{script}.py", tmp_path)
    command = [sys.executable, f"{script}.py", *short(script, "Pendulum-v1")]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert steps(run_folder(tmp_path)) == [500, 1000]


@each_script
def test_help(run, tmp_path, script):
    process = run(script, "--help")
    assert process.returncode == 0 and "--total-timesteps" in process.stdout and "arXiv" in process.stdout
    assert not list(tmp_path.iterdir())


@each_script
def test_evaluate_prints_the_returns(run, finished, script):
    before = {path.name: path.read_bytes() for path in finished(script).iterdir()}
    process = run(script, "--evaluate", finished(script), "--eval-episodes", 3)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("episode ") == 3 and "mean" in process.stdout
    assert before == {path.name: path.read_bytes() for path in finished(script).iterdir()}


@each_script
def test_resume_goes_on_and_repeats_itself(run, copied, tmp_path, script):
    folder = copied(script)
    shutil.copytree(folder, tmp_path / "twin")
    for where in (folder, tmp_path / "twin"):
        process = run(script, "--resume", where, "--total-timesteps", 1500)
        assert process.returncode == 0, process.stderr
        assert steps(where) == [500, 1000, 1500]
    tables = [[line.rsplit(",", 1)[0] for line in open(w / "evaluations.csv")] for w in (folder, tmp_path / "twin")]
    assert tables[0] == tables[1]


@each_script
def test_a_finished_run_has_nothing_to_resume(run, copied, script):
    folder = copied(script)
    before = steps(folder)
    assert run(script, "--resume", folder).returncode == 0
    assert steps(folder) == before


@each_script
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_write_a_checkpoint_first(run, tmp_path, script, number, status):
    arguments = [*short(script), "--total-timesteps", "1000000", "--eval-frequency", "500", "--device", "cpu"]
    command = [sys.executable, str(ROOT / f"{script}.py"), *arguments]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.time() + 200
    while not (tmp_path / "runs").exists() or not steps_so_far(tmp_path):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, out + err
    assert "--resume" in out and "Traceback" not in err
    folder = run_folder(tmp_path)
    before, saved = steps(folder), torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    further = run(script, "--resume", folder, "--total-timesteps", saved + 500)
    assert further.returncode == 0, further.stderr
    after = steps(folder)
    assert after[: len(before)] == before and len(after) > len(before) and len(set(after)) == len(after)


def steps_so_far(path):
    files = list(path.glob("runs/*/evaluations.csv"))
    return files and len(files[0].read_text().splitlines()) > 1


# Bad input


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--env-id Huamnoid-v4", ["Huamnoid-v4", "Humanoid-v4"]),
        ("--env-id Humanoid-v9", ["Humanoid-v9", "Humanoid-v"]),
        ("--env-id no_such_module:Task-v0", ["no_such_module"]),
        ("--env-id CartPole-v1", ["Discrete(2)", "continuous"]),
        ("--env-id scripted:Unbounded-v0", ["Unbounded-v0", "bounds"]),
        ("--env-id Pusher-v4", ["Pusher-v4", "use Pusher-v5"]),
        ("--env-id Hopper-v3", ["Hopper-v3", "use Hopper-v5"]),
        ("--gamma 1.5", ["--gamma", "1.5", "[0, 1]"]),
        ("--gamma nan", ["--gamma", "nan"]),
        ("--gamma abc", ["--gamma", "abc"]),
        ("--gama 0.9", ["--gama", "--gamma"]),
        ("--num-envs 0", ["--num-envs", "0"]),
        ("--num-envs 2.5", ["--num-envs", "2.5"]),
        ("--batch-size 300 --buffer-size 200", ["--batch-size 300", "--buffer-size 200"]),
        ("--num-envs 300 --buffer-size 260", ["--num-envs 300", "--buffer-size 260"]),
        ("--total-timesteps 0", ["--total-timesteps"]),
        ("--learning-starts -1", ["--learning-starts"]),
        ("--seed -1", ["--seed"]),
        ("--exp-name a/b", ["--exp-name"]),
        ("--device tpu", ["--device", "tpu"]),
        ("--resume nowhere", ["nowhere"]),
        ("--evaluate nowhere", ["nowhere"]),
        ("--resume a --evaluate b", ["--resume", "--evaluate"]),
        ("--track --env-id Hopper-v4", ["W&B", "WANDB_MODE=offline"]),
    ],
)
@each_script
def test_bad_input_is_refused_in_one_line(inside, monkeypatch, tmp_path, script, arguments, words):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    refused(inside(script, *arguments.split()), *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", ["--gamma 1.5", "--env-id Huamnoid-v4", "--resume nowhere", "--gama 1"])
@each_script
def test_bad_input_to_a_subprocess(run, tmp_path, script, arguments):
    refused(run(script, *arguments.split()), arguments.split()[-1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", ["--diffusion-steps 1", "--num-particles 0", "--num-reverse-samples 0", "--proposal x"]
)
def test_bad_input_of_sdac(inside, tmp_path, arguments):
    refused(inside("sdac", *arguments.split()), arguments.split()[0])
    assert not (tmp_path / "runs").exists()


@each_script
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_cuda_device(inside, script):
    refused(inside(script, "--device", "cuda"), "--device cuda", "--device cpu")


def half_written(folder):
    (folder / "checkpoint.pt").unlink()


def without_arguments(folder):
    (folder / "args.json").unlink()


def cut_short(folder):
    os.truncate(folder / "checkpoint.pt", (folder / "checkpoint.pt").stat().st_size * 2 // 3)


def a_flipped_bit(folder):
    """In the middle of the largest record; between records lies padding, where a flipped bit changes nothing."""
    with zipfile.ZipFile(folder / "checkpoint.pt") as archive:
        record = max(archive.infolist(), key=lambda record: record.file_size)
    data = bytearray((folder / "checkpoint.pt").read_bytes())
    header = data[record.header_offset :][:30]  # the last four bytes are the lengths of name and padding
    start = record.header_offset + 30 + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    data[start + record.file_size // 2] ^= 4
    (folder / "checkpoint.pt").write_bytes(data)


def other_arguments(folder):
    text = (folder / "args.json").read_text()
    (folder / "args.json").write_text(text.replace('"gamma": 0.99', '"gamma": 0.89'))


def broken_arguments(folder):
    os.truncate(folder / "args.json", 100)


def of_another_script(folder):
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"algorithm": "PPO"}, folder / "checkpoint.pt")


def of_another_version(folder):
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["agent"]["policy.old_name"] = checkpoint["agent"].popitem()[1]
    torch.save(checkpoint, folder / "checkpoint.pt")


def some_other_file(folder):
    torch.save({"weights": torch.zeros(3)}, folder / "checkpoint.pt")


DAMAGES = [
    half_written, without_arguments, cut_short, a_flipped_bit, other_arguments, broken_arguments, of_another_script,
    of_another_version, some_other_file,
]  # fmt: skip


@each_script
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_damaged_run_folders_are_refused_and_left_alone(inside, copied, script, damage, flag):
    folder = copied(script)
    damage(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused(inside(script, flag, folder), folder.name)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@each_script
@pytest.mark.parametrize("contradiction", ["--gamma 0.9", "--env-id Walker2d-v4", "--num-envs 2", "--seed 4"])
def test_contradictions_with_the_resumed_run(inside, finished, script, contradiction):
    flag, value = contradiction.split()
    refused(inside(script, "--resume", finished(script), flag, value), contradiction, "contradicts")


class Payload:
    def __reduce__(self):
        return os.system, ("touch was-here",)


@each_script
def test_a_strangers_payload_does_not_run(inside, copied, tmp_path, script):
    folder = copied(script)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"updates": Payload()}, folder / "checkpoint.pt")
    refused(inside(script, "--resume", folder), "checkpoint.pt")
    (folder / "checkpoint.pt").write_bytes(pickle.dumps(Payload()))
    refused(inside(script, "--evaluate", folder), "checkpoint.pt")
    assert not (tmp_path / "was-here").exists()


# Recording and tracking


def can_render(backend):
    code = "import gymnasium as g; e = g.make('Hopper-v4', render_mode='rgb_array'); e.reset(); e.render()"
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, env=environment(MUJOCO_GL=backend), capture_output=True).returncode == 0


@each_script
def test_capture_video(run, finished, script):
    if not can_render("osmesa"):
        pytest.skip("no OSMesa on this machine")
    arguments = ["--evaluate", finished(script), "--eval-episodes", 2, "--capture-video"]
    process = run(script, *arguments, MUJOCO_GL="osmesa")
    assert process.returncode == 0, process.stderr
    (video,) = (finished(script) / "videos").glob("*.mp4")
    assert video.stat().st_size > 1000
    shutil.rmtree(finished(script) / "videos")


@each_script
def test_capture_video_without_opengl(run, tmp_path, script):
    """GLFW needs a display, and there is none."""
    arguments = [*short(script), "--capture-video"]
    refused(
        run(script, *arguments, MUJOCO_GL="glfw", DISPLAY="", WAYLAND_DISPLAY=""),
        *("--capture-video", "MUJOCO_GL=egl", "MUJOCO_GL=osmesa"),
    )
    assert not (tmp_path / "runs").exists()


@each_script
def test_track_offline(run, tmp_path, script):
    process = run(script, *short(script, "Pendulum-v1"), "--track", WANDB_MODE="offline")
    assert process.returncode == 0, process.stderr
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert steps(run_folder(tmp_path)) == [500, 1000]
