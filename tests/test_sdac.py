"""The mathematics of sdac.py against closed forms and against the paper-literal oracle."""

import copy
import math
from statistics import NormalDist
from unittest import mock

import numpy as np
import pairs
import pytest
import reference
import torch
from pairs import random_batch, scatter

import sdac

pytestmark = pytest.mark.usefixtures("eager_float64")

T = 20


@pytest.fixture
def schedule():
    return sdac.Schedule(T, 1)


def make(**changes):
    """A small agent whose averages differ from the online networks, and its oracle."""
    sizes = dict(hidden_size=16, num_particles=3, num_reverse_samples=5, diffusion_steps=6)
    agent = sdac.SDAC(4, 2, sdac.Args(**{**sizes, "lambda_frequency": 3, "tau": 0.1, "q_lr": 1e-3, **changes}))
    scatter(agent.ema_policy, agent.target_critics)
    return agent, pairs.oracle(agent)


# Schedule


@pytest.mark.parametrize("power", [1, 7])
def test_schedule_in_closed_form(power):
    schedule, root = sdac.Schedule(T, power), np.longdouble(1) / power
    first, last = np.longdouble(1e-4) ** root, np.longdouble(0.999) ** root
    betas = 0.8 * np.linspace(first, last, T, dtype=np.longdouble) ** power
    log_abar = np.cumsum(np.log1p(-betas))
    abar, one_minus_abar = np.exp(log_abar), -np.expm1(log_abar)
    for table, expected in [
        (schedule.sqrt_abar, np.sqrt(abar)),
        (schedule.sqrt_1m_abar, np.sqrt(one_minus_abar)),
        (schedule.reverse_std, np.sqrt(one_minus_abar / abar)),
    ]:
        np.testing.assert_allclose(table.numpy(), expected.astype(float), rtol=1e-11)
    diffusion = reference.Diffusion(reference.sdac_betas(T, power))
    for t in range(T):
        (mean_a0, std), (mean_at, _) = diffusion.posterior(0.0, 1.0, t), diffusion.posterior(1.0, 0.0, t)
        tables = [schedule.mean_a0[t], schedule.mean_at[t], schedule.posterior_std[t]]
        expected = torch.tensor([mean_a0, mean_at, std])
        torch.testing.assert_close(torch.stack(tables), expected, rtol=1e-9, atol=1e-12)
    assert schedule.posterior_std[0] == 0  # the last step adds no noise


def test_posterior_is_bayes_rule_on_the_forward_process():
    """Integrates q(a_{t-1}|a_0) q(a_t|a_{t-1}) numerically, so that the oracle itself is checked."""
    diffusion = reference.Diffusion(reference.sdac_betas(T))
    grid = torch.linspace(-6, 6, 200_001)
    for t in (1, 5, T - 1):
        a_0, a_t = 0.3, -0.4
        before, beta = diffusion.abar[t - 1], diffusion.beta[t]
        log_density = -((grid - math.sqrt(before) * a_0) ** 2) / (2 * (1 - before))
        log_density = log_density - (a_t - math.sqrt(1 - beta) * grid) ** 2 / (2 * beta)
        weights = torch.softmax(log_density, 0)
        mean, std = diffusion.posterior(a_t, a_0, t)
        numeric_mean = (weights * grid).sum()
        assert numeric_mean.item() == pytest.approx(mean, abs=1e-8)
        assert ((weights * (grid - numeric_mean) ** 2).sum().sqrt()).item() == pytest.approx(std, rel=1e-6)


def test_schedule_in_float32_is_the_rounded_float64_one(schedule):
    torch.set_default_dtype(torch.float32)
    for name, table in sdac.Schedule(T, 1).named_buffers():
        torch.testing.assert_close(table, schedule.get_buffer(name).float(), rtol=0, atol=0)


# Reverse sampling score matching


def test_forward_then_reverse_with_the_same_noise_returns_the_action(schedule):
    a_0, eps, t = torch.randn(T, 3), torch.randn(T, 3), torch.arange(T)
    a_t = schedule.noised(a_0, t, eps)
    torch.testing.assert_close(schedule.reverse_samples(a_t, t, eps[:, None])[:, 0], a_0, rtol=1e-9, atol=1e-9)


