"""Every tensor is made on the agent's device. No test machine has CUDA, so this is torch's `meta` device: it computes
nothing, and refuses tensors of another device."""

import contextlib
from unittest import mock

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
    (sdac, sdac.SDAC, {"soft_critic": True}),
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
