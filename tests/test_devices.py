"""Every tensor is made on the agent's device: shown by CUDA where there is such a device, and everywhere by torch's
`meta` device, which computes nothing and refuses tensors of another device."""

import contextlib
import copy
from unittest import mock

import pairs
import pytest
import torch

import qsm
import sac
import sdac
import td3

VARIANTS = [
    (sac, sac.SAC, {}),
    (td3, td3.TD3, {}),
    (qsm, qsm.QSM, {}),
    (sdac, sdac.SDAC, {}),
    (sdac, sdac.SDAC, {"soft_critic": True, "lambda_frequency": 2}),
    (sdac, sdac.SDAC, {"proposal": "policy", "target_particles": 4, "bounded_reverse_sampling": False}),
]


@pytest.fixture(autouse=True)
def forget_replaced_functions():
    """torch.device("meta") knows torch.randn by a list, which may have been made while a test had it replaced."""
    torch.utils._device._device_constructors.cache_clear()


@pytest.mark.parametrize("module, agent_class, changes", VARIANTS)
def test_updates_and_actions_stay_on_one_device(module, agent_class, changes):
    """Three updates: with and without the policy's, which come every second time, and lambda's."""
    with torch.device("meta"):
        agent = agent_class(4, 2, module.Args(hidden_size=8, **changes))
        observations = torch.zeros(7, 4)
        batch = module.Batch(observations, torch.zeros(7, 2), observations, torch.zeros(7), torch.zeros(7))
    for optimizer in agent.optimizers:
        optimizer.param_groups[0]["fused"] = False  # there is no fused Adam for this device
    no_autocast = mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # unknown to `meta`
    with torch.compiler.set_stance("force_eager"), no_autocast:
        for _ in range(3):
            assert all(metric.device.type == "meta" for metric in agent.update(batch).values())
        for explore in (True, False):
            actions = agent.act(observations, explore)
            assert actions.device.type == "meta" and actions.shape == (7, 2)


def test_the_meta_device_finds_what_is_made_elsewhere():
    with torch.device("meta"):
        agent, observations = td3.TD3(4, 2, td3.Args(hidden_size=8)), torch.zeros(7, 4)
    with pytest.raises(RuntimeError, match="device"):
        agent.policy(observations) + torch.randn(7, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("module, agent_class, changes", VARIANTS)
def test_compiled_updates_on_cuda_equal_the_cpus(monkeypatch, module, agent_class, changes):
    """Ten updates at Hopper-v4's sizes, which the compiler pads. A root mean square, since some of a ReLU's weights
    move otherwise under Adam when its input rounds to the other side of zero."""
    torch.manual_seed(0)
    monkeypatch.setattr(module, "states_per_chunk", lambda rows, device: 10**9, raising=False)  # as on CUDA
    cpu = agent_class(11, 3, module.Args(**changes))
    cuda, before = copy.deepcopy(cpu).to("cuda"), copy.deepcopy(cpu.state_dict())
    observations, kept = torch.randn(7, 11), []
    with torch._dynamo.config.patch(disable=False, trace_autograd_ops=True):
        for _ in range(6):  # compile, with random numbers of its own
            cuda.update(module.Batch(*(column.to("cuda") for column in pairs.random_batch(module, 256, 11, 3))))
            cuda.act(observations.to("cuda"), explore=True)
        cuda.load_state_dict(before)
        cuda.updates = 0
        for optimizer in cuda.optimizers:
            optimizer.state.clear()
        for _ in range(10):
            batch = pairs.random_batch(module, 256, 11, 3)
            with torch.compiler.set_stance("force_eager"), pairs.recorded() as numbers:
                cpu.update(batch)
            with pairs.replayed(*numbers):
                metrics = cuda.update(module.Batch(*(column.to("cuda") for column in batch)))
            kept += [(value, value.item()) for value in metrics.values()]
        with torch.compiler.set_stance("force_eager"), pairs.recorded() as numbers:
            expected = cpu.act(observations, explore=True)
        with pairs.replayed(*numbers):
            actions = cuda.act(observations.to("cuda"), explore=True)
    assert all(value.item() == then for value, then in kept)  # no later call has overwritten them
    torch.testing.assert_close(actions.cpu(), expected, rtol=0, atol=1e-3)
    for mine, theirs in zip(cuda.parameters(), cpu.parameters()):
        assert (mine.cpu() - theirs).square().mean() < 1e-4**2
    assert any(not torch.equal(value, before[name]) for name, value in cpu.named_parameters())
