"""sdac.py and qsm.py against one recorded update each of the papers' official JAX codes.

The recordings (golden/*.npz) hold the weights before and after the update, the random numbers that it drew, and what it
computed from them, in float32 at toy sizes: 7 transitions, 5 observation and 2 action dimensions, 16 hidden units. The
agents here are given the same weights, transitions and random numbers. Compared are, for

SDAC (N = 3, T = 6, M = 64): the action a' and target y of the critics, their losses, and their weights and moving
averages after the step; the proposal's action, a_t, the reverse samples, their weights and the regression target; the
prediction eps_theta; the gradient of the policy's loss; log lambda after its step. The official loss of the policy is
a mean over reverse samples whose weights add up to 1, so its gradient has a factor 1/M more; the policy's weights after
the step are not compared, as Adam's epsilon is another one beside such a gradient. Exploration noise is zero here, as
it was switched off there.

QSM (T = 5, M_q = 50): the schedule, the mean of the critics' targets, a_t, the critics' gradient, the target of the
regression, eps_theta, the policy's loss, and all weights after the step.
"""

import dataclasses
import math
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pairs
import pytest
import torch
import tyro

import qsm
import sdac

GOLDEN = Path(__file__).parent / "golden"
OFFICIAL = tyro.cli(sdac.Args, args=re.search("official defaults are `(.*?)`", sdac.__doc__, re.S)[1].split())


@pytest.fixture(autouse=True)
def eager():
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def recording(name):
    return {key: torch.from_numpy(values) for key, values in np.load(GOLDEN / f"{name}.npz").items()}


def assert_close(mine, official, atol=None):
    """To 1e-5 of the largest number in the array, if not to `atol`."""
    atol = 1e-5 * official.abs().max().item() if atol is None else atol
    torch.testing.assert_close(mine.detach(), official.to(mine.dtype), rtol=0, atol=atol)


# The layers of each network in the recordings, in the order of `pairs.layers_of`
SDAC_CRITIC = [f"q_net/linear{i}" for i in ("", "_1", "_2", "_3")]
SDAC_POLICY = [f"policy/dacer_policy_net/linear{i}" for i in ("", "_1", "_2", "_3", "_4", "_5")]
QSM_CRITIC = ["MLP_0/Dense_0", "MLP_0/Dense_1", "Dense_0"]
QSM_POLICY = [f"score/MLP_{i}" for i in ("0/Dense_0", "0/Dense_1", "1/Dense_0", "1/Dense_1", "1/Dense_2")]


def official_layers(recorded, prefix, names):
    """Weights, inputs x outputs, and biases."""
    weight, bias = ("w", "b") if f"{prefix}/{names[0]}/w" in recorded else ("kernel", "bias")
    return [(recorded[f"{prefix}/{name}/{weight}"], recorded[f"{prefix}/{name}/{bias}"]) for name in names]


def official_twins(recorded, first, second, names):
    both = zip(official_layers(recorded, first, names), official_layers(recorded, second, names))
    return [(torch.stack([w1, w2]), torch.stack([b1, b2])) for (w1, b1), (w2, b2) in both]


@torch.no_grad()
def load(network, layers):
    for parts, (weight, bias) in zip(pairs.layers_of(network), layers, strict=True):
        for part, share in zip(parts, weight.split([part.weight.shape[-2] for part in parts], dim=-2), strict=True):
            part.weight.copy_(share)
            if part.bias is not None:
                part.bias.copy_(bias.view_as(part.bias))


def assert_same_layers(network, layers, atol=None):
    for parts, (weight, bias) in zip(pairs.layers_of(network), layers, strict=True):
        my_weight, my_bias = pairs.layer(parts)
        assert_close(my_weight.mT, weight, atol)
        assert_close(my_bias, bias, atol)


# SDAC


