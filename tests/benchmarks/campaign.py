"""The results: tasks x agents x seeds, their tables and pictures.

    python tests/benchmarks/campaign.py locomotion --tasks HalfCheetah-v4 Humanoid-v4 --seeds 1 --workers 2
    python tests/benchmarks/campaign.py quick --workers 2
    python tests/benchmarks/campaign.py locomotion --draw                   # only the table and the picture

Starts the scripts as subprocesses, `--workers` at a time, which share the cores. Finished runs are skipped and
interrupted ones resumed, so the same command goes on after Ctrl-C or a crash. What follows `--` goes to the scripts.
Run folders lie in campaign/PROFILE/runs of the current folder. From them, tests/results/PROFILE/ gets each finished
run's evaluations (TASK/AGENT-SEED.csv), its arguments, versions and machine (.json), curves.png and table.md.
"""

import argparse
import csv
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "results"
COLOURS = {"sdac": "#d1495b", "qsm": "#edae49", "sac": "#00798c", "td3": "#6a4c93"}

# SDAC as the official code runs it, from the docstring of sdac.py
OFFICIAL = (
    "--temperature 1 --target-particles 32 --num-particles 32 --num-reverse-samples 64 --proposal policy"
    " --no-bounded-reverse-sampling --diffusion-steps 20 --beta-power 1 --denoising-noise 1 --tau 0.005"
)
# The protocol of its paper: 194,000 updates follow the random steps.
PROTOCOL = "--num-envs 5 --updates-per-step 1 --total-timesteps 1000000 --learning-starts 30000"

# SDAC's defaults before those of today, and the first ones
LINEAR = "--beta-power 1 --reverse-bound 1 --denoising-noise 1"
T20 = f"{LINEAR} --diffusion-steps 20 --tau 0.005"

