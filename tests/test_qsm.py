"""The mathematics of qsm.py against closed forms and the paper-literal oracle."""

import copy
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pairs
import pytest
import reference
import torch
from pairs import random_batch, scatter

import qsm
import sdac

pytestmark = pytest.mark.usefixtures("eager_float64")

T = 5


def make(**changes):
    """A small agent whose target critics differ from the online ones, and its oracle."""
    agent = qsm.QSM(4, 2, qsm.Args(**{"hidden_size": 16, "tau": 0.1, "q_lr": 1e-3, **changes}))
    scatter(agent.target_critics)
    return agent, pairs.oracle(agent)


def test_schedule_in_closed_form():
    t = np.arange(1, T + 1, dtype=np.longdouble)
    log_abar = -0.1 * t / T - 0.5 * 9.9 * t**2 / T**2
    one_minus_abar, alpha = -np.expm1(log_abar), np.array(reference.qsm_alphas(T))
    schedule = qsm.Schedule(T)
    for table, expected in [
        (schedule.sqrt_abar, np.exp(log_abar / 2)),
        (schedule.sqrt_1m_abar, np.sqrt(one_minus_abar)),
        (schedule.eps_factor, (1 - alpha) / np.sqrt(one_minus_abar)),
        (schedule.scale, alpha**-0.5),
        (schedule.std, np.sqrt(1 - alpha) * (t > 1)),
    ]:
        np.testing.assert_allclose(table.numpy(), expected.astype(float), rtol=1e-12)


# Equation (4)


def regression_target(critics, a_t, scale):
    """What `policy_loss` wants the policy to answer at a_t (B, d), read off its gradient in an answer of 0."""
    agent = qsm.QSM(1, a_t.shape[1], qsm.Args(hidden_size=1, q_gradient_scale=scale))
    t, answer = torch.arange(len(a_t)) % T, torch.zeros_like(a_t, requires_grad=True)
    batch = qsm.Batch(torch.zeros(len(a_t), 1), torch.zeros_like(a_t), *[None] * 3)
    with mock.patch.object(agent.critics, "forward", critics):
        with mock.patch.object(agent.policy, "forward", lambda *inputs: answer):
            loss, _ = agent.policy_loss(batch, t, eps=a_t / agent.schedule.sqrt_1m_abar[t, None])
    return -answer.numel() / 2 * torch.autograd.grad(loss, answer)[0]  # of mean (answer - target)^2


def quadratics(*mus):
    """Critics Q_i(s, a) = -|a - mu_i|^2 / 2."""
    return lambda observations, actions: torch.stack([-((actions - mu) ** 2).sum(1) / 2 for mu in mus])


def test_target_averages_both_critics_at_the_noised_action():
    critics, a_t = quadratics(torch.tensor([0.5, 0.0]), torch.tensor([-0.1, 0.6])), 2 * torch.randn(6, 2)
    expected = 7.0 * (a_t - torch.tensor([0.2, 0.3]))  # -M_q * (mean of mu - a_t), beyond the box too
    torch.testing.assert_close(regression_target(critics, a_t, scale=7.0), expected)


def test_the_target_moves_samples_up_the_critic():
    mu = torch.tensor([0.5, -0.4])
    errors = []
    for sign in (1, -1):
        policy = SimpleNamespace(  # one that answers the target, whatever the state
            state_layer=lambda observations: 0,
            action_layer=lambda a_t: a_t,
            time_share=lambda t: torch.zeros(T, 1),
            trunk=lambda a_t: sign * regression_target(quadratics(mu, mu), a_t, scale=3.0),
        )
        actions = qsm.denoise(policy, qsm.Schedule(T), None, torch.randn(4000, 2), torch.randn(T, 4000, 2))
        errors.append((actions.mean(0) - mu).abs().max())
    assert errors[0] < 0.2
    assert errors[1] > 0.4  # the opposite sign drives them to the far walls


def test_only_the_denoiser_is_differentiated():
    agent, _ = make()
    loss, _ = agent.policy_loss(random_batch(qsm), torch.tensor([0, 1, 2, 3, 4, 0, 1]), torch.randn(7, 2))
    loss.backward()
    assert all(p.grad is None for p in [*agent.critics.parameters(), *agent.target_critics.parameters()])
    assert all(p.grad is not None for p in agent.policy.parameters())


# The agent


@pytest.mark.parametrize(
    "changes", [{}, {"policy_lr_steps": 3, "q_gradient_scale": 2.0, "diffusion_steps": 8}], ids=str
)
def test_updates_equal_the_oracle(changes):
    agent, oracle = make(**changes)
    before = copy.deepcopy(agent.state_dict())
    for _ in range(5):
        pairs.assert_same_update(agent, oracle, random_batch(qsm))
    for name, value in agent.state_dict().items():
        assert not torch.equal(value, before[name]), f"{name} never moved"


def test_random_numbers_are_standard():
    agent, _ = make()
    batch = random_batch(qsm, 1000)
    with pairs.recorded() as numbers:
        agent.update(batch)
    pairs.assert_standard(numbers, steps=T)


@pytest.mark.parametrize("explore", [True, False])
def test_acting_equals_the_oracle(explore):
    agent, oracle = make()
    pairs.assert_same_actions(agent, oracle, torch.randn(9, 4), explore)


