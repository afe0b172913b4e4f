"""The mathematics of sac.py and td3.py against closed forms and the paper-literal oracles."""

import copy
import math

import pytest
import pairs
import reference
import torch
from pairs import random_batch, scatter

import sac
import td3


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


# SAC


@pytest.mark.parametrize("u", [-10.0, -3.0, -0.2, 0.0, 1.5, 10.0])
def test_sac_log_density_is_the_change_of_variables(u):
    """P(tanh(U) in [a1, a2]) / (a2 - a1) for a tiny interval around tanh(u), from the normal distribution function."""
    mean, log_std = torch.tensor([[0.3]]), torch.tensor([[math.log(4.0)]])
    eps = (torch.tensor([[u]]) - mean) / log_std.exp()
    action, log_prob = sac.squash(mean, log_std, eps)
    assert action.item() == pytest.approx(math.tanh(u)) and torch.isfinite(log_prob).all()
    # interval of width 2h around u; tanh(u + h) - tanh(u - h) without cancellation is sinh(2h)/(cosh cosh)
    h = 1e-4
    width = math.sinh(2 * h) / (math.cosh(u + h) * math.cosh(u - h))
    normal = torch.distributions.Normal(mean, log_std.exp())
    mass = normal.cdf(torch.tensor(u + h)) - normal.cdf(torch.tensor(u - h))
    assert log_prob.item() == pytest.approx(math.log(mass.item() / width), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("u", [-100.0, -10.0, 10.0, 100.0])
def test_sac_log_density_stays_finite_with_its_gradient(u, dtype):
    mean = torch.tensor([[u]], dtype=dtype, requires_grad=True)
    _, log_prob = sac.squash(mean, torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype))
    log_prob.sum().backward()
    assert torch.isfinite(log_prob).all() and torch.isfinite(mean.grad).all()
    # log(1 - tanh(u)^2) -> 2 log 2 - 2 |u|, so the log-density grows like 2 |u|
    assert log_prob.item() == pytest.approx(2 * abs(u) - 2 * math.log(2) - 0.5 * math.log(2 * math.pi), rel=1e-5)


def test_sac_density_integrates_to_one():
    mean, log_std = torch.tensor([[0.4]]), torch.tensor([[math.log(0.7)]])
    u = torch.linspace(-12, 12, 400_001)[:, None]
    actions, log_prob = sac.squash(mean.expand_as(u), log_std.expand_as(u), (u - mean) / log_std.exp())
    # where tanh is flat, actions coincide in floating point: integrate over u instead, da = (1 - a^2) du
    integral = torch.trapezoid(log_prob.exp() * (1 - actions[:, 0] ** 2), u[:, 0])
    assert integral.item() == pytest.approx(1.0, abs=1e-6)


def sac_pair(**changes):
    agent = sac.SAC(4, 2, sac.Args(hidden_size=16, tau=0.1, **changes))
    scatter(agent.target_critics)
    with torch.no_grad():
        agent.log_alpha.fill_(-0.7)
    return agent, pairs.oracle(agent)


def test_sac_updates_equal_the_oracle():
    agent, oracle = sac_pair()
    before = copy.deepcopy(agent.state_dict())
    for step in range(4):
        batch, noise = random_batch(sac), agent.draw_update_noise(7, torch.device("cpu"))
        agent.update(batch, step, noise)
        oracle.update(batch, step, noise)
        pairs.assert_same(agent, oracle)
    for name, value in agent.state_dict().items():
        assert not torch.equal(value, before[name]), f"{name} never moved"


@pytest.mark.parametrize("module", [sac, td3])
def test_twin_critics_start_like_two_plain_ones(module):
    critics = module.Critics(380, 20, 500)
    for values, fan_in, count in (
        *zip(critics.weights, (400, 500, 500), (200_000, 250_000, 500)),
        (critics.biases[0], 400, 500),
    ):
        assert values.numel() == 2 * count and (values[0] != values[1]).all()
        for twin in values:
            assert 0.98 < twin.abs().max() * fan_in**0.5 <= 1
            assert twin.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)