# Profiles: flags for all, flags for SDAC, and agents with what differs for one of them. An agent is SCRIPT or
# SCRIPT-VARIANT.
PROFILES = {
    "locomotion": {
        "tasks": ["HalfCheetah-v4", "Humanoid-v4", "Ant-v4", "Walker2d-v4"],
        "seeds": [1, 2, 3],
        "flags": f"{PROTOCOL} --eval-frequency 20000 --eval-episodes 10",
        "agents": {
            "sdac": "",
            "sdac-linear": LINEAR,
            "sdac-T20": T20,
            "sdac-qlr6": "--q-lr 6e-4",
            "qsm": "--q-gradient-scale 5",
            "sac": "",
            "sac-u5": "--updates-per-step 5",  # the baselines with as many updates as steps
            "td3": "",
            "td3-u5": "--updates-per-step 5",
        },
    },
    # To choose SDAC's defaults and QSM's M_q by: 30,000 updates, and one thing changed at a time.
    "pilots": {
        "tasks": ["HalfCheetah-v4", "Humanoid-v4"],
        "seeds": [1],
        "flags": f"{PROTOCOL} --total-timesteps 180000 --eval-frequency 20000 --eval-episodes 10",
        "sdac": T20,
        "agents": {
            "sdac-T20": "",
            "sdac-t01": "--temperature 0.01",
            "sdac-M64": "--num-reverse-samples 64",
            "sdac-M32": "--num-reverse-samples 32",
            "sdac-N4": "--num-particles 4",
            "sdac-target4": "--target-particles 4",
            "sdac-unbounded": "--no-bounded-reverse-sampling",
            "sdac-noise002": "--exploration-noise 0.1",
            "sac": "",
            "qsm-q5": "--q-gradient-scale 5",
            "qsm-q50": "--q-gradient-scale 50",
            "qsm-q120": "--q-gradient-scale 120",
        },
    },
    # To choose better ones by: 100,000 updates, long enough to tell one change from another.
    "screening": {
        "tasks": ["HalfCheetah-v4", "Ant-v4", "Walker2d-v4"],
        "seeds": [1, 2, 3],
        "flags": f"{PROTOCOL} --total-timesteps 530000 --eval-frequency 20000 --eval-episodes 10",
        "sdac": LINEAR,
        "agents": {
            "sdac-T10": "--diffusion-steps 10 --tau 0.005",
            "sdac-T5": "--tau 0.005",
            "sdac-T5-target4": "--tau 0.005 --target-particles 4",
            "sdac-M64": "--num-reverse-samples 64",
            "sdac-lr": "--policy-lr-end 3e-4",
            "sdac-power4": "--beta-power 4",
            "sdac-power4-bound15": "--beta-power 4 --reverse-bound 1.5",
            "sdac-power4-bound125": "--beta-power 4 --reverse-bound 1.25",
            "sdac-power4-bound2": "--beta-power 4 --reverse-bound 2",
            "sdac-power4-bound2-noise05": "--beta-power 4 --reverse-bound 2 --denoising-noise 0.5",
            "sdac-power4-clipped": "--beta-power 4 --no-bounded-reverse-sampling",
            "sdac-target8-hot": "--target-particles 8 --temperature 1",
            "sdac-power2-T10-M8": "--beta-power 2 --reverse-bound 2 --denoising-noise 0 --diffusion-steps 10"
            " --num-reverse-samples 8 --num-particles 8",
            "sdac-cold": "--beta-power 4 --reverse-bound 2 --denoising-noise 0 --temperature 0.01"
            " --exploration-noise 0.15",
            "sdac-calm": "--beta-power 4 --reverse-bound 2 --denoising-noise 0 --target-noise 0",
            "sdac-targetnoise04": "--beta-power 4 --reverse-bound 2 --denoising-noise 0 --target-noise 0.4",
            "sdac-explore02": "--beta-power 4 --reverse-bound 2 --denoising-noise 0 --exploration-noise 0.2",
            "sdac-qlr": "--beta-power 4 --reverse-bound 2 --denoising-noise 0 --q-lr 1e-3",
            "sdac-qlr6": "--beta-power 4 --reverse-bound 2 --denoising-noise 0 --q-lr 6e-4",
            "sdac-qlr6-targetnoise04": "--beta-power 4 --reverse-bound 2 --denoising-noise 0 --q-lr 6e-4"
            " --target-noise 0.4",
            # A changed sdac.py made these runs, see the page: lambda in units of the standard deviation of Q
            "sdac-std": "--beta-power 4 --reverse-bound 2 --denoising-noise 0 --temperature 0.5",
        },
    },
    # What limits a run's end: seed 1 of sdac-T5 above, continued with late.py (not by this script) with one change.
    "late": {
        "tasks": ["HalfCheetah-v4"],
        "seeds": [1],
        "flags": f"{PROTOCOL} --total-timesteps 630000 --eval-frequency 20000 --eval-episodes 10",
        "sdac": f"{LINEAR} --tau 0.005",
        "agents": {
            "sdac-T5": "",
            "sdac-policy": "--proposal policy",
            "sdac-tau001": "--tau 0.01",
            "sdac-warm1": "--temperature 0.25",
            "sdac-target4": "--target-particles 4",
            "sdac-target4-noise01": "--target-particles 4 --exploration-noise 0.1 --lambda-lr 0",
            "sdac-warm2": "--temperature 0.25 --target-particles 2",
            "sdac-warm4": "--temperature 0.25 --target-particles 4",
            "sdac-warm8": "--temperature 0.25 --target-particles 8",
            "sdac-hot8": "--temperature 1 --target-particles 8",
        },
    },
    # SDAC with the official code's flags on a GPU, which was there for 45,340 updates.
    "gpu": {
        "tasks": ["HalfCheetah-v4"],
        "seeds": [1],
        "flags": f"{PROTOCOL} --eval-frequency 20000 --eval-episodes 10 --device cuda --bfloat16-sampling",
        "agents": {"sdac-official": f"{LINEAR} {OFFICIAL}"},
    },
    # What denoising in bfloat16 does to learning.
    "bfloat16": {
        "tasks": ["HalfCheetah-v4"],
        "seeds": [1, 2],
        "flags": f"{PROTOCOL} --total-timesteps 180000 --eval-frequency 20000 --eval-episodes 10",
        "sdac": LINEAR,
        "agents": {"sdac-linear": "", "sdac-bfloat16": "--bfloat16-sampling"},
    },
    # Every script's defaults at the step counts of SDAC's paper, on its ten tasks: for GPUs.
    "paper": {
        "tasks": [
            "Humanoid-v4", "Ant-v4", "HalfCheetah-v4", "Hopper-v4", "Walker2d-v4",
            "InvertedPendulum-v4", "InvertedDoublePendulum-v4", "Reacher-v4", "Swimmer-v4", "Pusher-v5",
        ],
        "seeds": [1, 2, 3, 4, 5],
        "flags": f"{PROTOCOL} --eval-frequency 10000 --eval-episodes 20",
        "agents": {"sdac": "", "qsm": "", "sac": "", "td3": ""},
    },
    # What is left of the paper's ten tasks, with the defaults: two with long runs, and the small ones.
    "rest": {
        "tasks": ["Hopper-v4", "Swimmer-v4"],
        "seeds": [1],
        "flags": f"{PROTOCOL} --eval-frequency 20000 --eval-episodes 10",
        "agents": {
            "sdac": "",
            "sdac-calm": "--target-noise 0",
            "sdac-targetnoise04": "--target-noise 0.4",
            "sdac-qlr6": "--q-lr 6e-4",
            "sac": "",
        },
    },
    "small": {
        "tasks": ["InvertedPendulum-v4", "InvertedDoublePendulum-v4", "Reacher-v4", "Pusher-v5"],
        "seeds": [1],
        "flags": f"{PROTOCOL} --total-timesteps 150000 --eval-frequency 10000 --eval-episodes 10",
        "agents": {"sdac": "", "sac": ""},
    },
    # Minutes on two cores: small networks and larger learning rates.
    "quick": {
        "tasks": ["InvertedPendulum-v4", "InvertedDoublePendulum-v4", "Reacher-v4"],
        "seeds": [1, 2, 3],
        "flags": "--num-envs 1 --total-timesteps 12000 --learning-starts 1000 --hidden-size 64 --batch-size 128"
        " --tau 0.02 --eval-frequency 1000 --eval-episodes 10 --checkpoint-frequency 4000 --device cpu",
        "agents": {
            "sdac": "--q-lr 1e-3 --policy-lr 1e-3",
            "sdac-cold": "--q-lr 1e-3 --policy-lr 1e-3 --temperature 0.01 --exploration-noise 0.15",
            "sdac-calm": "--q-lr 1e-3 --policy-lr 1e-3 --target-noise 0",
            "sdac-targetnoise04": "--q-lr 1e-3 --policy-lr 1e-3 --target-noise 0.4",
            "sdac-explore02": "--q-lr 1e-3 --policy-lr 1e-3 --exploration-noise 0.2",
            "qsm": "--q-gradient-scale 0.5 --q-lr 1e-3 --policy-lr 1e-3",
            "sac": "--q-lr 1e-3 --policy-lr 1e-3",
            "td3": "--learning-rate 1e-3",
        },
    },
}  # fmt: skip