def test_noise_of_reverse_samples_is_the_score_of_both_kernels(schedule):
    """Equations (3) to (5): one gradient in a_t, and it is -eps / sqrt(1-abar)."""
    t, eps = torch.arange(T), torch.randn(T, 1, 3)
    a_t = torch.randn(T, 3, requires_grad=True)
    a_0 = schedule.reverse_samples(a_t, t, eps)[:, 0].detach()
    normal, abar = torch.distributions.Normal, schedule.sqrt_abar[:, None] ** 2
    forward = normal(abar.sqrt() * a_0, (1 - abar).sqrt()).log_prob(a_t).sum()
    reverse = normal(a_t / abar.sqrt(), ((1 - abar) / abar).sqrt()).log_prob(a_0).sum()
    expected = -eps[:, 0] / (1 - abar).sqrt()
    for log_density in (forward, reverse):
        torch.testing.assert_close(torch.autograd.grad(log_density, a_t)[0], expected, rtol=1e-6, atol=1e-6)


def regression_targets(q, temperature, a_t, t, bound=None):
    """The script's targets for a_t (B, 1) and Q(s, a) = q(a), with 100,000 quantiles for random reverse samples, so
    that sums over them are integrals."""
    m, bounded = 100_000, bound is not None
    changes = {"temperature": temperature, "num_reverse_samples": m, "bounded_reverse_sampling": bounded}
    changes |= {"reverse_bound": bound} if bounded else {}
    agent = sdac.SDAC(1, 1, sdac.Args(hidden_size=1, diffusion_steps=T, beta_power=1.0, **changes))
    u = ((torch.arange(m) + 0.5) / m)[None, :, None].expand(len(a_t), -1, -1)
    batch = sdac.Batch(torch.zeros(len(a_t), 1), *[None] * 4)
    with mock.patch.object(agent, "values", lambda observations, actions: q(actions)[..., 0]):
        with pairs.replayed(u if bounded else torch.special.ndtri(u)):
            return agent.reverse_sampling(batch, a_t, torch.full((len(a_t),), t))[0]


