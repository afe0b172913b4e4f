"""The files themselves: layout, the shared harness, dependencies."""

import ast
import re
import subprocess
import tomllib

import pytest
from conftest import ROOT

RL_SCRIPTS = ["sdac", "sac", "td3", "qsm"]
SCRIPTS = [*RL_SCRIPTS, "toy_rssm"]


def source(script):
    return (ROOT / f"{script}.py").read_text()


def harness(script):
    text = source(script)
    start, end = (re.findall(rf"^# ==== {word}.*\n", text, re.M) for word in ("HARNESS", "END OF HARNESS"))
    assert len(start) == len(end) == 1
    return text[text.index(start[0]) : text.index(end[0]) + len(end[0])]


def test_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    allowed = {"sdac.py", "sac.py", "td3.py", "qsm.py", "toy_rssm.py", "tests", "requirements.txt", "README.md"}
    assert {name for name in top if not name.startswith(".")} <= allowed


@pytest.mark.parametrize("script", RL_SCRIPTS[1:])
def test_the_harness_is_the_same_text(script):
    assert harness(script) == harness(RL_SCRIPTS[0])


@pytest.mark.parametrize("script", RL_SCRIPTS[1:])
def test_the_common_arguments_are_the_same_text(script):
    """From the environment to the algorithm's own arguments; only defaults may differ."""

    def common(name):
        text = source(name)
        text = text[text.index("    env_id: str") : text.index("    # Algorithm specific arguments")]
        return re.sub(r" = .*", "", text)

    assert common(script) == common(RL_SCRIPTS[0])


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_nothing_from_this_repository(script):
    own = {path.stem for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]} | {"tests"}
    for node in ast.walk(ast.parse(source(script))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
        assert not own & {name.split(".")[0] for name in names}


def pins(lines):
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_inline_metadata_agrees_with_the_requirements(script):
    block = re.search(r"^# /// script\n((?:#.*\n)+?)# ///$", source(script), re.M).group(1)
    metadata = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    assert metadata["requires-python"] == ">=3.11"
    needed, for_tests = (ROOT / "requirements.txt").read_text().split("# What the tests need besides.")
    assert {line.split("==")[0] for line in pins(for_tests.splitlines())} == {"pytest", "hypothesis"}
    needed = pins(needed.splitlines())
    assert all("==" in pin for pin in needed)
    if script in RL_SCRIPTS:
        assert metadata["dependencies"] == needed
    else:
        assert set(metadata["dependencies"]) < set(needed)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_carries_its_licence(script):
    assert source(script).startswith("# SPDX-License-Identifier: MIT\n")
    assert "MIT License" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("script", RL_SCRIPTS)
def test_every_number_among_the_arguments_has_a_range(script):
    module = __import__(script)
    numbers = {f.name for f in module.dataclasses.fields(module.Args) if f.type in ("int", "float")}
    assert numbers == set(module.RANGES)
    defaults = module.Args()
    module.check_arguments(defaults)