TABLES_OF_UPDATES = ("pilots", "late", "gpu", "bfloat16")  # profiles with an evaluation per column

# Best training return within 1,000,000 steps of *one* environment, so 1,000,000 updates, five seeds, MuJoCo v3, as
# re-measured by the CGPO paper (2026), Table 1: five times as many updates as the profile `locomotion` makes.
PUBLISHED = {
    "HalfCheetah-v4": {"td3": 10389, "sac": 10617, "qsm": 3888, "sdac": 11179},
    "Humanoid-v4": {"td3": 5354, "sac": 5160, "qsm": 4793, "sdac": 4430},
    "Ant-v4": {"td3": 4584, "sac": 5031, "sdac": 1405},
    "Walker2d-v4": {"td3": 3514, "sac": 4888, "qsm": 3613, "sdac": 4251},
}

# The official SDAC code's return, run by others: the larger of CGPO's figures above and of BootFlow's README (v4 tasks;
# Humanoid-v4 with 5,000,000 steps).
OFFICIAL_RETURN = {"HalfCheetah-v4": 11765, "Humanoid-v4": 5359, "Ant-v4": 1405, "Walker2d-v4": 4251}


def flags_of(profile, agent):
    about = PROFILES[profile]
    return f"{about['flags']} {about.get(script_of(agent), '')} {about['agents'][agent]}".split()


def script_of(agent):
    return agent.partition("-")[0]


def value_of(flags, name):
    """The last value of a flag in a list of them."""
    return flags[len(flags) - flags[::-1].index(name)]


