"""The fast paths give the same numbers: torch.compile, chunks of states, Mish with one exponential."""

import copy
import itertools

import pairs
import pytest
import torch
import torch.nn.functional as F
from conftest import equal
from pairs import random_batch, scatter

import qsm
import sac
import sdac
import td3

AGENTS = {sdac: sdac.SDAC, qsm: qsm.QSM, sac: sac.SAC, td3: td3.TD3}
SIZES = {
    # More rows than the 1024 of one chunk: 100 states, with so many rows each, are cut into 21, 21, 21, 21 and 16; 84
    # into four of 21, one shape to compile.
    sdac: dict(hidden_size=32, num_particles=48, target_particles=48, num_reverse_samples=48, diffusion_steps=2),
    qsm: dict(hidden_size=32, diffusion_steps=2),
    sac: dict(hidden_size=32),
    td3: dict(hidden_size=32),
}


@pytest.fixture(autouse=True)
def compiler():
    threads = torch.get_num_threads()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    with torch._dynamo.config.patch(disable=False, trace_autograd_ops=True):
        yield
    torch.set_num_threads(threads)
    torch.compiler.set_stance("default")
    torch.set_default_dtype(torch.float32)


def assert_same_numbers(module, states, rtol, atol):
    """Three updates and an action, in so many states, of an agent and of its oracle. Returns the agent."""
    agent = AGENTS[module](4, 2, module.Args(tau=0.1, **SIZES[module]))
    scatter(agent.target_critics)
    oracle = pairs.oracle(agent)
    for _ in range(3):
        pairs.assert_same_update(agent, oracle, random_batch(module, states), rtol, atol)
    pairs.assert_same_actions(agent, oracle, torch.randn(states, 4), True, rtol, atol)
    return agent


@pytest.mark.parametrize("module", AGENTS)
def test_averages_start_as_copies(module):
    agent = AGENTS[module](4, 2, module.Args(hidden_size=8))
    averages = {"target_critics": "critics", "target_policy": "policy", "ema_policy": "policy"}
    states = {name: child.state_dict() for name, child in agent.named_children()}
    assert averages.keys() & states.keys()
    assert all(equal(states[name], states[averages[name]]) for name in averages.keys() & states.keys())


@pytest.mark.parametrize("module", AGENTS)
def test_plain_updates_in_float32_equal_the_oracle(module):
    with module.settings(module.Args(compile=False)):
        assert_same_numbers(module, 100, 1e-5, 1e-5)
    assert not torch._dynamo.utils.counters["stats"]


ZEN_4 = {"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}
MACHINES = {  # capabilities, whether there is a GPU, and whether oneDNN may use bfloat16: with AMX or on ARM it would
    "AMD Zen 4": (ZEN_4, False, "bf16"),
    "AMD Zen 4 and a GPU": (ZEN_4, True, "none"),
    "AMD Zen 3": ({"avx2": True, "avx512_f": False, "amx_bf16": False}, False, "none"),
    "Xeon with AMX": ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": True}, False, "none"),
    "ARM": ({"neon": True, "bf16": True}, False, "none"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_products_go_to_onednn_only_where_it_computes_them_in_float32(monkeypatch, machine):
    capabilities, gpu, precision = MACHINES[machine]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with sac.settings(sac.Args()):
        assert torch.backends.mkldnn.matmul.fp32_precision == precision
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_products_of_a_run_are_computed_in_float32():
    """Between rows and columns of many lengths; bfloat16 would be wrong by one in 500."""
    with sac.settings(sac.Args()):
        for rows, inner, columns in itertools.product((1, 80, 1024), (17, 256, 376), (1, 17, 256)):
            x, w = torch.randn(2, rows, inner), torch.randn(2, columns, inner).mT
            error = (x @ w - x.double() @ w.double()).abs() / (x.double().abs() @ w.double().abs())
            assert error.max() < 1e-5


@pytest.mark.parametrize("module", AGENTS)
def test_compiled_updates_equal_the_oracle_and_two_threads_repeat_them_to_the_last_digit(module):
    """Numbers summed in the order in which threads happen to come would round differently now and then."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    agent = assert_same_numbers(module, 84, rtol=1e-9, atol=1e-11)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]

    batch, parts = random_batch(module, 84), [agent, *agent.optimizers]
    states, results = [copy.deepcopy(part.state_dict()) for part in parts], []
    for _ in range(30):
        for part, state in zip(parts, states):
            part.load_state_dict(copy.deepcopy(state))
        agent.updates = 0
        torch.manual_seed(1)
        agent.update(batch)
        results.append(torch.cat([value.detach().flatten() for value in agent.parameters()]))
    assert all(torch.equal(result, results[0]) for result in results)
    assert not any(torch.equal(states[0][name], value) for name, value in agent.named_parameters())


@pytest.mark.parametrize("module", AGENTS)
def test_gradients_may_have_padded_rows_and_are_not_kept(monkeypatch, module):
    """On CUDA the compiler pads matrices and returns parts of them, which later calls overwrite. Adam wants the
    parameters' strides, and the compiler refuses parameters whose gradient has been overwritten."""
    torch.compiler.set_stance("force_eager")
    agents, batch = [AGENTS[module](4, 2, module.Args(**SIZES[module])) for _ in range(2)], random_batch(module)
    agents[1].load_state_dict(agents[0].state_dict())
    gradients = module.gradients

    def padded(loss, parameters, *inputs):
        grads, metrics = gradients(loss, parameters, *inputs)
        return [F.pad(grad, (0, 3))[..., : grad.shape[-1]] if grad.dim() else grad for grad in grads], metrics

    for agent, compute in zip(agents, (gradients, padded)):
        monkeypatch.setattr(module, "gradients", compute)
        torch.manual_seed(1)
        for _ in range(2):
            agent.update(batch)
        assert all(parameter.grad is None for parameter in agent.parameters())
    for mine, theirs in zip(*(agent.parameters() for agent in agents)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("stance", ["force_eager", "default"])
def test_denoising_in_bfloat16_hardly_moves_the_actions(stance):
    agent, observations, actions = sdac.SDAC(17, 6, sdac.Args(diffusion_steps=10)), torch.randn(256, 17), []
    for agent.args.bfloat16_sampling, this_stance in ((False, "force_eager"), (True, stance)):
        torch.compiler.set_stance(this_stance)
        torch.manual_seed(0)
        actions.append(agent.best_of_n(agent.policy, observations, 1))
    difference = actions[1] - actions[0]
    assert actions[1].dtype == torch.float32
    assert 0 < difference.abs().max() < 0.02 and difference.square().mean() < 0.002**2


@pytest.mark.parametrize("module", [sdac, qsm])
def test_mish_is_mish_and_stays_finite(module):
    x = torch.cat([torch.linspace(-100, 100, 2001), torch.tensor([-1e30, 1e30, 3e38])])
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
