"""The mathematics of sac.py and td3.py against closed forms and the paper-literal oracles."""

import copy
import math
from unittest import mock

import pairs
import pytest
import torch
from pairs import random_batch, scatter

import sac
import td3

pytestmark = pytest.mark.usefixtures("eager_float64")

# SAC


def squashed(mean, log_std, eps):
    """Action and log-density (2) of a policy with this mean and standard deviation of u."""
    policy = sac.Policy(1, 1, 1)
    with mock.patch.object(policy, "forward", lambda observations: (mean, log_std)):
        return policy.sample(None, eps)


@pytest.mark.parametrize("u", [-10.0, -3.0, -0.2, 0.0, 1.5, 10.0])
def test_sac_log_density_is_the_change_of_variables(u):
    """P(tanh(U) in [a1, a2]) / (a2 - a1) for a tiny interval around tanh(u), from the normal distribution function."""
    mean, log_std = torch.tensor([[0.3]]), torch.tensor([[math.log(4.0)]])
    action, log_prob = squashed(mean, log_std, (u - mean) / log_std.exp())
    assert action.item() == pytest.approx(math.tanh(u))
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
    _, log_prob = squashed(mean, torch.zeros(1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype))
    log_prob.sum().backward()
    assert torch.isfinite(mean.grad).all()
    # log(1 - tanh(u)^2) -> 2 log 2 - 2 |u|, so the log-density grows like 2 |u|
    assert log_prob.item() == pytest.approx(2 * abs(u) - 2 * math.log(2) - 0.5 * math.log(2 * math.pi), rel=1e-5)


def test_sac_density_of_all_dimensions_is_their_product():
    mean, log_std, eps = torch.randn(3, 4, 5)
    parts = [squashed(mean[:, [i]], log_std[:, [i]], eps[:, [i]])[1] for i in range(5)]
    torch.testing.assert_close(squashed(mean, log_std, eps)[1], sum(parts))


def test_sac_clamps_the_log_standard_deviation():
    policy = sac.Policy(1, 2, 4)
    with torch.no_grad():
        policy.net[-1].bias.copy_(torch.tensor([50.0, -50.0, 50.0, -50.0]))
    mean, log_std = policy(torch.zeros(1, 1))
    torch.testing.assert_close(log_std, torch.tensor([[2.0, -20.0]]))
    assert mean.abs().min() > 40


def make_sac():
    agent = sac.SAC(4, 2, sac.Args(hidden_size=16, tau=0.1, q_lr=1e-3, alpha_lr=2e-3))
    scatter(agent.target_critics)
    assert agent.log_alpha == 0  # alpha starts at 1
    agent.log_alpha.data.fill_(-0.7)
    return agent, pairs.oracle(agent)


def test_sac_updates_equal_the_oracle():
    agent, oracle = make_sac()
    before = copy.deepcopy(agent.state_dict())
    for _ in range(4):
        pairs.assert_same_update(agent, oracle, random_batch(sac))
    for name, value in agent.state_dict().items():
        assert not torch.equal(value, before[name]), f"{name} never moved"


@pytest.mark.parametrize("explore", [True, False])
def test_sac_acts_with_a_sample_and_without_exploration_with_the_mean(explore):
    agent, oracle = make_sac()
    pairs.assert_same_actions(agent, oracle, torch.randn(9, 4), explore)


@pytest.mark.parametrize("entropy, rises", [(-5.0, True), (3.0, False)])
def test_sac_temperature_moves_towards_the_target_entropy(entropy, rises):
    """Entropy -E log pi below the target -d = -2 must raise alpha, above it must lower alpha."""
    agent, _ = make_sac()
    sac.minimize(agent.alpha_optimizer, agent.alpha_loss, torch.tensor(entropy))
    assert (agent.log_alpha.item() > -0.7) if rises else (agent.log_alpha.item() < -0.7)


@pytest.mark.parametrize("agent_class, module", [(sac.SAC, sac), (td3.TD3, td3)])
def test_random_numbers_are_standard(agent_class, module):
    agent, batch = agent_class(4, 2, module.Args(hidden_size=16)), random_batch(module, 1000)
    with pairs.recorded() as numbers:
        agent.update(batch)
        agent.act(batch.observations, explore=True)
    pairs.assert_standard(numbers)


@pytest.mark.parametrize("module", [sac, td3])
def test_twin_critics_start_like_two_plain_ones(module):
    critics = module.Critics(380, 20, 500)
    for part, fan_in in zip(critics.net[::2], (400, 500, 500), strict=True):
        for values in (part.weight, part.bias):
            assert (values[0] != values[1]).all()
            for twin in values:
                assert 0.95 < twin.abs().max() * fan_in**0.5 <= 1 or twin.numel() == 1
                assert twin.numel() == 1 or twin.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)


# TD3


def make_td3(**changes):
    agent = td3.TD3(4, 2, td3.Args(hidden_size=16, tau=0.1, **changes))
    scatter(agent.target_critics, agent.target_policy)
    return agent, pairs.oracle(agent)


@pytest.mark.parametrize("changes", [{}, {"policy_frequency": 3, "policy_noise": 2.0}], ids=str)
def test_td3_updates_equal_the_oracle(changes):
    agent, oracle = make_td3(**changes)
    before = copy.deepcopy(agent.state_dict())
    for _ in range(6):
        pairs.assert_same_update(agent, oracle, random_batch(td3))
    for name, value in agent.state_dict().items():
        assert not torch.equal(value, before[name]), f"{name} never moved"


def test_td3_clips_the_noise_before_and_the_action_after_adding_it():
    agent = td3.TD3(1, 4, td3.Args(hidden_size=1, policy_noise=0.2, noise_clip=0.5))
    target_actions, eps = torch.tensor([[0.0, 0.9, -0.9, 0.2]]), torch.tensor([[9.0, 9.0, -9.0, 0.5]])
    with mock.patch.object(agent.target_policy, "forward", lambda observations: target_actions):
        with mock.patch.object(agent.target_critics, "forward", return_value=torch.zeros(2, 1)) as values:
            agent.critic_loss(random_batch(td3, 1, 1, 4), eps)
    _, actions = values.call_args.args
    torch.testing.assert_close(actions, torch.tensor([[0.5, 1.0, -1.0, 0.3]]))


@pytest.mark.parametrize("explore", [True, False])
def test_td3_explores_with_clipped_noise_and_evaluates_without(explore):
    agent, oracle = make_td3(exploration_noise=0.8)
    pairs.assert_same_actions(agent, oracle, torch.randn(50, 4), explore)