def read(path):
    """Rows of an evaluations.csv, as numbers."""
    with open(path) as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def last_step(folder):
    """The step of a run's last evaluation."""
    rows = read(folder / "evaluations.csv") if (folder / "evaluations.csv").exists() else []
    return int(rows[-1]["step"]) if rows else 0


def find(work, profile, agent, task, seed):
    """The newest run folder with these coordinates, or None."""
    return max((work / "runs").glob(f"{task}__{profile}-{agent}__{seed}__*"), default=None)


def start(work, profile, agent, task, seed, extra):
    """The subprocess of a run that is not finished; None if it is."""
    flags = [*flags_of(profile, agent), *extra]
    folder = find(work, profile, agent, task, seed)
    if folder and last_step(folder) >= int(value_of(flags, "--total-timesteps")):
        return None
    command = [sys.executable, str(ROOT / f"{script_of(agent)}.py")]
    if folder and (folder / "checkpoint.pt").exists():
        command += ["--resume", str(folder.relative_to(work)), *extra]
    else:
        command += ["--exp-name", f"{profile}-{agent}", "--env-id", task, "--seed", str(seed), *flags]
    with open(work / f"{task}-{agent}-{seed}.log", "a") as log:
        return subprocess.Popen(command, cwd=work, stdout=log, stderr=log)


def collect(work, profile, agent, task, seed):
    """Copy a finished run's evaluations and arguments to the results, with versions and the machine."""
    folder, target = find(work, profile, agent, task, seed), RESULTS / profile / task
    target.mkdir(parents=True, exist_ok=True)
    (target / f"{agent}-{seed}.csv").write_text((folder / "evaluations.csv").read_text())
    packages = ("torch", "numpy", "gymnasium", "mujoco")
    about = {
        "args": json.loads((folder / "args.json").read_text()),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": machine(),
        "effective_sample_size": effective_sample_size(folder),
    }
    (target / f"{agent}-{seed}.json").write_text(json.dumps(about, indent=1) + "\n")


def effective_sample_size(folder):
    """Of SDAC's reverse samples when the run ended, from its TensorBoard events; None for other scripts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    name = "losses/effective_sample_size"
    return round(events.Scalars(name)[-1].value, 2) if name in events.Tags()["scalars"] else None


def machine():
    """CPU, cores and GPU in words."""
    model = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), model)
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model}, {os.cpu_count()} cores, {os.environ.get('OMP_NUM_THREADS', '1')} thread(s) a run{gpu}"


def run(profile, agents, tasks, seeds, workers, extra, work):
    """Run what is not finished, seed by seed so that an early end leaves whole comparisons."""
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // workers, 1)))
    waiting = [(agent, task, seed) for seed in seeds for agent in agents for task in tasks]
    running, failed = {}, []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                coordinates = waiting.pop(0)
                process = start(work, profile, *coordinates, extra)
                if process is None:
                    collect(work, profile, *coordinates)
                else:
                    running[process] = coordinates
            for process in [process for process in running if process.poll() is not None]:
                coordinates = running.pop(process)
                print(*coordinates, "done" if process.returncode == 0 else f"status {process.returncode}", flush=True)
                if process.returncode:
                    failed.append(coordinates)
                else:
                    collect(work, profile, *coordinates)
            time.sleep(0.5)
    except KeyboardInterrupt:
        for process in running:  # they save a checkpoint first
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()
        raise
    return failed


def load(profile):
    """{task: {agent: {seed: rows}}} of the results, in the profile's order."""
    runs = defaultdict(lambda: defaultdict(dict))
    for task in PROFILES[profile]["tasks"]:
        for agent in PROFILES[profile]["agents"]:
            for path in sorted((RESULTS / profile / task).glob(f"{agent}-[0-9]*.csv")):
                runs[task][agent][int(path.stem.rsplit("-", 1)[1])] = read(path)
    return runs


def mean_and_std(values):
    mean = sum(values) / len(values)
    return mean, (sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)) ** 0.5


def in_words(values):
    """Mean ± standard deviation of a seed, with n - 1, (number of seeds)."""
    mean, std = mean_and_std(values)
    digits = 0 if abs(mean) >= 100 else 1
    return f"{mean:.{digits}f} ± {std:.{digits}f} ({len(values)})" if len(values) > 1 else f"{mean:.{digits}f} (1)"


