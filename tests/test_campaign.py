"""The campaign: what it runs, skips and resumes, that the results page's tables are those that the files give, and the
trained policies play as their curves say."""

import csv
import dataclasses
import importlib
import json
import re
import sys

import pytest
import tyro
import yaml
from conftest import ROOT, TESTS

import sac
import sdac

sys.path.insert(0, str(TESTS / "benchmarks"))
import campaign  # noqa: E402

PROFILES_WITH_RESULTS = sorted({path.parent.parent.name for path in (TESTS / "results").glob("*/*/*.csv")})
UNFINISHED = {  # stopped after so many steps, some of runs that should have been longer than their profile's
    "gpu/HalfCheetah-v4/sdac-official-1": 240_000,
    "locomotion/Humanoid-v4/sdac-qlr6-1": 820_000,
    "screening/Ant-v4/sdac-power4-bound125-1": 160_000,
    "screening/Ant-v4/sdac-power4-bound2-1": 120_000,
    "screening/Ant-v4/sdac-power4-bound2-noise05-1": 280_000,
    "screening/Ant-v4/sdac-qlr-1": 720_000,
    "screening/HalfCheetah-v4/sdac-explore02-1": 380_000,
    "screening/HalfCheetah-v4/sdac-power2-T10-M8-1": 280_000,
    "screening/HalfCheetah-v4/sdac-power4-bound2-1": 280_000,
    "screening/HalfCheetah-v4/sdac-power4-bound2-noise05-1": 180_000,
    "screening/HalfCheetah-v4/sdac-power4-bound15-1": 300_000,
    "screening/HalfCheetah-v4/sdac-power4-clipped-1": 400_000,
    "screening/HalfCheetah-v4/sdac-target8-hot-1": 260_000,
}


def arguments(script):
    """Flags of a script."""
    module = importlib.import_module(script)
    return {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(module.Args)}


@pytest.mark.parametrize("profile", campaign.PROFILES)
def test_profiles_name_arguments_of_the_scripts(profile):
    for agent in campaign.PROFILES[profile]["agents"]:
        flags = campaign.flags_of(profile, agent)
        names = {flag.replace("--no-", "--") for flag in flags if flag.startswith("--")}
        assert names <= arguments(campaign.script_of(agent)) and "--total-timesteps" in names


def test_the_official_configuration_is_the_docstrings():
    assert f"official defaults are `{campaign.OFFICIAL}`" in " ".join(sdac.__doc__.split())


def test_the_readme_has_the_flags_of_the_curves():
    (flags,) = re.findall(r"^python sac.py --env-id HalfCheetah-v4 (.*)$", (ROOT / "README.md").read_text(), re.M)
    curve = campaign.flags_of("locomotion", "sac")
    assert tyro.cli(sac.Args, args=flags.split()) == tyro.cli(sac.Args, args=curve)


def sweep():
    """The sweep's {parameter: values}, and its program."""
    about = yaml.safe_load((TESTS / "benchmarks" / "sweep.yaml").read_text())
    return {name: values["values"] for name, values in about["parameters"].items()}, about["program"]


def test_the_sweep_runs_the_matrix_of_the_paper_profile():
    parameters, program = sweep()
    assert ROOT / program == TESTS / "benchmarks" / "campaign.py"
    options = {option for action in campaign.parser()._actions for option in action.option_strings}
    assert {f"--{name}" for name in parameters} <= options
    paper = campaign.PROFILES["paper"]
    assert sorted(parameters["tasks"]) == sorted(paper["tasks"])
    assert sorted(parameters["agents"]) == sorted(paper["agents"])
    assert parameters["seeds"] == paper["seeds"]
    one_run = ["paper", *(f"--{name}={values[0]}" for name, values in parameters.items())]
    assert campaign.parser().parse_args(one_run).agents == [parameters["agents"][0]]