class OfficialSDAC:
    """The recording, an agent with its weights, its transitions and random numbers as the script draws them."""

    def __init__(self):
        self.recorded = recorded = recording("sdac")
        obs_dim, action_dim, hidden, n, steps, m, _ = recorded["sizes"].tolist()
        sizes = dict(hidden_size=hidden, num_particles=n, target_particles=n, diffusion_steps=steps)
        args = dataclasses.replace(OFFICIAL, **sizes, num_reverse_samples=m)
        self.agent = sdac.SDAC(obs_dim, action_dim, args)
        load(self.agent.policy, official_layers(recorded, "before", SDAC_POLICY))
        load(self.agent.ema_policy, official_layers(recorded, "before", SDAC_POLICY))
        load(self.agent.critics, official_twins(recorded, "before/q1", "before/q2", SDAC_CRITIC))
        load(self.agent.target_critics, official_twins(recorded, "before/target_q1", "before/target_q2", SDAC_CRITIC))
        self.agent.log_lambda.data.copy_(recorded["log_alpha_before"] - math.log(5))  # lambda is alpha/5
        self.batch = sdac.Batch(*(recorded[key] for key in ("obs", "action", "next_obs", "reward", "done")))
        no_exploration = torch.zeros(len(recorded["obs"]), action_dim)
        self.target_noise = [*self.sampling("next"), no_exploration]
        self.proposal_noise = [*self.sampling("new"), no_exploration, recorded["t"].long(), recorded["forward_noise"]]
        self.reverse_noise = [recorded["reverse_noise"]]

    def sampling(self, name):
        """Noise of `best_of_n`: the start (B, N, d), recorded after its factor 0.5, and that of the steps t = 0..T-1,
        (T, B, N, d), recorded from the last to the first."""
        steps, start = self.recorded[f"{name}_noise"].flip(1), self.recorded[f"{name}_x"] / 0.5
        return start.permute(1, 0, 2), steps.permute(1, 2, 0, 3)


def test_sdac_targets_of_the_critics():
    official = OfficialSDAC()
    agent, batch, recorded = official.agent, official.batch, official.recorded
    with torch.no_grad(), pairs.replayed(*official.target_noise[:2]):
        next_action = agent.best_of_n(agent.policy, batch.next_observations, agent.args.num_particles)
    assert_close(next_action, recorded["next_action"])
    with pairs.replayed(*official.target_noise):
        y = agent.target_values(batch)
    assert_close(y, recorded["backup"])
    _, metrics = agent.critic_loss(batch, y)
    assert_close(metrics["qf1_loss"], recorded["q1_loss"])
    assert_close(metrics["qf2_loss"], recorded["q2_loss"])


def test_sdac_reverse_sampling_and_gradient_of_the_policy():
    official = OfficialSDAC()
    agent, batch, recorded = official.agent, official.batch, official.recorded
    with torch.no_grad(), pairs.replayed(*official.proposal_noise[:2]):
        new_action = agent.best_of_n(agent.policy, batch.observations, agent.args.num_particles)
    assert_close(new_action, recorded["new_action"])
    with pairs.replayed(*official.proposal_noise):
        a_t, t = agent.propose(batch)
    assert_close(a_t, recorded["noisy_action"])
    samples = agent.schedule.reverse_samples(a_t, t, recorded["reverse_noise"]).clamp(-1, 1)
    assert_close(samples, recorded["reverse_action"])
    with pairs.replayed(*official.reverse_noise):
        target, effective_sample_size = agent.reverse_sampling(batch, a_t, t)
    assert_close(target, recorded["target"])
    assert_close(effective_sample_size, 1 / recorded["weights"].square().sum(1).mean())
    assert_close(agent.policy(batch.observations, a_t, t), recorded["eps"])

    loss, _ = agent.policy_loss(batch, a_t, t, target)
    gradients = pairs.with_gradients(agent.policy, torch.autograd.grad(loss, list(agent.policy.parameters())))
    m = agent.args.num_reverse_samples
    expected = [(m * weight, m * bias) for weight, bias in official_layers(recorded, "grad", SDAC_POLICY)]
    assert_same_layers(gradients, expected)


def test_sdac_update():
    official = OfficialSDAC()
    agent, recorded = official.agent, official.recorded
    with pairs.replayed(*official.target_noise, *official.proposal_noise, *official.reverse_noise):
        metrics = agent.update(official.batch)
    assert_close(metrics["qf1_loss"], recorded["q1_loss"])
    assert_close(agent.log_lambda, recorded["log_alpha_after"] - math.log(5), 1e-7)
    twins = official_twins(recorded, "after/q1", "after/q2", SDAC_CRITIC)
    assert_same_layers(agent.critics, twins, 1e-7)
    averages = official_twins(recorded, "after/target_q1", "after/target_q2", SDAC_CRITIC)
    assert_same_layers(agent.target_critics, averages, 5e-7)


