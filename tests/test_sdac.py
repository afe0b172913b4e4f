"""The mathematics of sdac.py against closed forms and against the paper-literal oracle."""

import copy
import math

import numpy as np
import pytest
import pairs
import reference
import torch
from pairs import random_batch, scatter

import sdac

T = 20


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def schedule():
    return sdac.Schedule(T)


def small_args(**changes):
    sizes = dict(hidden_size=16, num_particles=3, num_reverse_samples=5, diffusion_steps=6)
    return sdac.Args(**{**sizes, **changes})


# Schedule and sampler


def test_schedule_in_closed_form(schedule):
    betas = np.linspace(0.8e-4, 0.8 * 0.999, T, dtype=np.longdouble)
    log_abar = np.cumsum(np.log1p(-betas))
    abar, one_minus_abar = np.exp(log_abar), -np.expm1(log_abar)
    for table, expected in [
        (schedule.signal, np.sqrt(abar)),
        (schedule.noise, np.sqrt(one_minus_abar)),
        (schedule.spread, np.sqrt(one_minus_abar / abar)),
    ]:
        np.testing.assert_allclose(table.numpy(), expected.astype(float), rtol=1e-11)


def test_schedule_in_float32_is_the_rounded_float64_one(schedule):
    torch.set_default_dtype(torch.float32)
    single = sdac.Schedule(T)
    for name, table in schedule.named_buffers():
        torch.testing.assert_close(single.get_buffer(name), table.float(), rtol=0, atol=0)