def test_sac_policy_loss_leaves_no_gradient_in_the_critics():
    """After an update the critics hold the gradient of their own loss, nothing of the policy's."""
    agent, _ = sac_pair()
    before, batch, noise = copy.deepcopy(agent), random_batch(sac), agent.draw_update_noise(7, torch.device("cpu"))
    agent.update(batch, 0, noise)
    with torch.no_grad():
        a, log_prob = sac.squash(*before.policy(batch.next_observations), noise.next_action)
        q = before.target_critics(batch.next_observations, a).amin(0)
        y = batch.rewards + 0.99 * (1 - batch.dones) * (q - before.log_alpha.exp() * log_prob)
    loss = sum(((q - y) ** 2).mean() for q in before.critics(batch.observations, batch.actions))
    expected = torch.autograd.grad(loss, list(before.critics.parameters()))
    for p, g in zip(agent.critics.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("entropy, rises", [(-5.0, True), (3.0, False)])
def test_sac_temperature_moves_towards_the_target_entropy(entropy, rises):
    """Entropy -E log pi below the target -d = -2 must raise alpha, above it must lower alpha."""
    log_alpha = torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.Adam([log_alpha], lr=0.01)
    for _ in range(20):
        loss = sac.alpha_loss(log_alpha, torch.full((8,), -entropy), -2.0)
        sac.descend(optimizer, torch.autograd.grad(loss, [log_alpha]))
    assert (log_alpha.item() > 0.1) if rises else (log_alpha.item() < -0.1)


def test_sac_acts_with_the_mean_without_exploration():
    agent, oracle = sac_pair()
    observations = torch.randn(5, 4)
    mean = reference.mlp(oracle.policy, observations, reference.relu)[:, :2]
    torch.testing.assert_close(agent.act(observations, explore=False), torch.tanh(mean).detach())
    torch.manual_seed(1)
    explored = agent.act(observations, explore=True)
    torch.manual_seed(1)
    expected, _ = oracle.sample(observations, torch.randn(5, 2))
    torch.testing.assert_close(explored, expected.detach())


# TD3


def td3_pair(**changes):
    agent = td3.TD3(4, 2, td3.Args(hidden_size=16, tau=0.1, **changes))
    scatter(agent.target_critics, agent.target_policy)
    return agent, pairs.oracle(agent)


@pytest.mark.parametrize("changes", [{}, {"policy_frequency": 3, "policy_noise": 2.0}], ids=str)
def test_td3_updates_equal_the_oracle(changes):
    agent, oracle = td3_pair(**changes)
    before = copy.deepcopy(agent.state_dict())
    for step in range(6):
        policy_before = copy.deepcopy(agent.policy.state_dict())
        batch, noise = random_batch(td3), agent.draw_update_noise(7, torch.device("cpu"))
        agent.update(batch, step, noise)
        oracle.update(batch, step, noise)
        pairs.assert_same(agent, oracle)
        moved = any(not torch.equal(v, policy_before[k]) for k, v in agent.policy.state_dict().items())
        assert moved == (step % agent.args.policy_frequency == 0)
    for name, value in agent.state_dict().items():
        assert not torch.equal(value, before[name]), f"{name} never moved"


def test_td3_clips_the_noise_before_and_the_action_after_adding_it():
    actions, eps = torch.tensor([[0.0, 0.9, -0.9, 0.2]]), torch.tensor([[9.0, 9.0, -9.0, 0.5]])
    expected = torch.tensor([[0.5, 1.0, -1.0, 0.3]])
    torch.testing.assert_close(td3.smoothed_action(actions, eps, std=0.2, clip=0.5), expected)


def test_td3_explores_with_clipped_noise_and_evaluates_without():
    agent, oracle = td3_pair(exploration_noise=0.8)
    observations = torch.randn(500, 4)
    clean = torch.tanh(reference.mlp(oracle.policy, observations, reference.relu)).detach()
    torch.testing.assert_close(agent.act(observations, explore=False), clean)
    explored = agent.act(observations, explore=True)
    assert explored.abs().max() == 1
    inside = explored.abs() < 1
    noise = (explored - clean)[inside]
    assert noise.std().item() == pytest.approx(0.8, rel=0.5)
