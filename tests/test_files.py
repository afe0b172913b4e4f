"""The files themselves: layout, the shared harness, dependencies, argument types."""

import ast
import dataclasses
import importlib
import math
import re
import subprocess
import sys
import tomllib

import pydantic
import pytest
from conftest import RL_SCRIPTS, ROOT

SCRIPTS = [*RL_SCRIPTS, "toy_rssm"]
each_script = pytest.mark.parametrize("script", SCRIPTS)
each_rl_script = pytest.mark.parametrize("script", RL_SCRIPTS)


def source(script):
    return (ROOT / f"{script}.py").read_text()


def imports(script):
    """Packages that a script imports, without Python's own."""
    names = []
    for node in ast.walk(ast.parse(source(script))):
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


def test_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    allowed = {f"{script}.py" for script in SCRIPTS} | {"tests", "requirements.txt", "README.md"}
    assert {name for name in top if not name.startswith(".")} <= allowed


@each_script
def test_every_script_carries_its_licence(script):
    assert source(script).startswith("# SPDX-License-Identifier: MIT\n")
    assert "MIT License" in (ROOT / "README.md").read_text()


@each_script
def test_scripts_import_nothing_from_this_repository(script):
    own = {path.stem for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]} | {"tests"}
    assert not own & imports(script)


@each_script
def test_nothing_depends_on_docstrings(script):
    """`python -OO` strips them."""
    assert "__doc__" not in source(script)


@each_rl_script
@pytest.mark.parametrize("block", ["TOOLS: .*?^# ALGO LOGIC: the agent", "HARNESS: .*^# ==== END OF HARNESS"])
def test_tools_and_harness_are_the_same_text(script, block):
    def shared(script):
        (text,) = re.findall(rf"^# ==== {block}", source(script), re.M | re.S)
        return text

    assert shared(script) == shared("sdac")


@each_script
def test_nothing_is_used_before_it_stands_there(script):
    """A file is read from the top: whatever a function, a class or a statement names stands above it."""
    body = ast.parse(source(script)).body
    defined = {}
    for node in body:
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
        names += [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        defined |= {name: node.lineno for name in names}
    assert len(defined) > 20
    for node in body:
        for name in (x for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)):
            assert defined.get(name.id, 0) <= node.end_lineno, f"{name.id}, line {name.lineno}"


@each_rl_script
def test_the_common_arguments_are_the_same_text(script):
    """From the environment to the algorithm's own arguments; only defaults may differ."""

    def common(script):
        (text,) = re.findall(r"^    env_id: .*^    # Algorithm specific arguments\n", source(script), re.M | re.S)
        return re.sub(r" = .*", "", text)

    assert common(script) == common("sdac")


# Dependencies


def pins(lines):
    """{package: requirement} of lines such as `gymnasium[mujoco]==1.4.0`."""
    return {re.split(r"[\[=]", line)[0]: line for line in lines if line and not line.startswith("#")}


def requirements():
    needed, for_tests = (ROOT / "requirements.txt").read_text().split("# What the tests need besides.")
    return pins(needed.splitlines()), pins(for_tests.splitlines())


def test_requirements_are_exact_and_the_tests_need_little_besides():
    needed, for_tests = requirements()
    assert all("==" in pin for pin in [*needed.values(), *for_tests.values()])
    assert list(for_tests) == ["pytest", "pytest-xdist"]


# Behind gymnasium, SummaryWriter, --track and --capture-video
EXTRAS = {"mujoco", "tensorboard", "wandb", "moviepy"}


@each_script
def test_inline_metadata_lists_what_the_script_imports_as_the_requirements_do(script):
    (block,) = re.findall(r"^# /// script\n(.*?)^# ///$", source(script), re.M | re.S)
    metadata = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    listed, (needed, _) = pins(metadata["dependencies"]), requirements()
    assert metadata["requires-python"] == ">=3.11"
    assert listed.items() <= needed.items()
    assert set(listed) == imports(script) | (EXTRAS if script in RL_SCRIPTS else set())
    assert script == "toy_rssm" or "matplotlib" not in listed


# Argument types


@each_rl_script
def test_numbers_out_of_range_are_refused_by_their_name(script):
    module = importlib.import_module(script)
    defaults = dataclasses.asdict(module.Args())
    numbers = {name for name, value in defaults.items() if type(value) in (int, float)}
    assert len(numbers) > 12
    for name in numbers:
        if name != "target_entropy_scale":
            with pytest.raises(pydantic.ValidationError, match=name):
                module.Args(**{name: -0.1})
        whole = isinstance(defaults[name], int)
        for value in (-1,) if whole else (math.nan, math.inf, -math.inf):
            with pytest.raises(pydantic.ValidationError, match=name):
                module.Args(**{name: value})
        if whole:
            with pytest.raises(pydantic.ValidationError, match=name):
                module.Args(**{name: 2.5})
    rates = {name for name in numbers if name in ("gamma", "tau") or name.endswith(("_lr", "learning_rate"))}
    assert {"gamma", "tau"} < rates
    for name in rates:
        with pytest.raises(pydantic.ValidationError, match=name):
            module.Args(**{name: 1.1})
