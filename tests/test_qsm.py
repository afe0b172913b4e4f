"""The mathematics of qsm.py against closed forms and the paper-literal oracle."""

import copy
import math

import numpy as np
import pytest
import pairs
import reference
import torch
from pairs import random_batch, scatter
from test_sac_td3 import float64  # noqa: F401

import qsm

T = 5


def pair(**changes):
    agent = qsm.QSM(4, 2, qsm.Args(**{"hidden_size": 16, "tau": 0.1, **changes}))
    scatter(agent.target_critics)
    return agent, pairs.oracle(agent)


def test_schedule_in_closed_form():
    t = np.arange(1, T + 1, dtype=np.longdouble)
    log_abar = -0.1 * t / T - 0.5 * 9.9 * t**2 / T**2
    schedule = qsm.Schedule(T)
    np.testing.assert_allclose(schedule.signal.numpy(), np.exp(log_abar / 2).astype(float), rtol=1e-13)
    np.testing.assert_allclose(schedule.noise.numpy(), np.sqrt(-np.expm1(log_abar)).astype(float), rtol=1e-13)
    alphas = np.array(reference.qsm_alphas(T))
    shrink, grow, std = schedule.denoising.T.numpy()
    np.testing.assert_allclose(shrink, ((1 - alphas) / np.sqrt(-np.expm1(log_abar))).astype(float), rtol=1e-12)
    np.testing.assert_allclose(grow, alphas**-0.5, rtol=1e-13)
    np.testing.assert_allclose(std, np.sqrt(1 - alphas) * (t > 1), rtol=1e-12)


@pytest.mark.parametrize("t", range(T))
def test_denoising_step_is_ho_et_al(t):
    """a_{t-1} = (a_t - beta/sqrt(1-abar) eps) / sqrt(alpha) + sqrt(beta) z, clipped; Algorithm 2 of Ho et al."""
    alphas = reference.qsm_alphas(T)
    abar = math.prod(alphas[: t + 1])
    a_t, eps, z = 0.3 * torch.randn(50, 3), torch.randn(50, 3), torch.randn(50, 3)
    expected = (a_t - (1 - alphas[t]) / math.sqrt(1 - abar) * eps) / math.sqrt(alphas[t])
    expected = (expected + (math.sqrt(1 - alphas[t]) * z if t > 0 else 0)).clamp(-1, 1)
    result = qsm.denoising_step(qsm.Schedule(T).denoising[t], a_t, eps, z)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    if t > 0:
        assert ((result.abs() < 1).float().mean() > 0.2) and (result.abs() == 1).any()


def quadratics(*mus):
    """Critics Q_i(s, a) = -|a - mu_i|^2 / 2."""
    return lambda observations, actions: torch.stack([-((actions - mu) ** 2).sum(1) / 2 for mu in mus])


def sampled_with(sign, mu):
    schedule, critics = qsm.Schedule(T), quadratics(mu, mu)
    a_t = torch.randn(4000, 2)
    for t in reversed(range(T)):
        target = sign * qsm.qsm_target(critics, torch.zeros(4000, 1), a_t, 3.0)
        a_t = qsm.denoising_step(schedule.denoising[t], a_t, target, torch.randn(4000, 2))
    return a_t


def test_the_target_moves_samples_up_the_critic():
    mu = torch.tensor([0.5, -0.4])
    error = (sampled_with(+1, mu).mean(0) - mu).abs().max()
    assert error < 0.2
    wrong = (sampled_with(-1, mu).mean(0) - mu).abs().max()  # the opposite sign drives them to the far walls
    assert wrong > 0.4 and wrong > 2 * error


def test_target_averages_both_critics_at_the_noised_action():
    critics = quadratics(torch.tensor([0.5, 0.0]), torch.tensor([-0.1, 0.6]))
    a_t = 2 * torch.randn(6, 2)
    expected = 7.0 * (a_t - torch.tensor([0.2, 0.3]))  # -M_q * (mean of mu - a_t), beyond the box too
    torch.testing.assert_close(qsm.qsm_target(critics, torch.zeros(6, 1), a_t, 7.0), expected)


def test_only_the_denoiser_is_differentiated():
    agent, _ = pair()
    batch, noise = random_batch(qsm), agent.draw_update_noise(7, torch.device("cpu"))
    a_t = qsm.forward_sample(agent.schedule, batch.actions, noise.t, noise.forward)
    target = qsm.qsm_target(agent.critics, batch.observations, a_t, 50.0)
    assert not target.requires_grad and all(p.grad is None for p in agent.critics.parameters())
    (agent.policy(batch.observations, a_t, noise.t) - target).square().mean().backward()
    assert all(p.grad is None for p in agent.critics.parameters())
    assert all(p.grad is not None for p in agent.policy.parameters())
    assert not agent.sample_action(batch.observations, noise.next_action).requires_grad


