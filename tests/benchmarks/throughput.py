"""How fast the scripts are: one Markdown table, every ratio from interleaved measurements of this one run.

    python tests/benchmarks/throughput.py                      # everything
    python tests/benchmarks/throughput.py --scripts sac td3 --tasks Hopper-v4
    python tests/benchmarks/throughput.py --device cuda

Columns: updates per second of the script, of the script with --no-compile and of the paper-literal oracle of
tests/reference.py in float32 (medians), the ratios of the first two to the oracle; steps per second of the whole
training loop and the share of it spent outside `update`; seconds of the first update, with nothing compiled before;
peak memory of a process that updates from a full buffer of 1,000,000 transitions. For SDAC also the arithmetic that an
update needs, and the rate at which it gets done beside the rate of the same matrix products alone; and what
--bfloat16-sampling brings, where the device computes in bfloat16 natively. On AMD's AVX-512 also what oneDNN brings.

Each script updates from random transitions of the task's sizes with its default arguments (sdac-official: those of the
official code), and draws its own noise; the oracle is given noise, and always computes the policy's loss, as the
official code does. Every row has a process of its own. Run nothing else meanwhile.
"""

import argparse
import concurrent.futures
import contextlib
import copy
import importlib
import io
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
import unittest.mock
from pathlib import Path

import torch
import tyro

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
import campaign  # noqa: E402
import pairs  # noqa: E402

AGENTS = {"sdac": "SDAC", "qsm": "QSM", "sac": "SAC", "td3": "TD3"}
ROWS = ["sdac", "sdac-official", "qsm", "sac", "td3"]  # a script, and a name for other flags than its defaults
FLAGS = {"sdac-official": campaign.OFFICIAL.split()}
UPDATES = {"sdac": 20, "sdac-official": 4}  # in a round; of the others, 100
SIZES = {"Hopper-v4": (11, 3), "Humanoid-v4": (376, 17)}  # dimensions of observations and actions


def make(name, task, device, *more):
    """A script's module, its agent, with more flags or without, and a batch."""
    script = campaign.script_of(name)
    module = importlib.import_module(script)
    torch._dynamo.config.trace_autograd_ops = True  # as `main` does
    torch.manual_seed(0)
    args = tyro.cli(module.Args, args=[*FLAGS.get(name, []), *more])
    agent = getattr(module, AGENTS[script])(*SIZES[task], args).to(device)
    batch = pairs.random_batch(module, agent.args.batch_size, *SIZES[task])
    return module, agent, module.Batch(*(column.to(device) for column in batch))


def plainly(function):
    """The function with nothing compiled, as with --no-compile."""

    def plain(*arguments):
        with torch.compiler.set_stance("force_eager"):
            return function(*arguments)

    return plain


def by_mkl(function):
    """The function with its products not by oneDNN, to which `settings` of the scripts sends them on AMD's AVX-512."""

    def with_mkl(*arguments):
        matmul = torch.backends.mkldnn.matmul
        precision, matmul.fp32_precision = matmul.fp32_precision, "none"
        result = function(*arguments)
        matmul.fp32_precision = precision
        return result

    return with_mkl


def oracle_updater(agent, batch):
    """The oracle's update with the random numbers of the agent's first one, in which every network is trained."""
    oracle = pairs.oracle(agent)
    with pairs.recorded() as noise:
        plainly(copy.deepcopy(agent).update)(batch)
    return lambda step: oracle.update(batch, step, noise)