def table(profile):
    """Markdown: the mean of the last five evaluations, the last and the best of every agent on every task, and what
    others published."""
    if profile == "screening":
        return table_of_scores(profile)
    if profile in TABLES_OF_UPDATES:
        return table_of_updates(profile, since=99_999 if profile == "late" else 1)
    published = profile == "locomotion"
    lines = ["| task | script | last five evaluations | last | best | minutes |" + " published |" * published]
    lines += ["| --- |" + " --- |" * (5 + published)]
    for task, agents in load(profile).items():
        for agent, seeds in agents.items():
            seeds, (script, _, variant) = seeds.values(), agent.partition("-")
            means = [[row["mean"] for row in rows] for rows in seeds]
            minutes = sum(rows[-1]["seconds"] for rows in seeds) / len(seeds) / 60
            steps, flags = min(rows[-1]["step"] for rows in seeds), flags_of(profile, agent)
            unfinished = steps < int(value_of(flags, "--total-timesteps"))
            name = f"`{script}.py` {variant}".strip() + f", first {steps / 1000:.0f}k steps" * unfinished
            cells = [task, name, in_words([sum(m[-5:]) / 5 for m in means])]
            cells += [in_words([m[-1] for m in means]), in_words([max(m) for m in means])]
            cells += [f"{minutes:.0f}" if minutes >= 10 else f"{minutes:.1f}"]
            cells += [str(PUBLISHED[task].get(agent, ""))] if published else []
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table_of_updates(profile, since):
    """Markdown: evaluations of every run after so many updates, from the `since`-th on; with those of a GPU and in
    bfloat16 the whole runs, up to there."""
    lines = []
    whole = {"gpu": ["sdac", "sdac-linear", "sdac-T20"], "bfloat16": ["sdac-linear"]}.get(profile, [])
    for task, agents in load(profile).items():
        longest = max((rows for seeds in agents.values() for rows in seeds.values()), key=len)
        updates = [row["updates"] for row in longest if row["updates"] >= since]
        lines += [
            f"| {task} | {' | '.join(f'{n / 1000:.0f}k' for n in updates)} |",
            "| --- |" + " --- |" * len(updates),
        ]
        for agent in whole:
            agents[agent] = load("locomotion")[task][agent] | agents[agent]
        for agent, seeds in agents.items():
            script, _, variant = agent.partition("-")
            for seed, rows in seeds.items():
                means = {row["updates"]: f"{row['mean']:.0f}" for row in rows}
                name = f"`{script}.py` {variant}".strip() + (f" seed {seed}" if len(seeds) > 1 else "")
                lines.append(f"| {name} | {' | '.join(means.get(n, '') for n in updates)} |")
        lines.append("")
    return "\n".join(lines)


def table_of_scores(profile):
    """Markdown: every run after so many updates, and its score, the mean of the six evaluations from 420,000 to 520,000
    steps (78,000 to 98,000 updates); above them the same of the whole runs."""
    steps = {80_000: "10k", 180_000: "30k", 280_000: "50k", 380_000: "70k", 480_000: "90k"}
    lines = [f"| task | script | seed | {' | '.join(steps.values())} | score | effective sample size |"]
    lines += ["| --- |" + " --- |" * 9]
    for task, agents in load(profile).items():
        runs = [(agent, seed, rows, profile) for agent, seeds in agents.items() for seed, rows in seeds.items()]
        whole, known = load("locomotion")[task], ("sdac-T20", "sdac-linear", "sdac")
        whole = [(agent, *run, "locomotion") for agent in known for run in whole[agent].items()]
        for agent, seed, rows, folder in [*whole, *runs]:
            at = {int(row["step"]): row["mean"] for row in rows}
            last = [at[step] for step in range(420_000, 520_001, 20_000) if step in at]
            score = f"{sum(last) / 6:.0f}" if len(last) == 6 else ""  # the run was stopped before
            about = json.loads((RESULTS / folder / task / f"{agent}-{seed}.json").read_text())
            script, _, variant = agent.partition("-")
            cells = [task, f"`{script}.py` {variant}".strip(), str(seed)]
            cells += [f"{at[step]:.0f}" if step in at else "" for step in steps]
            lines.append(f"| {' | '.join([*cells, score, str(about.get('effective_sample_size', ''))])} |")
    return "\n".join(lines) + "\n"


