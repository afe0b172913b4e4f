"""The command line of the RL scripts on a real task, compiled: train, resume, evaluate, record, track, and every kind
of bad input."""

import ctypes.util
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import RL_SCRIPTS, ROOT, SMALL, environment, evaluations, load, run_folder

pytestmark = pytest.mark.xdist_group("cli")  # in one process, for `finished`

# As many evaluation episodes as environments: one shape less to compile
SHORT = (
    "--device cpu --num-envs 5 --total-timesteps 1000 --learning-starts 800 --eval-frequency 500 --eval-episodes 5"
    " --seed 3"
)

each_script = pytest.mark.parametrize("script", RL_SCRIPTS)


def short(script):
    return ["--env-id", "Hopper-v4", *SHORT.split(), *SMALL[script].split()]


def refused(process, *words):
    """A message with these words, status 2 and no traceback."""
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    message = " ".join(process.stderr.split())
    for word in words:
        assert word in message, process.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of each script, made when first asked for, by a copy of the script alone in an empty folder."""
    made = {}

    def finished(script):
        if script not in made:
            path = tmp_path_factory.mktemp(script)
            shutil.copy(ROOT / f"{script}.py", path)
            command = [sys.executable, f"{script}.py", *short(script)]
            variables = environment(PYTHONPATH="")
            made[script] = subprocess.run(command, cwd=path, env=variables, capture_output=True, text=True, timeout=300)
            made[script].folder = run_folder(path)
        return made[script]

    return finished


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of that run's folder, to be resumed or damaged."""
    return lambda script: shutil.copytree(finished(script).folder, tmp_path / "copy")


# Running


@each_script
def test_a_run_leaves_what_it_promises(finished, script):
    process, folder = finished(script), finished(script).folder
    assert process.returncode == 0, process.stderr
    assert "torch.compile" not in process.stdout and "Warning" not in process.stderr
    assert folder.name.startswith(f"Hopper-v4__{script}__3__")
    kinds = sorted(path.name.split(".")[0] for path in folder.iterdir())
    assert kinds == ["args", "checkpoint", "evaluations", "events", "policy"]
    arguments = json.loads((folder / "args.json").read_text())
    assert arguments["env_id"] == "Hopper-v4" and arguments["total_timesteps"] == 1000
    assert [row[:2] for row in evaluations(folder)] == [[500, 0], [1000, 40]]
    assert load(folder)["step"] == 1000 and load(folder)["updates"] == 40
    assert "compiling" in process.stderr
    assert "step/s" in process.stderr and "evaluation" in process.stderr and "nan" not in process.stderr  # the bar
    assert {path.name for path in folder.parents[1].iterdir()} == {"runs", f"{script}.py"}


@each_script
def test_help(inside, tmp_path, script):
    process = inside(script, "--help")
    assert process.returncode == 0 and "--total-timesteps" in process.stdout
    assert "parallel environments" in process.stdout  # the comments beside the arguments
    assert not list(tmp_path.iterdir())


@each_script
def test_evaluate_prints_the_returns_and_stops(run, inside, finished, tmp_path, script):
    folder = finished(script).folder
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    process = (run if script == "sdac" else inside)(script, "--evaluate", folder)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("episode ") == 5 and "mean" in process.stdout
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()} and not list(tmp_path.iterdir())


@each_script
def test_resume_goes_on_in_the_same_folder(run, inside, copied, tmp_path, script):
    folder = copied(script)
    process = (run if script == "sdac" else inside)(script, "--resume", folder, "--total-timesteps", 1500)
    assert process.returncode == 0, process.stderr
    assert [row[:2] for row in evaluations(folder)] == [[500, 0], [1000, 40], [1500, 140]]
    assert load(folder)["updates"] == 140 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("steps", [400, 1000])
def test_a_finished_run_has_nothing_to_resume(inside, copied, steps):
    folder = copied("sac")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused(inside("sac", "--resume", folder, "--total-timesteps", steps), "has made 1000 steps", str(steps))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.skipif(not ctypes.util.find_library("OSMesa"), reason="no OSMesa on this machine")
def test_capture_video(run, tmp_path):
    process = run("td3", *short("td3"), "--capture-video", MUJOCO_GL="osmesa")
    assert process.returncode == 0, process.stderr
    folder = run_folder(tmp_path)
    process = run("td3", "--evaluate", folder, "--capture-video", MUJOCO_GL="osmesa")
    assert process.returncode == 0, process.stderr
    videos = sorted((folder / "videos").glob("*.mp4"))
    assert [video.name.split("-episode")[0] for video in videos] == ["evaluate", "step-1000", "step-500"]
    assert all(video.stat().st_size > 1000 for video in videos)


def test_capture_video_without_opengl(run, tmp_path):
    """GLFW needs a display, and there is none."""
    process = run("td3", *short("td3"), "--capture-video", MUJOCO_GL="glfw", DISPLAY="", WAYLAND_DISPLAY="")
    refused(process, "--capture-video", "MUJOCO_GL=egl", "MUJOCO_GL=osmesa")
    assert not (tmp_path / "runs").exists()