def seconds_per_update(functions, updates, rounds, device):
    """Medians over rounds, in each of which every function runs `updates` consecutive updates, one after the other."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            for step in range(updates[name]):
                function(step)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / updates[name])
    return {name: statistics.median(values[1:]) for name, values in times.items()}  # the first round warms up


def loop(name, task, device, updates, *more):
    """Steps per second of the training loop, and the share of the time outside `update`."""
    script = campaign.script_of(name)
    module = importlib.import_module(script)
    sampled, spent = [], []  # when each update's batch is drawn, and how long the update itself takes

    class Timed(getattr(module, AGENTS[script])):
        def update(self, batch):
            start = time.perf_counter()
            result = super().update(batch)
            spent.append(time.perf_counter() - start)
            return result

    class Buffer(module.ReplayBuffer):
        def sample(self, *arguments):
            sampled.append(time.perf_counter())
            return super().sample(*arguments)

    torch._dynamo.reset()  # forget other agents, of whom it keeps only so many
    envs = module.Args().num_envs
    flags = f"--env-id {task} --device {device.type} --learning-starts 1000 --total-timesteps {1000 + envs * updates}"
    flags += f" --eval-frequency {10**9} --eval-episodes 1"
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        unittest.mock.patch.object(module, "ReplayBuffer", Buffer),
        unittest.mock.patch.object(sys, "argv", [f"{script}.py", *flags.split(), *FLAGS.get(name, []), *more]),
    ):
        module.main(Timed)
    first = updates // 4  # the ones before it compile
    elapsed = sampled[-1] - sampled[first]
    outside = None if device.type == "cuda" else 1 - sum(spent[first:-1]) / elapsed
    return envs * (len(sampled) - 1 - first) / elapsed, outside


def computes_in_bfloat16(device):
    """Whether it does so natively, and not by converting to float32 and back."""
    cpu = Path("/proc/cpuinfo")
    return device.type == "cuda" or (cpu.exists() and "_bf16" in cpu.read_text())


def in_new_process(function, *arguments):
    """Its result. No row inherits the heap and the compiled functions of another one."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def start(name, task, device):
    """Seconds of the first update, and peak memory after 20 updates from a full buffer."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        device = torch.device(device)
        module, agent, batch = make(name, task, device)
        start = time.perf_counter()
        agent.update(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        first = time.perf_counter() - start
        buffer = module.ReplayBuffer(agent.args.buffer_size, *SIZES[task])
        for column in buffer.columns:
            column.fill(0.5)
        buffer.added = buffer.size
        for _ in range(20):
            agent.update(buffer.sample(agent.args.batch_size, device))
        return first, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def sdac_gflop(obs_dim, d, args):
    """Arithmetic of one SDAC update after the exact savings of its docstring, averaged over the policy's delay."""
    b, m, h = args.batch_size, args.num_reverse_samples, args.hidden_size
    policy, critic = 2 * (d * h + 2 * h * h + h * d), 2 * (d * h + 2 * h * h + h)  # per row, without the state's share
    state = 2 * obs_dim * h  # per state

    def sampling(n):
        choosing = 2 * (b * state + b * n * critic) if n > 1 else 0
        return b * state + b * n * args.diffusion_steps * policy + choosing

    critics = 2 * (b * (state + critic) + 3 * b * (state + critic))  # targets, and forward and backward
    proposal = sampling(args.num_particles) if args.proposal == "policy" else 0
    rssm = 2 * (b * state + b * m * critic) + 3 * b * (state + policy)
    return (sampling(args.target_particles) + critics + (proposal + rssm) / args.policy_frequency) / 1e9


def matrix_products(d, h, device):
    """Functions that do nothing but products rows x h x h, and the four products of a denoising step in their
    proportion; and the GFLOP of each of their calls."""
    rows = 1024 if device.type == "cpu" else 8192
    x, narrow, w, w_in, w_out = (torch.randn(s, device=device) for s in ((rows, h), (rows, d), (h, h), (d, h), (h, d)))
    out, out_narrow = torch.empty(rows, h, device=device), torch.empty(rows, d, device=device)

    def square(_):
        torch.mm(x, w, out=out)

    def step(_):
        torch.mm(narrow, w_in, out=out)
        torch.mm(x, w, out=out)
        torch.mm(x, w, out=out)
        torch.mm(x, w_out, out=out_narrow)

    gflop = {"square": 2 * rows * h * h / 1e9, "step": 4 * rows * h * (h + d) / 1e9}
    return {"square": square, "step": step}, gflop