@pytest.mark.parametrize(
    "changes", [{}, {"policy_lr_steps": 3, "q_gradient_scale": 2.0, "diffusion_steps": 8}], ids=str
)
def test_updates_equal_the_oracle(changes):
    agent, oracle = pair(**changes)
    before = copy.deepcopy(agent.state_dict())
    for step in range(5):
        batch, noise = random_batch(qsm), agent.draw_update_noise(7, torch.device("cpu"))
        agent.update(batch, step, noise)
        oracle.update(batch, step, noise)
        pairs.assert_same(agent, oracle)
    for name, value in agent.state_dict().items():
        assert not torch.equal(value, before[name]), f"{name} never moved"


@pytest.mark.parametrize("explore", [True, False])
def test_acting_equals_the_oracle(explore):
    agent, oracle = pair()
    observations = torch.randn(9, 4)
    torch.manual_seed(5)
    noise = agent.draw_action_noise(9, torch.device("cpu"))
    torch.manual_seed(5)
    actions = agent.act(observations, explore)
    if not explore:
        noise = noise._replace(exploration=torch.zeros(9, 2))
    torch.testing.assert_close(actions, oracle.sample_action(observations, noise), rtol=1e-9, atol=1e-12)


def test_initial_weights():
    policy = qsm.DiffusionPolicy(100, 20, 512, 5)
    first = torch.cat([policy.action.weight, policy.state.weight, policy.time[3].weight])
    assert first.shape == (248, 512)
    assert first.abs().max().item() == pytest.approx(math.sqrt(6 / (248 + 512)), rel=1e-3)
    for twin in qsm.Critics(100, 20, 512).net[0].weight:
        assert twin.shape == (120, 512)
        assert twin.abs().max().item() == pytest.approx(math.sqrt(6 / (120 + 512)), rel=1e-3)
    assert qsm.DiffusionPolicy(3, 2, 8, 5, time_dim=20_000).frequencies.std().item() == pytest.approx(0.2, rel=0.03)


# The bias, and that RSSM does not have it


WEIGHTS, MEANS, STDS = torch.tensor([0.3, 0.7]), torch.tensor([-0.6, 0.5]), torch.tensor([0.15, 0.25])


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


def relative_errors(t, steps=100):
    """Errors of QSM's and of RSSM's target at noised samples of the mixture, over the size of the exact one."""
    schedule, n = qsm.Schedule(steps), 2000
    signal, noise = schedule.signal[t], schedule.noise[t]
    component = torch.multinomial(WEIGHTS, n, replacement=True)
    a_0 = (MEANS[component] + STDS[component] * torch.randn(n))[:, None]
    a_t = qsm.forward_sample(schedule, a_0, torch.full((n,), t), torch.randn(n, 1))
    exact = exact_noise(a_t, signal, noise)
    target = qsm.qsm_target(mixtures, torch.zeros(n, 1), a_t, 1.0)
    target = target * (target * exact).sum() / (target * target).sum()  # QSM gets the M_q that fits best at this t
    # RSSM: reverse samples on a grid wide enough for the mixture, weighed with N(eps; 0, 1) exp(Q)
    grid = torch.linspace(-2.5, 2.5, 5001)[None]
    eps = (a_t / signal - grid) / (noise / signal)
    log_weights = mixtures(None, grid.reshape(-1, 1))[:1] - eps**2 / 2
    rssm = (torch.softmax(log_weights, dim=1) * eps).sum(1, keepdim=True)
    return [((x - exact).norm() / exact.norm()).item() for x in (target, rssm)]


def test_qsm_is_biased_on_a_mixture_at_large_t_and_rssm_is_not():
    errors = {t: relative_errors(t) for t in (0, 5, 15, 40, 99)}
    print([f"t={t}: QSM {q:.3f}, RSSM {r:.1e}" for t, (q, r) in errors.items()])
    assert all(r < 1e-6 for _, r in errors.values())
    assert errors[0][0] < 0.1  # a little noise does little harm
    assert min(errors[t][0] for t in (40, 99)) > 0.4  # later a good part of the target is wrong, with the best M_q


def test_qsm_is_linear_on_a_quadratic_with_another_slope():
    """For exp(Q) = N(0, I) the exact target is noise_t a_t, QSM's is M_q a_t: no M_q fits all t."""
    schedule, a_t = qsm.Schedule(T), torch.randn(50, 2)
    critics = quadratics(torch.zeros(2), torch.zeros(2))
    target = qsm.qsm_target(critics, torch.zeros(50, 1), a_t, 1.0)
    for t in range(T):
        exact = schedule.noise[t] * a_t / (schedule.signal[t] ** 2 + schedule.noise[t] ** 2)
        torch.testing.assert_close(target * schedule.noise[t], exact, rtol=1e-9, atol=1e-12)
    assert schedule.noise[T - 1] / schedule.noise[0] > 2