@pytest.mark.parametrize("t", [2, 6, 12, T - 1])
def test_minimiser_for_a_quadratic_q(schedule, t):
    """exp(Q/tau) is N(mu, v), well inside the box, so p_t is N(sqrt(abar) mu, abar v + 1-abar)."""
    mu, v, tau = 0.2, 0.12**2, 0.7
    signal, noise = schedule.sqrt_abar[t], schedule.sqrt_1m_abar[t]
    a_t = signal * mu + 2 * (signal**2 * v + noise**2).sqrt() * torch.linspace(-1, 1, 9)[:, None]
    target = regression_targets(lambda a: -tau * (a - mu) ** 2 / (2 * v), tau, a_t, t)
    expected = noise * (a_t - signal * mu) / (signal**2 * v + noise**2)  # -sqrt(1-abar) times the score
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t", [2, 6, 12, T - 1])
def test_minimiser_for_a_mixture(schedule, t):
    weights, means, stds, tau = torch.tensor([0.3, 0.7]), torch.tensor([-0.3, 0.4]), torch.tensor([0.1, 0.09]), 0.3

    def log_mixture(a, scale=1.0, noise=0.0):
        normal = torch.distributions.Normal(scale * means, (scale**2 * stds**2 + noise**2).sqrt())
        return torch.logsumexp(normal.log_prob(a) + weights.log(), dim=-1, keepdim=True)

    signal, noise = schedule.sqrt_abar[t], schedule.sqrt_1m_abar[t]
    a_t = (signal * torch.linspace(-0.5, 0.6, 9)[:, None]).requires_grad_()
    (score,) = torch.autograd.grad(log_mixture(a_t, signal, noise).sum(), a_t)  # p_t is a mixture again
    target = regression_targets(lambda a: tau * log_mixture(a), tau, a_t.detach(), t)
    torch.testing.assert_close(target, -noise * score, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bound", [1.0, 2.0])
@pytest.mark.parametrize("t", [2, 6, 12, T - 1])
def test_minimiser_on_the_box(schedule, t, bound):
    """For pi ∝ exp(Q(clip(a))/tau) on [-bound, bound], with the score of p_t by the trapezoid rule."""
    tau = 0.4

    def q(a):
        a = a.clamp(-1, 1)
        return 0.8 * a - 0.5 * a**2 + 0.3 * torch.sin(5 * a)

    signal, noise = schedule.sqrt_abar[t], schedule.sqrt_1m_abar[t]
    a_t = (signal + noise) * torch.linspace(-1, 1, 9)[:, None]
    grid = torch.linspace(-bound, bound, 100_001)
    edges = torch.ones_like(grid)
    edges[0] = edges[-1] = 0.5
    weights = torch.softmax(q(grid) / tau - (a_t - signal * grid) ** 2 / (2 * noise**2) + edges.log(), dim=1)
    score = (weights * -(a_t - signal * grid) / noise**2).sum(1, keepdim=True)
    target = regression_targets(q, tau, a_t, t, bound)
    torch.testing.assert_close(target, -noise * score, rtol=1e-4, atol=1e-4)


def test_effective_sample_size_goes_from_1_to_m():
    agent, _ = make(num_reverse_samples=50, temperature=1.0)
    batch, a_t, t = random_batch(sdac), torch.randn(7, 2), torch.zeros(7, dtype=torch.long)
    for scale, expected in ((0.0, 50.0), (1e9, 1.0)):
        with mock.patch.object(agent, "values", lambda observations, actions: scale * torch.randn(7, 50)):
            assert agent.reverse_sampling(batch, a_t, t)[1].item() == pytest.approx(expected)


def test_collapsed_loss_has_the_gradient_of_the_m_pass_loss():
    agent, oracle = make()
    batch = random_batch(sdac)
    with pairs.recorded() as numbers:
        a_t, t = agent.propose(batch)
        target, _ = agent.reverse_sampling(batch, a_t, t)
    loss, _ = agent.policy_loss(batch, a_t, t, target)
    collapsed = torch.autograd.grad(loss, list(agent.policy.parameters()))
    literal = torch.autograd.grad(oracle.policy_loss(batch, numbers), reference.flat(oracle.policy))
    collapsed = reference.flat(pairs.policy(pairs.with_gradients(agent.policy, collapsed)))
    for a, b in zip(collapsed, literal, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# Reverse samples inside the box


def truncated_quantile(u, low, high):
    """Of N(0, 1) cut to [low, high]."""
    if low + high > 0:
        return -truncated_quantile(1 - u, -high, -low)  # Phi is accurate in its lower tail only
    phi = [math.erfc(-x / math.sqrt(2)) / 2 for x in (low, high)]
    return NormalDist().inv_cdf(phi[0] + u * (phi[1] - phi[0]))


# A step t and means of qtilde, at most six standard deviations outside the box: noise of an action inside leads no
# further. The box is 224 of them wide at t = 0, 3 at t = 5, and 0.005 at t = T-1
BOXES = {
    "wide": (0, [0.0, 0.5, -0.9, 1.0, -1.0]),
    "in a tail": (0, [1.01, -1.02, 1.05, -1.05]),
    "medium": (5, [0.0, 0.8, -1.5, 3.0, -3.0]),
    "narrow": (T - 1, [0.0, 300.0, -600.0, 1000.0]),
}


@pytest.mark.parametrize("box", BOXES)
def test_bounded_noise_in_float32_has_the_quantiles_of_the_truncated_normal(schedule, box):
    t, means = BOXES[box]
    std = schedule.reverse_std[t].item()
    a_t = (torch.tensor(means) * schedule.sqrt_abar[t]).float()[:, None]
    u = torch.tensor([2**-23, 1e-4, 0.03, 0.3, 0.5, 0.8, 0.99, 1 - 1e-4, 1 - 2**-23]).double()
    steps = torch.full((len(means),), t)
    torch.set_default_dtype(torch.float32)
    eps = sdac.Schedule(T, 1).bounded_noise(a_t, steps, u[None, :, None].expand(len(means), -1, -1), 1)
    assert eps.dtype == torch.float32
    for i in range(len(means)):
        mean = a_t[i].item() / schedule.sqrt_abar[t].item()
        expected = [truncated_quantile(x, (mean - 1) / std, (mean + 1) / std) for x in u.tolist()]
        for value, quantile in zip(eps[i, :, 0].tolist(), expected, strict=True):
            rounding = 1e-6 + 1e-7 * abs(mean) / std  # float32's, of noise and of the mean in such units
            assert abs(value - quantile) < rounding + 2e-16 / NormalDist().pdf(quantile)  # float64's, of a probability


@pytest.mark.parametrize("bound", [1, 1.5])
def test_bounded_reverse_samples_stay_in_the_box(bound):
    torch.set_default_dtype(torch.float32)
    schedule, t = sdac.Schedule(T, 1), torch.arange(T).repeat_interleave(500)
    a_t = schedule.noised(2 * torch.rand(len(t), 3) - 1, t, 1.5 * torch.randn(len(t), 3))
    u = torch.rand(len(t), 64, 3, dtype=torch.float64)
    u[:, 0], u[:, 1] = 0, 1 - 2**-53  # the smallest and the largest that torch.rand returns
    samples = schedule.reverse_samples(a_t, t, schedule.bounded_noise(a_t, t, u, bound))
    assert (samples.abs() <= bound + 1e-6 * (1 + a_t.abs() / schedule.sqrt_abar[t, None])[:, None]).all()


def test_reverse_sampling_draws_its_uniform_numbers_in_float64():
    """In float32 one of 2^24 is 0, some hundreds in a run on Humanoid-v4, for which the noise is the wall far off."""
    torch.set_default_dtype(torch.float32)
    agent, batch = sdac.SDAC(2, 3, sdac.Args(hidden_size=4)), pairs.random_batch(sdac, 5, 2, 3)
    with mock.patch.object(torch, "rand", wraps=torch.rand) as rand:
        agent.reverse_sampling(batch, *agent.propose(batch))
    assert [call.kwargs["dtype"] for call in rand.call_args_list] == [torch.float64]


# Networks against the oracle's concatenated ones


def test_split_first_layers_equal_concatenated_ones():
    agent, oracle = make()
    batch, t = random_batch(sdac), torch.tensor([0, 1, 2, 3, 4, 5, 2])
    actions = torch.randn(7, 5, 2)
    wide, narrow = (agent.critics(batch.observations, a) for a in (actions, batch.actions))
    for i, critic in enumerate(oracle.critics):
        expected = reference.sdac_q(critic, batch.observations, batch.actions)
        torch.testing.assert_close(narrow[i], expected, rtol=1e-9, atol=1e-12)
        for k in range(5):
            expected = reference.sdac_q(critic, batch.observations, actions[:, k])
            torch.testing.assert_close(wide[i, :, k], expected, rtol=1e-9, atol=1e-12)
    a_t = torch.randn(7, 2)
    expected = reference.sdac_noise_prediction(oracle.policy, batch.observations, a_t, t.double())
    torch.testing.assert_close(agent.policy(batch.observations, a_t, t), expected, rtol=1e-9, atol=1e-12)


def test_initial_weights():
    policy, critics = sdac.Policy(100, 20, 256), sdac.Critics(100, 20, 256)
    first = torch.cat([policy.state_layer.weight, policy.action_layer.weight, policy.time_layers[3].weight])
    twins = torch.cat([critics.state_layer.weight, critics.action_layer.weight], 1)
    for unit in (first * math.sqrt(136), *twins * math.sqrt(120), *critics.trunk[1].weight * 16):
        assert unit.abs().max() <= 2
        assert unit.std().item() == pytest.approx(0.8796, abs=0.01)  # a unit normal cut at +-2
    assert (twins[0] != twins[1]).all()
    biased = [m for m in [*policy.modules(), *critics.modules()] if getattr(m, "bias", None) is not None]
    assert len(biased) == 10 and all((module.bias == 0).all() for module in biased)


# The agent


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"proposal": "policy", "target_particles": 3, "bounded_reverse_sampling": False, "temperature": 1.0},
        {"num_particles": 1},
        {"target_particles": 2},
        {"soft_critic": True},
        {"bounded_reverse_sampling": False},
        {"proposal": "policy"},
        {"diffusion_steps": 3, "beta_power": 7.0},
        {"reverse_bound": 1.5},
        {"denoising_noise": 0.5},
        {"target_noise": 0.5},
        {"policy_frequency": 1, "policy_lr_decay_begin": 1, "policy_lr_decay_end": 3, "lambda_frequency": 2},
    ],
    ids=str,
)
def test_updates_equal_the_oracle(changes):
    """Six updates, on and off the delays of policy (2) and lambda (here 3), from equal weights and random numbers."""
    agent, oracle = make(**changes)
    before = copy.deepcopy(agent.state_dict())
    for _ in range(6):
        pairs.assert_same_update(agent, oracle, random_batch(sdac))
    for name, value in agent.state_dict().items():
        assert not torch.equal(value, before[name]), f"{name} never moved"