def test_track_offline(run, tmp_path):
    process = run("td3", *short("td3"), "--no-compile", "--track", WANDB_MODE="offline")
    assert process.returncode == 0, process.stderr
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(evaluations(run_folder(tmp_path))) == 2


def test_track_without_a_login(run, tmp_path):
    variables = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path / "home")}
    process = run("td3", *short("td3"), "--no-compile", "--track", **variables)
    refused(process, "--track", "WANDB_MODE=offline")
    assert not (tmp_path / "runs").exists()


# torch.compile


def test_without_a_compiler_one_line_says_so(run, tmp_path):
    cache = str(tmp_path / "cache")
    process = run("sac", *short("sac"), CXX="/there/is/no/compiler", TORCHINDUCTOR_CACHE_DIR=cache)
    assert process.returncode == 0, process.stderr
    (line,) = [line for line in process.stdout.splitlines() if "torch.compile" in line]
    assert line.startswith("running without torch.compile") and "torch" not in process.stderr


def test_no_compile_touches_no_private_setting(inside, monkeypatch):
    touched = []
    monkeypatch.setattr(type(torch._dynamo.config), "__setattr__", lambda config, name, value: touched.append(name))
    assert inside("sac", *short("sac")).returncode == 0 and not touched


def test_all_threads_of_a_run_flush_denormal_numbers(tmp_path):
    code = """
import sac, sys, torch
class Probe(sac.SAC):
    def update(self, batch):
        print("left:", (torch.full((1_000_000,), 1e-39) * 1).count_nonzero().item())
        return super().update(batch)
sys.argv[1:] = "--env-id Hopper-v4 --total-timesteps 30 --learning-starts 29 --eval-episodes 1 --no-compile".split()
sac.main(Probe)
"""
    variables = environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="2")
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
    assert "left: 0\n" in process.stdout, process.stdout + process.stderr


# Bad input


SHORTEST = "--total-timesteps 10 --eval-episodes 1 --hidden-size 8".split()  # should it be accepted


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--env-id Huamnoid-v4", ["Huamnoid", "Did you mean: `Humanoid`"]),
        ("--env-id Pusher-v4", ["Pusher-v4", "mujoco<3"]),
        ("--env-id no_such_module:Task-v0", ["no_such_module"]),
        ("--env-id CartPole-v1", ["CartPole-v1", "Discrete(2)", "finite"]),
        ("--env-id scripted:Unbounded-v0", ["Unbounded-v0", "Box(-inf, inf", "finite"]),
        ("--env-id scripted:Pinned-v0", ["Pinned-v0", "low < high"]),
        ("--env-id scripted:Integers-v0", ["Integers-v0", "Box of floats"]),
        ("--gamma 1.5", ["gamma", "1.5"]),
        ("--gamma nan", ["gamma", "nan"]),
        ("--gamma abc", ["--gamma", "abc"]),
        ("--gama 1", ["--gama", "--gamma"]),
        ("--num-envs 0", ["num_envs", "0"]),
        ("--exp-name a/b", ["exp_name", "a/b"]),
        ("--device tpu", ["--device", "tpu"]),
        ("--resume=", ["'' is not a run folder"]),
        ("--evaluate=", ["'' is not a run folder"]),
        ("--resume nowhere", ["'nowhere' is not a run folder"]),
        ("--evaluate nowhere", ["'nowhere' is not a run folder"]),
        ("--env-id Hopper-v4 --buffer-size 1000000000000000", ["allocate", "1000000000000000"]),
    ],
)
def test_bad_input_is_refused(inside, tmp_path, arguments, words):
    refused(inside("sac", *SHORTEST, *arguments.split()), *words)
    assert not (tmp_path / "runs").exists()


def test_bad_input_to_a_subprocess(run, tmp_path):
    refused(run("sdac", "--gamma", 1.5), "gamma")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_cuda_device(inside):
    refused(inside("sac", *SHORTEST, "--device", "cuda"), "--device cuda")


class Payload:
    def __reduce__(self):
        return os.system, ("touch was-here",)


def missing(path):
    path.unlink()


def cut_short(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def some_other_file(path):
    torch.save({"weights": torch.zeros(3)}, path)


def payload_inside(path):
    torch.save(torch.load(path, weights_only=True) | {"more": Payload()}, path)


def payload_alone(path):
    path.write_bytes(pickle.dumps(Payload(), protocol=2))


@pytest.mark.parametrize("damage", [missing, cut_short, some_other_file, payload_inside, payload_alone])
@pytest.mark.parametrize("flag, file", [("--resume", "checkpoint.pt"), ("--evaluate", "policy.pt")])
def test_damaged_checkpoints_are_refused_and_run_no_code(inside, copied, tmp_path, damage, flag, file):
    folder = copied("sac")
    damage(folder / file)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused(inside("sac", flag, folder), str(folder))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_a_folder_with_broken_arguments_or_of_another_script_is_refused(inside, copied, flag):
    folder = copied("sac")
    refused(inside("td3", flag, folder), "is not a run folder of this script", "Unexpected keyword argument")
    cut_short(folder / "args.json")
    refused(inside("sac", flag, folder), "is not a run folder of this script")
