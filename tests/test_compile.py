"""The fast paths give the same numbers: torch.compile, chunks of states, groups of denoising steps."""

import copy
import subprocess
import sys

import pairs
import pytest
import torch
from conftest import ROOT, environment
from pairs import random_batch, scatter

import qsm
import sac
import sdac
import td3

# More particles and reverse samples than fit one chunk of 1024 rows, so that six states are cut into 2, 2, 2 and
# 3, 3; eleven denoising steps go in groups of ten and one. 32 hidden units take the wide product, two actions the
# narrow one.
SDAC_SIZES = dict(hidden_size=32, num_particles=400, num_reverse_samples=300, diffusion_steps=11)


@pytest.fixture(autouse=True)
def compiler_on():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    with torch._dynamo.config.patch(disable=False):
        yield
    torch.set_default_dtype(torch.float32)


def make(script, compile, **sizes):
    """A small agent whose averages and targets differ from the online networks, and its module."""
    usual = {"sdac": SDAC_SIZES | {"lambda_frequency": 3}, "qsm": {"hidden_size": 16, "diffusion_steps": 6}}
    module, name = {"sdac": (sdac, "SDAC"), "qsm": (qsm, "QSM"), "sac": (sac, "SAC"), "td3": (td3, "TD3")}[script]
    sizes = sizes or usual.get(script, {"hidden_size": 16})
    agent = getattr(module, name)(4, 2, module.Args(compile=compile, tau=0.1, **sizes))
    scatter(agent.ema_critics if script == "sdac" else agent.target_critics)
    return module, agent


@pytest.mark.parametrize(
    "compile, dtype, rtol, atol",
    [(False, torch.float64, 1e-9, 1e-11), (False, torch.float32, 1e-5, 1e-5), (True, torch.float64, 1e-9, 1e-11)],
)
@pytest.mark.parametrize("script", ["sdac", "qsm", "sac", "td3"])
def test_fast_updates_equal_the_oracle(script, compile, dtype, rtol, atol):
    torch.set_default_dtype(dtype)
    module, agent = make(script, compile)
    oracle = pairs.oracle(agent)
    for step in range(3):
        batch = random_batch(module, size=6)
        train_policy = (step % 2 == 0,) if script == "sdac" else ()
        noise = agent.draw_update_noise(6, *train_policy, torch.device("cpu"))
        agent.update(batch, step, noise)
        oracle.update(batch, step, noise)
        pairs.assert_same(agent, oracle, rtol, atol)
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compile


def test_compiled_actions_equal_plain_ones():
    (_, plain), (_, fast) = (make("qsm", compile) for compile in (False, True))
    fast.load_state_dict(plain.state_dict())
    observations, actions = torch.randn(9, 4), []
    for agent in (plain, fast):
        torch.manual_seed(1)
        actions.append(agent.act(observations, explore=True))
    torch.testing.assert_close(*actions, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("script", ["sdac", "qsm", "sac", "td3"])
def test_two_threads_repeat_a_compiled_update_to_the_last_digit(script):
    """Numbers summed in the order in which threads happen to come would round differently now and then."""
    threads, particles = torch.get_num_threads(), {"num_particles": 4} if script == "sdac" else {}
    torch.set_num_threads(2)
    try:
        module, agent = make(script, compile=True, hidden_size=64, **particles)
        train_policy = (True,) if script == "sdac" else ()
        batch, noise = random_batch(module, 256), agent.draw_update_noise(256, *train_policy, torch.device("cpu"))
        agent.update(batch, 0, noise)
        parts = [agent, *agent.optimizers]
        states, results = [copy.deepcopy(part.state_dict()) for part in parts], []
        for _ in range(30):
            for part, state in zip(parts, states):
                part.load_state_dict(copy.deepcopy(state))
            agent.update(batch, 0, noise)
            results.append(torch.cat([value.detach().flatten() for value in agent.parameters()]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    assert not any(torch.equal(states[0][name], value) for name, value in agent.named_parameters())


def test_mish_is_mish_and_stays_finite():
    x = torch.cat([torch.linspace(-100, 100, 2001), torch.tensor([-1e30, 1e30, 3e38])])
    for module in (sdac, qsm):
        expected = torch.nn.functional.mish(x.double())
        with torch.no_grad():
            torch.testing.assert_close(module.Mish()(x).double(), expected, rtol=1e-6, atol=2e-6)
            torch.testing.assert_close(module.Mish()(x.double()), expected, rtol=1e-14, atol=1e-14)
        for dtype, tolerance in ((torch.float32, 5e-6), (torch.float64, 1e-12)):
            mine, theirs = (torch.linspace(-100, 100, 2001, dtype=dtype, requires_grad=True) for _ in range(2))
            module.Mish()(mine).sum().backward()
            torch.nn.functional.mish(theirs).sum().backward()
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=tolerance, atol=tolerance)
        wild = torch.tensor([-1e30, -1e4, 0.0, 1e4, 1e30], requires_grad=True)
        module.Mish()(wild).sum().backward()
        torch.testing.assert_close(wild.grad, torch.tensor([0.0, 0.0, 0.6, 1.0, 1.0]))


def test_a_compiled_run(run, tmp_path):
    options = "--env-id Hopper-v4 --num-envs 2 --total-timesteps 140 --learning-starts 100 --hidden-size 32"
    options += " --num-particles 4 --num-reverse-samples 8 --diffusion-steps 5 --eval-frequency 140 --eval-episodes 2"
    process = run("sdac", *options.split(), TORCH_COMPILE_DISABLE="0")
    assert process.returncode == 0, process.stderr
    assert "torch.compile" not in process.stdout + process.stderr and "Warning" not in process.stderr


def test_all_threads_of_a_run_flush_denormal_numbers(tmp_path):
    """On Humanoid-v4 they come up by the hundreds, in exponentials and in averages of gradients that have vanished."""
    code = """
import sac, sys, torch
class Probe(sac.SAC):
    def update(self, *arguments):
        print("left:", (torch.full((1_000_000,), 1e-39) * 1).count_nonzero().item())
        return super().update(*arguments)
sys.argv[1:] = "--env-id Hopper-v4 --total-timesteps 30 --learning-starts 29 --eval-episodes 1 --no-compile".split()
sac.main(Probe)
"""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="2"),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "left: 0\n" in process.stdout, process.stdout + process.stderr


def test_without_a_compiler_one_line_says_so(run, tmp_path):
    process = run(
        "sac", *"--env-id Hopper-v4 --total-timesteps 30 --learning-starts 20 --eval-episodes 1".split(),
        TORCH_COMPILE_DISABLE="0", CXX="/there/is/no/compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    (line,) = [line for line in process.stdout.splitlines() if "torch.compile" in line]
    assert line.startswith("running without torch.compile")
    plain = run("sac", *"--env-id Hopper-v4 --total-timesteps 5 --eval-episodes 1 --no-compile".split())
    assert plain.returncode == 0 and "torch.compile" not in plain.stdout