@pytest.mark.parametrize("bounded", [False, True])
def test_random_numbers_are_standard(bounded):
    agent, _ = make(bounded_reverse_sampling=bounded)
    batch = random_batch(sdac, 1000)
    with pairs.recorded() as numbers:
        agent.update(batch)
    if bounded:
        u = numbers.pop()
        assert 0 <= u.min() < 0.01 and 0.99 < u.max() < 1 and abs(u.mean() - 0.5) < 0.01
    pairs.assert_standard(numbers, steps=6)


def test_proposals_are_drawn_only_where_the_policy_is_trained():
    agent, batch = make()[0], random_batch(sdac)
    for drawn in (6, 3):  # start, steps and exploration of a'; then t, the noise of a_t, and that of reverse samples
        with pairs.recorded() as numbers:
            agent.update(batch)
        assert len(numbers) == drawn


@pytest.mark.parametrize("explore", [True, False])
def test_acting_equals_the_oracle_with_the_moving_average_policy(explore):
    agent, oracle = make(exploration_noise=0.3)
    pairs.assert_same_actions(agent, oracle, torch.randn(9, 4), explore)


@pytest.mark.parametrize("n", [1, 8])
def test_best_of_n_keeps_the_particle_with_the_largest_min_q(n):
    agent, _ = make(denoising_noise=1.0)
    observations = torch.randn(30, 4)
    with pairs.recorded() as numbers:
        chosen = agent.best_of_n(agent.policy, observations, n)
    start, z = numbers
    particles = sdac.denoise(agent.policy, agent.schedule, observations, 0.5 * start, z)
    q1, q2 = agent.critics(observations, particles)
    best = torch.minimum(q1, q2).argmax(1)
    torch.testing.assert_close(chosen, particles[torch.arange(30), best])
    if n > 1:  # the two critics and their minimum disagree somewhere, so the test can tell them apart
        assert (q1.argmax(1) != best).any() and (q2.argmax(1) != best).any()


