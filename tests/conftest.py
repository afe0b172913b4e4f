import importlib
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
for folder in (ROOT, TESTS):
    sys.path.insert(0, str(folder))

RL_SCRIPTS = {"sdac": "SDAC", "sac": "SAC", "td3": "TD3", "qsm": "QSM"}

# The same small networks everywhere, so that each script is compiled once for all subprocesses.
SMALL = {script: "--hidden-size 32 --batch-size 32" for script in RL_SCRIPTS}
SMALL["sdac"] += " --num-particles 4 --num-reverse-samples 8 --diffusion-steps 2"
SMALL["qsm"] += " --diffusion-steps 2"


def pytest_configure(config):
    torch.set_num_threads(1)  # the tests run beside each other
    config.addinivalue_line("markers", "learning: trains an agent on a small task, minutes")
    config.addinivalue_line("filterwarnings", "ignore::UserWarning:gymnasium")
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning")
    # A shell's background jobs ignore these, and so would their children
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def environment(**extra):
    """Environment variables of a subprocess: scripted.py importable, one thread, a quiet W&B."""
    return os.environ | {"PYTHONPATH": str(TESTS), "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1", **extra}


@pytest.fixture
def run(tmp_path):
    """Run a script of the project in an empty folder, as a user would; returns the finished process."""

    def run(script, *arguments, cwd=tmp_path, timeout=300, **extra):
        command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)]
        return subprocess.run(
            command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=timeout
        )

    return run


@pytest.fixture
def eager_float64():
    """In float64, from the same seed, with nothing compiled."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_default_dtype(torch.float32)


def settings():
    """What `main` changes in its process: signal handlers, flush-to-zero, the compiler's stance, warnings, oneDNN."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    flushed = (torch.full((1,), 1e-39) * 1).item() == 0
    onednn = torch.backends.mkldnn.matmul.fp32_precision
    return handlers, flushed, torch._dynamo.eval_frame._stance.stance, len(warnings.filters), onednn


@pytest.fixture
def inside(tmp_path, monkeypatch, capsys):
    """The same as `run` within this process and not compiled, without the seconds that a start takes. Whatever ends the
    run, the process's settings are afterwards as they were before."""

    def inside(script, *arguments, agent=None, cwd=tmp_path):
        module = importlib.import_module(script)
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--no-compile", *map(str, arguments)])
        status, before = 0, settings()
        try:
            module.main(agent or getattr(module, RL_SCRIPTS[script]))
        except SystemExit as stop:
            status = stop.code
        finally:
            assert settings() == before
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=out, stderr=err)

    return inside


def run_folder(path):
    """The one run folder in the folder `path`."""
    (folder,) = (path / "runs").iterdir()
    return folder


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def evaluations(folder):
    """The rows of evaluations.csv, without its header."""
    lines = (folder / "evaluations.csv").read_text().splitlines()
    assert lines[0] == "step,updates,mean,std,min,max,seconds"
    return [[float(number) for number in line.split(",")] for line in lines[1:]]


def equal(a, b):
    """Whether two nests of dicts, lists and tensors hold the same."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b