# QSM


def official_qsm(critics="before"):
    """The recording, an agent with its weights from before the update, and its transitions."""
    recorded = recording("qsm")
    obs_dim, action_dim, hidden, steps, _ = recorded["sizes"].tolist()
    agent = qsm.QSM(obs_dim, action_dim, qsm.Args(hidden_size=hidden, diffusion_steps=steps, q_gradient_scale=50.0))
    load(agent.policy, official_layers(recorded, "before", QSM_POLICY))
    agent.policy.frequencies.data.copy_(recorded["before/score/FourierFeatures_0/kernel"][:, 0])
    load(agent.critics, official_twins(recorded, f"{critics}/critic_1", f"{critics}/critic_2", QSM_CRITIC))
    load(agent.target_critics, official_twins(recorded, "before/critic_1", "before/critic_2", QSM_CRITIC))
    columns = [recorded[key] for key in ("observations", "actions", "next_observations", "rewards")]
    return recorded, agent, qsm.Batch(*columns, 1 - recorded["masks"])


def acting_noise(recorded):
    """As the script draws it: the sampler's for t = 0..T-1, recorded from the last step to the first."""
    return recorded["start"], recorded["sampler_noise"].flip(0), recorded["target_noise"]


def wanted(network, loss, shape):
    """The regression target of a squared error, averaged over rows (and columns), read off its gradient where the
    network answers 0."""
    answer = torch.zeros(shape, requires_grad=True)
    with mock.patch.object(network, "forward", lambda *inputs: answer):
        (gradient,) = torch.autograd.grad(loss()[0], answer)
    return gradient / -2


def test_qsm_schedule():
    recorded, agent, _ = official_qsm()
    assert_close(agent.schedule.sqrt_abar**2, recorded["alpha_hats"])
    assert_close(agent.schedule.sqrt_1m_abar**2, 1 - recorded["alpha_hats"])
    assert_close(1 - agent.schedule.scale**-2, recorded["betas"])
    assert_close(agent.schedule.std[1:] ** 2, recorded["betas"][1:])


def test_qsm_targets_of_the_critics():
    recorded, agent, batch = official_qsm()
    with pairs.replayed(*acting_noise(recorded)):
        next_actions = agent.act(batch.next_observations, explore=True)
    y = 7 * wanted(agent.critics, lambda: agent.critic_loss(batch, next_actions), (2, 7))
    assert_close(y.mean(1), recorded["target_q_mean"].expand(2))


def test_qsm_regression_of_the_policy():
    recorded, agent, batch = official_qsm(critics="after")
    t, eps = recorded["t"].long(), recorded["forward_noise"]
    assert_close(agent.schedule.noised(batch.actions, t, eps), recorded["noisy_action"])
    assert_close(agent.policy(batch.observations, recorded["noisy_action"], t), recorded["eps"])
    target = 14 * wanted(agent.policy, lambda: agent.policy_loss(batch, t, eps), (7, 2))
    assert_close(target, recorded["regression_target"])
    _, metrics = agent.policy_loss(batch, t, eps)
    assert_close(metrics["actor_loss"], recorded["actor_loss"])
    assert_close(metrics["q_gradient"], recorded["q_gradient"].norm(dim=1).mean())


def test_qsm_update():
    recorded, agent, batch = official_qsm()
    with pairs.replayed(*acting_noise(recorded), recorded["t"].long(), recorded["forward_noise"]):
        metrics = agent.update(batch)
    assert_close(metrics["actor_loss"], recorded["actor_loss"])
    assert_same_layers(agent.critics, official_twins(recorded, "after/critic_1", "after/critic_2", QSM_CRITIC), 1e-7)
    assert_same_layers(agent.policy, official_layers(recorded, "after", QSM_POLICY), 1e-7)
    assert_close(agent.policy.frequencies, recorded["after/score/FourierFeatures_0/kernel"][:, 0], 1e-7)