def running_mean(values):
    """Of each value and those before it, in a window of a tenth of their number."""
    width = max(len(values) // 10, 1)
    return [sum(values[max(i - width, 0) : i]) / min(i, width) for i in range(1, len(values) + 1)]


def draw(profile):
    """The table; and one picture: a column per task, over steps above and over minutes below; evaluations, faint, and
    their running mean with the seeds' standard deviation. Of the variants only those with five times the updates, over
    minutes, and no picture where minutes say nothing."""
    (RESULTS / profile / "table.md").write_text(table(profile))
    if profile in ("screening", *TABLES_OF_UPDATES):
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = load(profile)
    figure, axes = plt.subplots(
        2,
        len(runs),
        figsize=(3.4 * len(runs), 5.2),
        squeeze=False,
        height_ratios=(3, 2),
        sharey="col",
        layout="constrained",
    )
    for (task, agents), (by_steps, by_time) in zip(runs.items(), axes.T):
        for agent, seeds in agents.items():
            script, _, variant = agent.partition("-")
            if variant not in ("", "u5"):
                continue
            common = set.intersection(*({row["step"] for row in rows} for rows in seeds.values()))
            seeds = [[row for row in rows if row["step"] in common] for rows in seeds.values()]
            evaluations = [[row["mean"] for row in rows] for rows in seeds]
            statistics = [mean_and_std(same) for same in zip(*map(running_mean, evaluations))]
            means = [mean for mean, _ in statistics]
            low, high = [mean - std for mean, std in statistics], [mean + std for mean, std in statistics]
            steps = [row["step"] / 1000 for row in seeds[0]]
            seconds = zip(*([row["seconds"] for row in rows] for rows in seeds))
            minutes = [sum(same) / len(same) / 60 for same in seconds]
            label = f"{script.upper()}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
            plots = [(by_time, minutes, f"{script.upper()}, 5 times the updates" if variant else None)]
            plots += [] if variant else [(by_steps, steps, label)]
            for axis, x, label in plots:
                style = {"color": COLOURS.get(script), "linestyle": "--" if variant else "-", "linewidth": 1.5}
                (line,) = axis.plot(x, means, label=label, **style)
                axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
                for values in evaluations:
                    axis.plot(x, values, color=line.get_color(), alpha=0.3, linewidth=0.6)
        if profile == "locomotion":
            for axis, label in ((by_steps, "official SDAC"), (by_time, None)):
                axis.axhline(OFFICIAL_RETURN[task], color="grey", linewidth=0.8, zorder=1, label=label)
            by_time.set(xscale="log", xlim=(1, None))
        by_steps.set(title=task, xlabel="environment steps / 1000")
        by_time.set(xlabel="minutes, training and evaluation")
        for axis in (by_steps, by_time):
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=7.5, handlelength=1, edgecolor="none", borderpad=0.1)
    for row in axes:
        row[0].set(ylabel="evaluation return")
    figure.savefig(RESULTS / profile / "curves.png", dpi=110)
    plt.close(figure)


def parser():
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("profile", choices=PROFILES)
    result.add_argument("--agents", nargs="+", help="default: the profile's")
    result.add_argument("--tasks", nargs="+", help="default: the profile's")
    result.add_argument("--seeds", nargs="+", type=int, help="default: the profile's")
    result.add_argument("--workers", type=int, default=1, help="runs at a time")
    result.add_argument("--draw", action="store_true", help="run nothing")
    return result


def main():
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, extra = parser().parse_args(arguments[:split]), arguments[split + 1 :]
    agents, tasks, seeds = (
        getattr(options, name) or list(PROFILES[options.profile][name]) for name in ("agents", "tasks", "seeds")
    )
    work, failed = Path("campaign").resolve() / options.profile, []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends its runs too, as Ctrl-C does
    if not options.draw:
        failed = run(options.profile, agents, tasks, seeds, options.workers, extra, work)
    draw(options.profile)
    print(table(options.profile))
    sys.exit(f"failed: {failed}" if failed else 0)


if __name__ == "__main__":
    main()