def test_actions_are_memory_of_their_own():
    """A compiled function's result on CUDA is overwritten by its next call."""
    agent, result = make()[0], torch.rand(9, 2)
    with mock.patch.object(qsm, "denoise", lambda *arguments: result.normal_().clamp_(-1, 1)):
        first = agent.act(torch.randn(9, 4), explore=False)
        kept = first.clone()
        agent.act(torch.randn(9, 4), explore=False)
    assert torch.equal(first, kept)


def test_initial_weights():
    policy = qsm.Policy(100, 20, 512, T)
    first = torch.cat([policy.action_layer.weight, policy.state_layer.weight, policy.time_layers[3].weight])
    for weight in (first, *qsm.Critics(100, 20, 512).net[0].weight):
        assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / sum(weight.shape)), rel=1e-3)  # Xavier
    assert first.shape == (248, 512)
    assert qsm.Policy(3, 2, 8, T, time_dim=100_000).frequencies.std().item() == pytest.approx(0.2, rel=0.03)


# The bias, and that RSSM does not have it


WEIGHTS, MEANS, STDS = torch.tensor([0.3, 0.7]), torch.tensor([-0.5, 0.4]), torch.tensor([0.1, 0.09])


def mixtures(observations, actions):
    """Two critics alike, Q = log of a Gaussian mixture in one dimension: the wanted policy exp(Q) is that mixture."""
    parts = torch.distributions.Normal(MEANS, STDS).log_prob(actions)
    return torch.logsumexp(parts + WEIGHTS.log(), dim=1).expand(2, -1)


def exact_noise(a_t, signal, noise):
    """-sqrt(1-abar_t) times the score of the noised mixture, which is a mixture again."""
    a_t = a_t.detach().requires_grad_(True)
    normal = torch.distributions.Normal(signal * MEANS, (signal**2 * STDS**2 + noise**2).sqrt())
    log_p = torch.logsumexp(normal.log_prob(a_t) + WEIGHTS.log(), dim=1)
    return -noise * torch.autograd.grad(log_p.sum(), a_t)[0]


def rssm_target(schedule, a_t, t, m=100_000):
    """The target of sdac.py on this schedule, with quantiles for random reverse samples: sums are integrals."""
    args = sdac.Args(hidden_size=1, num_reverse_samples=m, temperature=1.0, bounded_reverse_sampling=False)
    agent = sdac.SDAC(1, 1, args)
    agent.schedule.sqrt_abar = schedule.sqrt_abar
    agent.schedule.reverse_std = schedule.sqrt_1m_abar / schedule.sqrt_abar
    quantiles = torch.special.ndtri((torch.arange(m) + 0.5) / m)[None, :, None].expand(len(a_t), -1, -1)

    def values(observations, actions):
        return mixtures(None, actions.reshape(-1, 1))[0].view(len(actions), -1)

    with mock.patch.object(agent, "values", values), pairs.replayed(quantiles):
        return agent.reverse_sampling(qsm.Batch(*[None] * 5), a_t, torch.full((len(a_t),), t))[0]


def relative_errors(t, steps=100):
    """Errors of QSM's and of RSSM's target at noised samples of the mixture, over the size of the exact one."""
    schedule, n = qsm.Schedule(steps), 100
    signal, noise = schedule.sqrt_abar[t], schedule.sqrt_1m_abar[t]
    component = torch.multinomial(WEIGHTS, n, replacement=True)
    a_0 = (MEANS[component] + STDS[component] * torch.randn(n))[:, None]
    a_t = schedule.noised(a_0, torch.full((n,), t), torch.randn(n, 1))
    exact = exact_noise(a_t, signal, noise)
    target = regression_target(mixtures, a_t, scale=1.0)
    target = target * (target * exact).sum() / (target * target).sum()  # QSM gets the M_q that fits best at this t
    return [((x - exact).norm() / exact.norm()).item() for x in (target, rssm_target(schedule, a_t, t))]


def test_qsm_is_biased_on_a_mixture_at_large_t_and_rssm_is_not():
    errors = {t: relative_errors(t) for t in (0, 5, 15, 40, 99)}
    print([f"t={t}: QSM {q:.3f}, RSSM {r:.1e}" for t, (q, r) in errors.items()])
    assert all(r < 5e-3 for _, r in errors.values())  # of the sums: in the tails quantiles are few
    assert errors[0][0] < 0.1  # a little noise does little harm
    assert min(errors[t][0] for t in (40, 99)) > 0.4  # later a good part of the target is wrong, with the best M_q


def test_qsm_is_linear_on_a_quadratic_with_another_slope():
    """For exp(Q) = N(0, I) the exact target is sqrt(1-abar_t) a_t, QSM's is M_q a_t: no M_q fits all t."""
    schedule, a_t, zero = qsm.Schedule(T), torch.randn(50, 2), torch.zeros(2)
    target = regression_target(quadratics(zero, zero), a_t, scale=1.0)
    torch.testing.assert_close(target, a_t, rtol=1e-9, atol=1e-12)
    slopes = schedule.sqrt_1m_abar / (schedule.sqrt_abar**2 + schedule.sqrt_1m_abar**2)  # the exact targets', over a_t
    assert slopes[T - 1] / slopes[0] > 2