def test_forward_then_reverse_with_the_same_noise_returns_the_action(schedule):
    a_0, eps, t = torch.randn(T, 3), torch.randn(T, 3), torch.arange(T)
    a_t = sdac.forward_sample(schedule, a_0, t, eps)
    torch.testing.assert_close(sdac.reverse_sample(schedule, a_t, t, eps[:, None])[:, 0], a_0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", range(T))
def test_denoising_step_is_the_textbook_posterior(schedule, t):
    diffusion = reference.Diffusion(reference.sdac_betas(T))
    a_t, eps, noise = torch.randn(50, 3), torch.randn(50, 3), torch.randn(50, 3)
    a_0 = ((a_t - math.sqrt(1 - diffusion.abar[t]) * eps) / math.sqrt(diffusion.abar[t])).clamp(-1, 1)
    mean, std = diffusion.posterior(a_t, a_0, t)
    result = sdac.denoising_step(schedule.denoising[t], a_t, eps, noise)
    torch.testing.assert_close(result, mean + std * noise, rtol=1e-9, atol=1e-9)
    if t == 0:
        torch.testing.assert_close(result, a_0, rtol=1e-9, atol=1e-9)  # the last step adds no noise


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


# Reverse sampling score matching


@pytest.mark.parametrize("t", [0, 3, 10, T - 1])
def test_gradients_of_both_kernels_agree(schedule, t):
    abar = schedule.signal[t] ** 2
    a_0, a_t = torch.randn(5, 3), torch.randn(5, 3, requires_grad=True)
    forward = torch.distributions.Normal(abar.sqrt() * a_0, (1 - abar).sqrt()).log_prob(a_t).sum()
    reverse = torch.distributions.Normal(a_t / abar.sqrt(), schedule.spread[t]).log_prob(a_0).sum()
    (g_forward,), (g_reverse,) = torch.autograd.grad(forward, a_t), torch.autograd.grad(reverse, a_t)
    torch.testing.assert_close(g_forward, g_reverse, rtol=1e-9, atol=1e-9)
    # and the noise that reverse sampling uses is that score, times -sqrt(1 - abar)
    eps = torch.randn(5, 1, 3)
    sample = sdac.reverse_sample(schedule, a_t.detach(), torch.full((5,), t), eps)[:, 0]
    score = -(a_t.detach() - abar.sqrt() * sample) / (1 - abar)
    torch.testing.assert_close(-schedule.noise[t] * score, eps[:, 0], rtol=1e-6, atol=1e-6)


PROPOSALS = {
    "policy-like": lambda n: 0.4 + 0.3 * torch.randn(n, 1),
    "Gaussian": lambda n: torch.randn(n, 1),
    "far too wide": lambda n: 4 * torch.randn(n, 1),
}


def regression_target(schedule, q_function, tau, a_t, t):
    """The script's RSSM target for a_t (B, 1) in the limit of infinitely many reverse samples.

    On a uniform grid of noise, a value of q + tau log N(eps; 0, 1) makes the softmax the quadrature rule of the
    expectation over eps ~ N(0, 1): exact even where sampling would need e^100 reverse samples.
    """
    grid = torch.linspace(-20, 20, 20_001).reshape(1, -1, 1)
    eps = (a_t[:, None] / schedule.signal[t] - grid) / schedule.spread[t]
    samples = sdac.reverse_sample(schedule, a_t, torch.full((len(a_t),), t), eps)
    q = q_function(samples)[..., 0] - tau * 0.5 * eps[..., 0] ** 2
    return sdac.rssm_target(q, torch.tensor(tau), eps)[1]


QUADRATIC = dict(mu=0.5, v=0.2, tau=0.7)  # exp(Q/tau) is N(mu, v), so p_t is N(sqrt(abar) mu, abar v + 1 - abar)


def quadratic_q(a):
    return -QUADRATIC["tau"] * (a - QUADRATIC["mu"]) ** 2 / (2 * QUADRATIC["v"])


def quadratic_noise(schedule, a_t, t):
    """-sqrt(1-abar_t) ∇ log p_t for the quadratic Q."""
    signal, noise = schedule.signal[t], schedule.noise[t]
    return noise * (a_t - signal * QUADRATIC["mu"]) / (signal**2 * QUADRATIC["v"] + noise**2)


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("t", [2, 6, 12, T - 1])
def test_minimiser_for_a_quadratic_q(schedule, t, proposal):
    a_t = PROPOSALS[proposal](20)
    target = regression_target(schedule, quadratic_q, QUADRATIC["tau"], a_t, t)
    torch.testing.assert_close(target, quadratic_noise(schedule, a_t, t), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("t", [2, 6, 12, T - 1])
def test_minimiser_from_random_reverse_samples(schedule, t):
    """The same with eps ~ N(0, 1) drawn, M = 1,000,000, where the proposal is near the policy."""
    a_t, eps = PROPOSALS["policy-like"](6).clamp(-0.5, 1.2), torch.randn(6, 1_000_000, 1)
    samples = sdac.reverse_sample(schedule, a_t, torch.full((6,), t), eps)
    weights, target = sdac.rssm_target(quadratic_q(samples)[..., 0], torch.tensor(QUADRATIC["tau"]), eps)
    error = (target - quadratic_noise(schedule, a_t, t)).abs()
    standard_error = (weights**2 * (eps[..., 0] - target) ** 2).sum(1, keepdim=True).sqrt()
    assert standard_error.max() < 0.02
    assert (error < 5 * standard_error).all()


def mixture_log_density(a, weights, means, stds):
    parts = torch.distributions.Normal(torch.tensor(means), torch.tensor(stds)).log_prob(a[..., None])
    return torch.logsumexp(parts + torch.tensor(weights).log(), dim=-1)


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("t", [2, 6, 12, T - 1])
def test_minimiser_for_a_mixture(schedule, t, proposal):
    weights, means, stds, tau = [0.3, 0.7], [-0.6, 0.5], [0.25, 0.35], 0.3
    a_t = PROPOSALS[proposal](6).requires_grad_(True)
    signal, noise = schedule.signal[t].item(), schedule.noise[t].item()
    noised = [math.sqrt(signal**2 * s**2 + noise**2) for s in stds]
    log_p = mixture_log_density(a_t, weights, [signal * m for m in means], noised)
    (score,) = torch.autograd.grad(log_p.sum(), a_t)
    a_t = a_t.detach()
    target = regression_target(schedule, lambda a: tau * mixture_log_density(a, weights, means, stds), tau, a_t, t)
    torch.testing.assert_close(target, -noise * score, rtol=1e-6, atol=1e-6)


def box_score(a_t, q_function, tau, signal, noise):
    """∇ log p_t by the trapezoid rule, for pi ∝ exp(Q/tau) on [-1, 1]."""
    grid = torch.linspace(-1, 1, 100_001)
    log_integrand = q_function(grid) / tau - (a_t - signal * grid) ** 2 / (2 * noise**2)
    edges = torch.ones_like(grid)
    edges[0] = edges[-1] = 0.5
    weights = torch.softmax(log_integrand + edges.log(), dim=1)
    return (weights * -(a_t - signal * grid) / noise**2).sum(1, keepdim=True)


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("t", [2, 6, 12, T - 1])
def test_minimiser_on_the_box(schedule, t, proposal):
    q, tau = lambda a: 0.8 * a - 0.5 * a**2 + 0.3 * torch.sin(5 * a), 0.4
    a_t = schedule.signal[t] * PROPOSALS[proposal](20).clamp(-1, 1) + schedule.noise[t] * torch.randn(20, 1)
    # the quantiles of N(0, 1) at the midpoints of M equal parts stand for M draws
    quantiles = torch.special.ndtri((torch.arange(100_000) + 0.5) / 100_000).reshape(1, -1, 1).expand(20, -1, -1)
    steps = torch.full((20,), t)
    eps = sdac.bounded_noise(schedule, a_t, steps, quantiles)
    samples = sdac.reverse_sample(schedule, a_t, steps, eps)
    assert samples.abs().max() <= 1 + 1e-9
    _, target = sdac.rssm_target(q(samples)[..., 0], torch.tensor(tau), eps)
    expected = -schedule.noise[t] * box_score(a_t, q, tau, schedule.signal[t], schedule.noise[t])
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-4)


def test_bounded_reverse_samples_stay_in_the_box_in_float32():
    torch.set_default_dtype(torch.float32)
    schedule, t = sdac.Schedule(T), torch.arange(T).repeat_interleave(500)
    a_0 = 2 * torch.rand(len(t), 3) - 1
    a_t = sdac.forward_sample(schedule, a_0, t, 1.5 * torch.randn_like(a_0))
    eps = sdac.bounded_noise(schedule, a_t, t, torch.randn(len(t), 64, 3))
    samples = sdac.reverse_sample(schedule, a_t, t, eps)
    assert torch.isfinite(eps).all()
    assert samples.abs().max() <= 1 + 1e-5


def test_bounded_noise_with_the_box_out_of_sight_is_its_nearer_wall():
    torch.set_default_dtype(torch.float32)
    schedule, t = sdac.Schedule(T), torch.zeros(2, dtype=torch.long)
    a_t = torch.tensor([[1.5], [-1.5]])  # more than 50 standard deviations of reverse sampling outside
    samples = sdac.reverse_sample(schedule, a_t, t, sdac.bounded_noise(schedule, a_t, t, torch.randn(2, 9, 1)))
    torch.testing.assert_close(samples, torch.tensor([1.0, -1.0])[:, None, None].expand(2, 9, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounded_noise_is_the_identity_far_from_the_walls(dtype):
    torch.set_default_dtype(dtype)
    schedule, eps = sdac.Schedule(T), torch.linspace(-6.5, 6.5, 1000)[None, :, None]
    bounded = sdac.bounded_noise(schedule, torch.zeros(1, 1), torch.zeros(1, dtype=torch.long), eps)
    torch.testing.assert_close(bounded, eps, rtol=1e-6, atol=1e-6)


def test_weights_are_a_softmax_and_sum_the_noise():
    q, eps = torch.randn(4, 5), torch.randn(4, 5, 3)
    weights, target = sdac.rssm_target(q, torch.tensor(0.3), eps)
    expected = torch.exp(q / 0.3) / torch.exp(q / 0.3).sum(1, keepdim=True)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(target, sum(expected[:, k, None] * eps[:, k] for k in range(5)))


def test_collapsed_loss_has_the_gradient_of_the_m_pass_loss():
    agent = sdac.SDAC(4, 2, small_args())
    batch = random_batch(sdac)
    noise = agent.draw_update_noise(7, True, torch.device("cpu"))
    a_t, target, _ = agent.rssm(batch, noise)
    collapsed, _ = sdac.gradients(agent.policy_loss, agent.policy, batch, a_t, noise.t, target)
    # the M-pass loss, on the script's own network
    with torch.no_grad():
        a_0 = agent.sample_action(agent.policy, batch.observations, noise.proposal)
        a_t = sdac.forward_sample(agent.schedule, a_0, noise.t, noise.forward)
        samples = sdac.reverse_sample(agent.schedule, a_t, noise.t, noise.reverse).clamp(-1, 1)
        q = torch.stack([sdac.min_q(agent.critics, batch.observations, samples[:, k]) for k in range(5)], 1)
        weights = torch.softmax(q / agent.temperature, 1)
    loss = sum(
        (weights[:, k, None] * (agent.policy(batch.observations, a_t, noise.t) - noise.reverse[:, k]) ** 2).sum()
        for k in range(5)
    )
    literal = torch.autograd.grad(loss / a_t.numel(), list(agent.policy.parameters()))
    for a, b in zip(collapsed, literal, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# Networks against the oracle's concatenated ones


def test_split_first_layers_equal_concatenated_ones():
    agent, batch, t = sdac.SDAC(4, 2, small_args()), random_batch(sdac), torch.tensor([0, 1, 2, 3, 4, 5, 2])
    both = pairs.critics(agent.critics)
    expected = torch.stack([reference.sdac_q(critic, batch.observations, batch.actions) for critic in both])
    torch.testing.assert_close(agent.critics(batch.observations, batch.actions), expected, rtol=1e-9, atol=1e-12)
    assert (expected[0] - expected[1]).abs().min() > 1e-6
    a_t = torch.randn(7, 2)
    expected = reference.sdac_noise_prediction(pairs.sdac_policy(agent.policy), batch.observations, a_t, t.double())
    torch.testing.assert_close(agent.policy(batch.observations, a_t, t), expected, rtol=1e-9, atol=1e-12)
    actions = torch.randn(7, 5, 2)
    wide = agent.critics(batch.observations, actions)
    for k in range(5):
        expected = torch.stack([reference.sdac_q(critic, batch.observations, actions[:, k]) for critic in both])
        torch.testing.assert_close(wide[:, :, k], expected, rtol=1e-9, atol=1e-12)


def test_initial_weights():
    torch.manual_seed(0)
    policy, critics = sdac.DiffusionPolicy(100, 20, 256, 20), sdac.Critics(100, 20, 256)
    first = torch.cat([policy.state.weight, policy.action.weight, policy.time[3].weight]) * math.sqrt(136)
    twins = torch.cat([critics.state.weight, critics.action.weight], 1) * math.sqrt(120)
    for unit in (first, *twins, 16 * critics.trunk[1].weight[0], 16 * critics.trunk[1].weight[1]):
        assert unit.abs().max() <= 2
        # a unit normal cut at +-2 has standard deviation 0.8796
        assert unit.std().item() == pytest.approx(0.8796, abs=0.01)
    assert (twins[0] != twins[1]).all()
    biased = [m for m in [*policy.modules(), *critics.modules()] if getattr(m, "bias", None) is not None]
    assert len(biased) == 10 and all((module.bias == 0).all() for module in biased)


# The agent


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_particles": 1},
        {"target_particles": 1, "temperature": 0.1},
        {"soft_critic": True},
        {"bounded_reverse_sampling": True},
        {"proposal": "replay"},
        {"policy_lr_decay_begin": 1, "policy_lr_decay_end": 3, "lambda_frequency": 2},
    ],
    ids=str,
)
def test_updates_equal_the_oracle(changes):
    """Six updates, on and off the delays of policy (2) and lambda (here 3), from equal weights and noise."""
    agent = sdac.SDAC(4, 2, small_args(**{"lambda_frequency": 3, "tau": 0.1, **changes}))
    scatter(agent.ema_policy, agent.ema_critics)
    oracle = pairs.oracle(agent)
    before = copy.deepcopy(agent.state_dict())
    for step in range(6):
        batch, noise = random_batch(sdac), agent.draw_update_noise(7, step % 2 == 0, torch.device("cpu"))
        agent.update(batch, step, noise)
        oracle.update(batch, step, noise)
        pairs.assert_same(agent, oracle)
    for name, value in agent.state_dict().items():
        assert not torch.equal(value, before[name]), f"{name} never moved"


@pytest.mark.parametrize("explore", [True, False])
def test_acting_equals_the_oracle_with_the_moving_average_policy(explore):
    agent = sdac.SDAC(4, 2, small_args())
    scatter(agent.ema_policy, agent.ema_critics)
    oracle = pairs.oracle(agent)
    observations = torch.randn(9, 4)
    torch.manual_seed(5)
    noise = agent.draw_action_noise(9, 3, torch.device("cpu"))
    torch.manual_seed(5)
    actions = agent.act(observations, explore)
    if not explore:
        noise = noise._replace(exploration=torch.zeros(9, 2))
    expected = oracle.sample_action(oracle.ema_policy, observations, noise)
    torch.testing.assert_close(actions, expected, rtol=1e-9, atol=1e-12)
    assert actions.abs().max() <= 1


def test_drawn_noise_is_standard_normal_at_every_step():
    torch.manual_seed(0)
    noise = sdac.SDAC(4, 2, small_args()).draw_action_noise(2000, 3, torch.device("cpu"))
    pieces = [noise.start, *noise.steps, noise.exploration]
    for i, eps in enumerate(pieces):
        n = eps.numel()
        assert eps.mean().abs() < 5 / n**0.5 and (eps.square().mean() - 1).abs() < 5 * (2 / n) ** 0.5
        assert all((eps.flatten()[:100] != other.flatten()[:100]).all() for other in pieces[:i])


@pytest.mark.parametrize("num_particles", [1, 8])
def test_best_of_n_keeps_the_particle_with_the_largest_min_q(num_particles):
    agent = sdac.SDAC(4, 2, small_args(num_particles=num_particles))
    observations = torch.randn(30, 4)
    noise = agent.draw_action_noise(30, num_particles, torch.device("cpu"))._replace(exploration=torch.zeros(30, 2))
    particles = agent.denoise(agent.policy, observations, noise)
    both = torch.stack(
        [agent.critics(observations, particles[:, n]) for n in range(num_particles)], dim=1
    )  # (2, N, 30)
    q = both.amin(0)
    chosen = agent.sample_action(agent.policy, observations, noise)
    for i in range(30):
        torch.testing.assert_close(chosen[i], particles[i, q[:, i].argmax()])
    if num_particles > 1:  # the two critics and their minimum disagree somewhere, so the test can tell them apart
        assert any((single.argmax(0) != q.argmax(0)).any() for single in both)


@pytest.mark.parametrize("start", [0.05, 5.0])
def test_lambda_converges_to_the_target_entropy_from_both_sides(start):
    args = sdac.Args(lambda_start=start)
    log_lambda = torch.tensor(math.log(start), requires_grad=True)
    optimizer = torch.optim.Adam([log_lambda], lr=0.02)
    d = 3
    for _ in range(1500):
        loss = sdac.lambda_loss(log_lambda, args.noise_scale, d, args.target_entropy_scale * d)
        sdac.descend(optimizer, torch.autograd.grad(loss, [log_lambda]))
    entropy = d / 2 * math.log(2 * math.pi * math.e * (args.noise_scale * math.exp(log_lambda.item())) ** 2)
    assert entropy == pytest.approx(-0.9 * d, abs=1e-3)


def test_exploration_log_prob():
    eps, std = torch.randn(6, 3), torch.tensor(0.37)
    expected = torch.distributions.Normal(0.0, std).log_prob(std * eps).sum(1)
    torch.testing.assert_close(sdac.exploration_log_prob(eps, std), expected)


def test_the_policy_loss_reaches_only_the_policy():
    agent, batch = sdac.SDAC(4, 2, small_args()), random_batch(sdac)
    noise = agent.draw_update_noise(7, True, torch.device("cpu"))
    a_t, target, _ = agent.rssm(batch, noise)
    agent.policy_loss(batch, a_t, noise.t, target)[0].backward()
    assert all(p.grad is None for p in [*agent.critics.parameters(), *agent.ema_policy.parameters(), agent.log_lambda])
    assert all(p.grad is not None for p in agent.policy.parameters())


def test_learning_rate_falls_linearly_over_the_policys_own_steps():
    agent = sdac.SDAC(4, 2, small_args())
    for policy_step, expected in [(0, 3e-4), (25_000, 3e-4), (50_000, 1.65e-4), (75_000, 3e-5), (10**6, 3e-5)]:
        agent.policy_steps.fill_(policy_step)
        assert agent.decayed_policy_lr().item() == pytest.approx(expected)
        assert agent.policy_steps == policy_step + 1