def test_only_denoising_is_done_in_bfloat16():
    """An agent that is asked for it, but whose denoising is kept exact, equals the oracle."""
    torch.set_default_dtype(torch.float32)  # autocast leaves float64 alone
    agent, oracle = make(bfloat16_sampling=True, proposal="policy")
    denoise = sdac.denoise

    def exactly(*inputs):
        assert torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False):
            return denoise(*inputs)

    with mock.patch.object(sdac, "denoise", exactly):
        for _ in range(2):
            pairs.assert_same_update(agent, oracle, random_batch(sdac), 1e-5, 1e-5)
        pairs.assert_same_actions(agent, oracle, torch.randn(9, 4), True, 1e-5, 1e-5)


def test_lambda_falls_while_the_entropy_of_the_exploration_noise_is_above_its_target():
    agent, _ = make(temperature=0.2, exploration_noise=0.1)
    balance = 2 * math.exp(-0.9) / math.sqrt(2 * math.pi * math.e)  # where the entropy is -0.9 per dimension
    for factor in (0.1, 1.0, 2.0):
        agent.log_lambda.data.fill_(math.log(factor * balance))
        loss, _ = agent.lambda_loss()
        (gradient,) = torch.autograd.grad(loss, agent.log_lambda)
        assert gradient.item() == pytest.approx(2 * math.log(factor))  # H - Hbar


def test_learning_rate_falls_linearly_over_the_policys_own_steps():
    agent, _ = make()
    for update, expected in [(0, 3e-4), (50_000, 3e-4), (100_000, 1.65e-4), (150_000, 3e-5), (10**7, 3e-5)]:
        agent.updates = update
        assert agent.policy_lr() == pytest.approx(expected)
