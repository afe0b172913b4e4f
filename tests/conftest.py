import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # most tests are about something else; test_compile.py turns it on

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
for folder in (ROOT, TESTS):
    sys.path.insert(0, str(folder))


def pytest_configure(config):
    config.addinivalue_line("markers", "learning: trains an agent on a small task, minutes")
    config.addinivalue_line("filterwarnings", "ignore::UserWarning:gymnasium")
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning")


def environment(**extra):
    """Environment of a subprocess: the scripted environments importable, nothing sent to W&B, no progress bar."""
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