def row(name, task, device, rounds):
    """Cells of the table but for those of `start`, and notes on oneDNN and, for SDAC, on its arithmetic."""
    device = torch.device(device)
    module, fast, batch = make(name, task, device)
    _, plain, _ = make(name, task, device)
    functions = {"fast": lambda _: fast.update(batch), "plain": lambda _: plainly(plain.update)(batch)}
    functions["mkl"] = lambda _: by_mkl(fast.update)(batch)
    updates = dict.fromkeys(functions, UPDATES.get(name, 100))
    if device.type == "cpu":  # the oracle is written for the CPU
        functions["oracle"] = oracle_updater(plain, batch)
        updates["oracle"] = max(UPDATES.get(name, 100) // 5, 2)
    bfloat16 = name in UPDATES and computes_in_bfloat16(device)
    if bfloat16:
        _, other, _ = make(name, task, device, "--bfloat16-sampling")
        functions["bfloat16"], updates["bfloat16"] = lambda _: other.update(batch), UPDATES[name]
    if name in UPDATES:  # about an update's worth of matrix products in each round
        products, gflop = matrix_products(SIZES[task][1], fast.args.hidden_size, device)
        functions |= products
        updates |= {"square": 600, "step": 300}
    with module.settings(fast.args):  # as in a run
        seconds = seconds_per_update(functions, updates, rounds, device)
        onednn = torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    oracle = seconds.get("oracle", float("nan"))
    steps, outside = loop(name, task, device, 10 * UPDATES.get(name, 100))
    cells = [f"`{campaign.script_of(name)}.py` {name.partition('-')[2]}".strip(), task]
    cells += [f"{1 / seconds['fast']:.3g}", f"{1 / seconds['plain']:.3g}", f"{1 / oracle:.3g}"]
    cells += [f"{oracle / seconds['fast']:.2f}", f"{oracle / seconds['plain']:.2f}", f"{steps:.3g}"]
    cells += ["" if outside is None else f"{100 * outside:.0f} %"]
    note = f"{name}, {task}: {seconds['mkl'] / seconds['fast']:.2f} times as fast as with MKL.\n" if onednn else ""
    if name not in UPDATES:
        return cells, note
    needed = sdac_gflop(*SIZES[task], fast.args)
    rates = {products: gflop[products] / seconds[products] for products in gflop}
    rate, h = needed / seconds["fast"], fast.args.hidden_size
    if bfloat16:
        steps, _ = loop(name, task, device, 10 * UPDATES[name], "--bfloat16-sampling")
        ratio = seconds["fast"] / seconds["bfloat16"]
        note += f"With --bfloat16-sampling {ratio:.2f} times the updates/s, and {steps:.3g} steps/s.\n"
    return cells, note + (
        f"{name}, {task}: {needed:.3g} GFLOP per update at {rate:.0f} GFLOP/s. In the same rounds the matrix "
        f"products of a denoising step alone ran at {rates['step']:.0f} ({rate / rates['step']:.0%}), "
        f"those of {h} x {h} weights at {rates['square']:.0f} ({rate / rates['square']:.0%}).\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--tasks", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, {options.device}: {name}\n")
    print(
        "| script | task | updates/s | plain | oracle | ratio | plain ratio | steps/s | outside | first s | peak GB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    notes = ""
    for row_name in options.scripts:
        for task in options.tasks:
            first, memory = in_new_process(start, row_name, task, options.device)
            cells, note = in_new_process(row, row_name, task, options.device, options.rounds)
            print(f"| {' | '.join([*cells, f'{first:.0f}', f'{memory:.1f}'])} |", flush=True)
            notes += note
    print(f"\n{notes}", end="")


if __name__ == "__main__":
    main()