def test_a_campaign_runs_skips_and_resumes(tmp_path, monkeypatch):
    flags = "--no-compile --total-timesteps 30 --learning-starts 20 --hidden-size 8 --batch-size 4 --eval-frequency 15"
    flags += " --eval-episodes 1 --checkpoint-frequency 10 --buffer-size 100"
    profile = {"tasks": ["Pendulum-v1"], "seeds": [1], "flags": flags, "agents": {"sac": "--gamma 0.9"}}
    monkeypatch.setitem(campaign.PROFILES, "tiny", profile)
    monkeypatch.setattr(campaign, "RESULTS", tmp_path / "results")
    work = tmp_path / "work"
    runs = "tiny", ["sac"], ["Pendulum-v1"], [1, 2], 2, [], work
    assert campaign.run(*runs) == []
    assert len(list((work / "runs").iterdir())) == 2
    about = json.loads((tmp_path / "results" / "tiny" / "Pendulum-v1" / "sac-2.json").read_text())
    assert about["args"]["gamma"] == 0.9 and about["args"]["seed"] == 2 and about["versions"]["torch"]

    started = []
    start = campaign.subprocess.Popen
    monkeypatch.setattr(
        campaign.subprocess, "Popen", lambda command, **k: (started.append(command), start(command, **k))[1]
    )
    assert campaign.run(*runs) == [] and started == []  # all finished
    longer = ["--total-timesteps", "45"]
    assert campaign.run("tiny", ["sac"], ["Pendulum-v1"], [1], 2, longer, work) == []
    assert len(started) == 1 and "--resume" in started[0]
    assert sorted(campaign.last_step(folder) for folder in (work / "runs").iterdir()) == [30, 45]

    campaign.draw("tiny")
    assert (tmp_path / "results" / "tiny" / "curves.png").stat().st_size > 5000
    rows = (tmp_path / "results" / "tiny" / "table.md").read_text().splitlines()
    first, second = (campaign.load("tiny")["Pendulum-v1"]["sac"][seed][-1]["mean"] for seed in (1, 2))
    (sac,) = [row for row in rows if "sac.py" in row]
    digits = 0 if abs(first + second) >= 200 else 1
    assert f"{(first + second) / 2:.{digits}f} ± {abs(first - second) / 2**0.5:.{digits}f} (2)" in sac


def test_a_failed_run_is_reported(tmp_path, monkeypatch):
    profile = {"tasks": ["NoSuchTask-v0"], "seeds": [1], "flags": "--total-timesteps 30", "agents": {"sac": ""}}
    monkeypatch.setitem(campaign.PROFILES, "tiny", profile)
    monkeypatch.setattr(campaign, "RESULTS", tmp_path / "results")
    assert campaign.run("tiny", ["sac"], ["NoSuchTask-v0"], [1], 1, [], tmp_path / "work") == [
        ("sac", "NoSuchTask-v0", 1)
    ]


@pytest.mark.parametrize("profile", PROFILES_WITH_RESULTS)
def test_the_results_page_has_the_table_that_the_files_give(profile):
    table = campaign.table(profile)
    assert table in (TESTS / "results" / "README.md").read_text()
    assert table == (TESTS / "results" / profile / "table.md").read_text()
    tables_only = profile in ("screening", *campaign.TABLES_OF_UPDATES)
    assert tables_only or (TESTS / "results" / profile / "curves.png").exists()


def test_the_readme_gives_the_returns_of_the_results_page():
    rows = [row.split(" | ") for row in campaign.table("locomotion").splitlines()]
    returns = {(task.removeprefix("| "), script): mean for task, script, mean, *_ in rows}
    readme = (ROOT / "README.md").read_text()
    columns = "`sdac.py`", "`qsm.py`", "`sac.py`", "`td3.py`", "`sac.py` u5", "`td3.py` u5"
    for row in ("", *campaign.PROFILES["locomotion"]["tasks"]):
        cells = [returns.get((row, name), "not run") if row else name for name in columns]
        assert f"| {row} | {' | '.join(cells)} | ".replace("|  |", "| |") in readme


@pytest.mark.parametrize("profile", PROFILES_WITH_RESULTS)
def test_results_were_made_with_the_profiles_flags(profile):
    for path in (TESTS / "results" / profile).glob("*/*.json"):
        args = json.loads(path.read_text())["args"]
        later = {"bfloat16_sampling": False, "beta_power": 1.0, "reverse_bound": 1.0, "denoising_noise": 1.0}
        args = later | {"target_noise": 1.0} | args  # flags that came later
        if "noise_scale" in args:  # from before lambda was the temperature
            args["exploration_noise"] = args["noise_scale"] * args["lambda_start"]
        agent = path.stem.rsplit("-", 1)[0]
        module = importlib.import_module(campaign.script_of(agent))
        expected = vars(tyro.cli(module.Args, args=campaign.flags_of(profile, agent)))
        stopped = UNFINISHED.get(f"{profile}/{path.parent.name}/{path.stem}")
        for name in expected.keys() - {"exp_name", "env_id", "seed", "checkpoint_frequency", "total_timesteps"}:
            assert args[name] == expected[name], (path, name)
        with open(path.with_suffix(".csv")) as file:
            steps = [int(row["step"]) for row in csv.DictReader(file)]
        assert steps[-1] == stopped if stopped else steps[-1] >= expected["total_timesteps"]


@pytest.mark.parametrize("folder", sorted((TESTS / "results" / "policies").iterdir()), ids=lambda folder: folder.name)
def test_a_trained_policy_returns_what_its_curve_ends_with(inside, folder):
    process = inside("sdac", "--evaluate", folder, "--eval-episodes", 2)
    mean = float(re.search(r"^mean (.*?),", process.stdout, re.M)[1])
    args = json.loads((folder / "args.json").read_text())
    task, variant = re.fullmatch("(.*-v4)(.*)", folder.name).groups()
    curve = campaign.read(TESTS / "results" / "locomotion" / task / f"sdac{variant}-{args['seed']}.csv")
    assert mean > 0.8 * curve[-1]["mean"]
