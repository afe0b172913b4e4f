# SPDX-License-Identifier: MIT
"""Reverse Sampling Score Matching (RSSM) on two-dimensional densities, beside five other methods.

Section 5.1 of Ma, Chen, Wang, Li, Dai: "Efficient Online Reinforcement Learning for Diffusion Policy", ICML 2025,
arXiv 2502.00361: learn to sample a density pi(a) ∝ exp(-E(a)) from its energy E alone. No environment, no critic;
only the loss. All densities live on the box [-1, 1]^2, and a_t = sqrt(abar_t) a_0 + sqrt(1-abar_t) eps noises them.

    rssm      eps_theta(a_t, t) regresses on sum_k w_k eps_k, w = softmax(-E(a_0^k)), over reverse samples
              a_0^k = a_t/sqrt(abar_t) - sqrt(1/abar_t - 1) eps_k, eps_k ~ N(0, I) given that a_0^k is in the box.
              a_t is a noised uniform point of the box: any law with full support has the same minimiser. Energies only.
    dsm       denoising score matching: eps_theta regresses on the eps that noised a *true sample* of pi. A reference,
              not a bound: as many steps as rssm, but on one eps for each a_t instead of a mean of M.
    idem      iterated denoising energy matching (Akhound-Sadegh et al., 2024, arXiv 2402.06121): at x = a + sigma z,
              a from the model and z ~ N(0, I), its score regresses on sum_k w_k (-∇E)(x_k), w = softmax(-E(x_k)),
              over K samples x_k ~ N(x, sigma^2 I). Energies and their gradients.
    langevin  unadjusted Langevin, a <- a - h ∇E(a) + sqrt(2h) z. Gradients.
    fab       flow annealed importance sampling bootstrap (Midgley et al., 2023, arXiv 2208.01893): a RealNVP q
              lowers the alpha = 2 divergence ∫pi^2/q by the loss -sum_k w_k log q(a_k), sum_k w_k = 1; annealed
              importance sampling moves the a_k from q towards pi^2/q and weights them. Energies and gradients.
    qsm       Q-score matching (Psenka et al., 2024, arXiv 2312.11752): the score at every noise level is taken to be
              -∇E at the *noised* point, here a noised uniform one. Gradients. Fitted exactly: mode error 0.23 on gmm.

Departures: rssm's a_0^k lie in the box, officially anywhere; idem clips sigma times its estimate, officially just the
estimate; fab has no replay buffer. idem and fab, tuned for minutes on two cores, not their best, do not know the box.

Metrics, over `--samples` samples of each method; `true`, always the last, is as many true samples:
    kl            KL(P|Q) over 40 x 40 cells of the box; P_c the density's mass, Q_c the samples' (each count + 0.1)
    mode_error    sum_m |share_m - weight_m| / 2, from 0 to 1; share_m of the samples have m as their most probable mode
    energies      evaluations of E while training and sampling; gradients: of ∇E, each counted under energies too
    seconds       wall-clock time of training and sampling
    peak_mb       growth of the process's peak memory, MiB on Linux: 0 for a method that stays below an earlier peak

Usage:
    python toy_rssm.py
    python toy_rssm.py --target moons --methods rssm dsm idem langevin fab
    python toy_rssm.py --target rings --methods rssm dsm --seed 2
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "tyro==1.0.17", "pydantic==2.14.3", "matplotlib==3.11.2"]
# ///
from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import tyro
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

Count = Annotated[int, Field(ge=1)]
Method = Literal["rssm", "dsm", "idem", "langevin", "fab", "qsm"]


@dataclass(config={"extra": "forbid"})
class Args:
    target: Literal["gmm", "moons", "rings"] = "gmm"  # density to sample
    methods: Annotated[tuple[Method, ...], Field(min_length=1)] = ("rssm",)  # methods to compare
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1  # seed of everything random
    samples: Count = 50_000  # samples drawn from each method for the metrics
    iterations: Count = 2500  # gradient steps of rssm, dsm and qsm
    batch_size: Count = 256  # noised points per gradient step of rssm, dsm and qsm
    num_reverse_samples: Count = 256  # M, reverse samples per noised point in rssm
    diffusion_steps: Annotated[int, Field(ge=2)] = 100  # denoising steps T, of idem too
    hidden_size: Count = 128  # width of the three hidden layers of the score networks


SHOWN_NOISE = 0.16  # standard deviation of the noise, sqrt(1/abar_t - 1), at which the pictures show scores


# Densities ------------------------------------------------------------------------------------------


class Target:
    """A density pi(a) = sum_m weight_m pi_m(a), m its modes, all but 1e-4 of it in the box, and its energy E = -log pi.

    Subclasses give `component_log_probs`, log(weight_m pi_m(a)), (..., 2) -> (..., modes), and `sample`. Counts its
    energy and gradient evaluations in `energies` and `gradients`.
    """

    def __init__(self, weights: Tensor):
        self.weights = weights / weights.sum()
        self.energies = self.gradients = 0

    def log_prob(self, a: Tensor) -> Tensor:
        """(..., 2) -> (...)."""
        return torch.logsumexp(self.component_log_probs(a), dim=-1)

    def energy(self, a: Tensor) -> Tensor:
        """E(a): (..., 2) -> (...)."""
        self.energies += a[..., 0].numel()
        return -self.log_prob(a)

    def energy_gradient(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """E(a) and ∇E(a): (..., 2) -> (...), (..., 2)."""
        self.gradients += a[..., 0].numel()
        with torch.enable_grad():
            a = a.detach().requires_grad_(True)
            energy = self.energy(a)
            (gradient,) = torch.autograd.grad(energy.sum(), a)
        return energy.detach(), gradient

    def mode(self, a: Tensor) -> Tensor:
        """The mode each of (n, 2) points most probably belongs to, (n,)."""
        return self.component_log_probs(a).argmax(1)


class Gaussians(Target):
    """Isotropic Gaussians with means (m, 2) and standard deviations (m,)."""

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor):
        super().__init__(weights)
        self.means, self.stds = means, stds

    def component_log_probs(self, a: Tensor) -> Tensor:
        # |a - mean|^2 as one matrix product instead of a difference for every pair
        square = (a**2).sum(-1, keepdim=True) - 2 * a @ self.means.T + (self.means**2).sum(1)
        return self.weights.log() - square / (2 * self.stds**2) - torch.log(2 * math.pi * self.stds**2)

    def sample(self, n: int) -> Tensor:
        m = torch.multinomial(self.weights, n, replacement=True)
        return self.means[m] + self.stds[m, None] * torch.randn(n, 2)


class Arcs(Target):
    """Rings and crescents: around center_m (m, 2) the radius is N(radius_m, std^2), and the angle has the von Mises
    density exp(kappa cos(angle - direction_m)) / (2 pi I_0(kappa)), uniform for kappa = 0."""

    def __init__(self, centers: Tensor, radii: Tensor, std: float, directions: Tensor, kappa: float, weights: Tensor):
        super().__init__(weights)
        self.centers, self.radii, self.std, self.directions, self.kappa = centers, radii, std, directions, kappa

    def component_log_probs(self, a: Tensor) -> Tensor:
        x, y = (a[..., i, None] - self.centers[:, i] for i in range(2))
        r = (x**2 + y**2).clamp(min=1e-6).sqrt()
        log_radius = -((r - self.radii) ** 2) / (2 * self.std**2) - math.log(self.std * math.sqrt(2 * math.pi))
        cosine = (x * self.directions.cos() + y * self.directions.sin()) / r
        log_i0 = torch.special.i0(torch.tensor(self.kappa)).log()
        return self.weights.log() + log_radius + self.kappa * cosine - log_i0 - torch.log(2 * math.pi * r)

    def sample(self, n: int) -> Tensor:
        m = torch.multinomial(self.weights, n, replacement=True)
        # a von Mises distribution of concentration 0 is not allowed; 1e-6 is as good as uniform
        angle = torch.distributions.VonMises(self.directions[m], max(self.kappa, 1e-6)).sample()
        r = self.radii[m] + self.std * torch.randn(n)
        return self.centers[m] + torch.stack([r * angle.cos(), r * angle.sin()], dim=1)


def make_target(name: str) -> Target:
    if name == "gmm":  # unequal weights, gaps of about ten standard deviations
        means = torch.tensor([[-0.65, -0.6], [0.6, -0.65], [-0.55, 0.6], [0.65, 0.55], [0.0, 0.05]])
        weights = torch.tensor([0.35, 0.1, 0.2, 0.05, 0.3])
        return Gaussians(means, torch.tensor([0.08, 0.06, 0.1, 0.06, 0.07]), weights)
    if name == "moons":
        centers, up_and_down = torch.tensor([[-0.25, -0.1], [0.25, 0.1]]), torch.tensor([0.5, -0.5]) * math.pi
        return Arcs(centers, torch.full((2,), 0.5), 0.06, up_and_down, 3.0, torch.tensor([0.7, 0.3]))
    radii = torch.tensor([0.25, 0.5, 0.8])  # rings
    return Arcs(torch.zeros(3, 2), radii, 0.04, torch.zeros(3), 0.0, torch.tensor([0.15, 0.25, 0.6]))


# Diffusion: rssm, dsm, qsm, and the true samples ----------------------------------------------------


class Schedule:
    """Noise schedule whose standard deviation of reverse sampling, sqrt(1/abar_t - 1), is geometric from 0.01 to 10,
    t = 0..T-1; the clean a_0 comes before t = 0. Tables (T,): sqrt_abar, sqrt_1m_abar, reverse_std, and those of the
    DDPM posterior of the point before a_t, N(mean_a0 a_0 + mean_at a_t, std^2 I)."""

    def __init__(self, steps: int):
        reverse_std = torch.logspace(-2, 1, steps, dtype=torch.float64)
        abar = 1 / (1 + reverse_std**2)
        one_minus_abar = reverse_std**2 * abar
        abar_before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        one_minus_before = torch.cat([torch.zeros(1, dtype=torch.float64), one_minus_abar[:-1]])
        beta = (one_minus_abar - one_minus_before) / abar_before  # 1 - abar_t / abar_{t-1}
        self.sqrt_abar, self.sqrt_1m_abar = abar.sqrt().float(), one_minus_abar.sqrt().float()
        self.reverse_std = reverse_std.float()
        self.mean_a0 = (beta * abar_before.sqrt() / one_minus_abar).float()
        self.mean_at = (one_minus_before * (abar / abar_before).sqrt() / one_minus_abar).float()
        self.std = (beta * one_minus_before / one_minus_abar).sqrt().float()

    def noised(self, a_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """a_t (n, 2) for a_0 and eps (n, 2) and t (n,)."""
        return self.sqrt_abar[t, None] * a_0 + self.sqrt_1m_abar[t, None] * eps


class ScoreNetwork(nn.Module):
    """Points (n, 2) and noise levels (n, 1) in [0, 1] to the noise, or minus it in iDEM, (n, 2)."""

    def __init__(self, hidden: int):
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(4))
        sizes = (3 * 9, hidden), (hidden, hidden), (hidden, hidden)  # three inputs, each with four sines and cosines
        layers = (layer for size in sizes for layer in (nn.Linear(*size), nn.SiLU()))
        self.net = nn.Sequential(*layers, nn.Linear(hidden, 2))

    def forward(self, a: Tensor, level: Tensor) -> Tensor:
        x = torch.cat([a, level], dim=1)
        angles = (x[:, :, None] * self.frequencies).flatten(1)
        return self.net(torch.cat([x, angles.sin(), angles.cos()], dim=1))


def bounded_noise(mean: Tensor, std: Tensor, u: Tensor) -> Tensor:
    """Noise (n, M, 2) drawn from N(0, I) given that mean - std * noise is in the box, by inversion from uniform u of
    that shape, in float64; mean (n, 1, 2), std (n, 1, 1)."""
    low, high = (mean - 1) / std, (mean + 1) / std
    # Float64 keeps enough digits of Phi near 1: as a_t is noised from a point of the box, low stays below 6.
    below, above = torch.special.ndtr(low.double()), torch.special.ndtr(high.double())
    return torch.special.ndtri(below + u * (above - below)).to(mean.dtype).clamp(low, high)


def rssm_target(energy: Callable, schedule: Schedule, a_t: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """Regression target of RSSM (n, 2) for a_t (n, 2), t (n,) and uniform u (n, M, 2): sum_k w_k eps_k, an estimate of
    E[eps|a_t] = -sqrt(1-abar_t) ∇log p_t(a_t), which dsm learns too. By Bayes' rule p(a_0|a_t) ∝ exp(-E(a_0))
    N(a_0; a_t/sqrt(abar_t), (1/abar_t - 1) I): the a_0^k are drawn from that normal, cut to the box, and weighted by
    w = softmax(-E(a_0^k)). The bias is of order 1/M where many w_k count, else larger."""
    mean, std = (a_t / schedule.sqrt_abar[t, None])[:, None], schedule.reverse_std[t, None, None]
    eps = bounded_noise(mean, std, u)
    weights = torch.softmax(-energy(mean - std * eps), dim=1)
    return (weights[..., None] * eps).sum(1)


@torch.no_grad()
def denoise(network: ScoreNetwork, schedule: Schedule, n: int) -> Tensor:
    """(n, 2) samples by DDPM from N(0, I), the predicted a_0 clipped to the box. With exact predictions of the noise
    this has a mode error of 0.014 on gmm."""
    steps, a = len(schedule.std), torch.randn(n, 2)
    for t in reversed(range(steps)):
        eps = network(a, torch.full((n, 1), (t + 1) / steps))
        a_0 = (a / schedule.sqrt_abar[t] - schedule.reverse_std[t] * eps).clamp(-1, 1)
        a = schedule.mean_a0[t] * a_0 + schedule.mean_at[t] * a + schedule.std[t] * torch.randn(n, 2)
    return a


def train_score(args: Args, draw: Callable) -> tuple[Tensor, Callable]:
    """Fit eps_theta to draw(schedule, t) -> a_t and regression target, both (batch, 2). Returns samples, and the score
    at the noise level nearest SHOWN_NOISE as a function (n, 2) -> (n, 2)."""
    network, schedule, steps = ScoreNetwork(args.hidden_size), Schedule(args.diffusion_steps), args.diffusion_steps
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.iterations)
    for _ in range(args.iterations):
        t = torch.randint(steps, (args.batch_size,))
        a_t, regression_target = draw(schedule, t)
        loss = F.mse_loss(network(a_t, (t[:, None] + 1) / steps), regression_target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    shown = int((schedule.reverse_std - SHOWN_NOISE).abs().argmin())

    def score(a: Tensor, t: int = shown) -> Tensor:  # of a_t / sqrt_abar = a_0 + reverse_std eps
        return -network(schedule.sqrt_abar[t] * a, torch.full((len(a), 1), (t + 1) / steps)) / schedule.reverse_std[t]

    chunks = torch.arange(args.samples).split(10_000)
    return torch.cat([denoise(network, schedule, len(chunk)) for chunk in chunks]), score


def run_rssm(target: Target, args: Args) -> tuple[Tensor, Callable]:
    def draw(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
        a_t = schedule.noised(2 * torch.rand(len(t), 2) - 1, t, torch.randn(len(t), 2))
        u = torch.rand(len(t), args.num_reverse_samples, 2, dtype=torch.float64)  # float32: some 0, a_0 at 1
        return a_t, rssm_target(target.energy, schedule, a_t, t, u)

    return train_score(args, draw)


def run_dsm(target: Target, args: Args) -> tuple[Tensor, Callable]:
    def draw(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
        eps = torch.randn(len(t), 2)
        return schedule.noised(target.sample(len(t)), t, eps), eps

    return train_score(args, draw)


def run_true(target: Target, args: Args) -> tuple[Tensor, Callable]:
    """True samples, and the score of their density after noise N(0, SHOWN_NOISE^2 I): that of a Gaussian mixture."""
    samples, v = target.sample(args.samples), SHOWN_NOISE**2
    return samples, lambda a: (torch.softmax(-(torch.cdist(a, samples) ** 2) / (2 * v), 1) @ samples - a) / v


def run_qsm(target: Target, args: Args) -> tuple[Tensor, Callable]:
    def draw(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
        a_t = schedule.noised(2 * torch.rand(len(t), 2) - 1, t, torch.randn(len(t), 2))
        return a_t, schedule.sqrt_1m_abar[t, None] * target.energy_gradient(a_t)[1]  # eps = -sqrt_1m_abar score

    return train_score(args, draw)


# iDEM -----------------------------------------------------------------------------------------------


def idem_score(energy_gradient: Callable, x: Tensor, sigma: Tensor, z: Tensor) -> Tensor:
    """Estimate sum_k w_k (-∇E)(x + sigma z_k), (n, 2), of the score of pi convolved with N(0, sigma^2 I), biased as
    rssm_target is: x (n, 2), sigma (n, 1), z (n, K, 2) standard normal."""
    energy, gradient = energy_gradient(x[:, None] + sigma[:, None] * z)
    return -(torch.softmax(-energy, dim=1)[..., None] * gradient).sum(1)


def run_idem(
    target: Target, args: Args, outer=30, inner=100, k=500, batch=128, clip=10.0, sigma_min=0.02, sigma_max=1.0
) -> tuple[Tensor, Callable]:
    """Outer loop: sample the model into a buffer. Inner loop: regress at noised points of that buffer."""
    network = ScoreNetwork(args.hidden_size)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, outer * inner)

    def sigma_at(level: Tensor) -> Tensor:
        return sigma_min * (sigma_max / sigma_min) ** level

    def score(x: Tensor, level: Tensor) -> Tensor:
        return network(x / (1 + sigma_at(level) ** 2).sqrt(), level) / sigma_at(level)

    @torch.no_grad()
    def sample(n: int) -> Tensor:
        """Reverse diffusion from N(0, sigma_max^2 I), as in the official code, then a denoising step. The noised pi is
        wider and off-centre: on gmm this alone makes a mode error of 0.046, even with an exact score."""
        x, levels = sigma_max * torch.randn(n, 2), torch.linspace(1, 0, args.diffusion_steps + 1)
        for i in range(args.diffusion_steps):
            drop = sigma_at(levels[i]) ** 2 - sigma_at(levels[i + 1]) ** 2
            x = x + drop * score(x, levels[i].expand(n, 1)) + drop.sqrt() * torch.randn(n, 2)
        return x + sigma_min**2 * score(x, torch.zeros(n, 1))

    buffer = torch.empty(0, 2)
    for _ in range(outer):
        buffer = torch.cat([buffer, sample(1000)])[-10_000:]
        for _ in range(inner):
            level = torch.rand(batch, 1)
            sigma = sigma_at(level)
            x = buffer[torch.randint(len(buffer), (batch,))] + sigma * torch.randn(batch, 2)
            # sigma times a score is of order 1 at all noise levels; where no sample hits a mode, estimates explode
            estimate = sigma * idem_score(target.energy_gradient, x, sigma, torch.randn(batch, k, 2))
            estimate = estimate * (clip / estimate.norm(dim=1, keepdim=True)).clamp(max=1)
            loss = F.mse_loss(sigma * score(x, level), estimate)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    level = math.log(SHOWN_NOISE / sigma_min) / math.log(sigma_max / sigma_min)
    samples = torch.cat([sample(len(chunk)) for chunk in torch.arange(args.samples).split(10_000)])
    return samples, lambda a: score(a, torch.full((len(a), 1), level))


# Langevin -------------------------------------------------------------------------------------------


def langevin(energy_gradient: Callable, a: Tensor, step: float, n: int) -> Tensor:
    """n steps of a <- a - step ∇E(a) + sqrt(2 step) z from a (chains, 2); the stationary law is off by order step."""
    for _ in range(n):
        a = a - step * energy_gradient(a)[1] + math.sqrt(2 * step) * torch.randn_like(a)
    return a


def run_langevin(target: Target, args: Args, step=2e-4, n=1000) -> tuple[Tensor, None]:
    """One chain per sample, from uniform points, which on gmm fixes the modes' shares: chains do not cross the gaps."""
    starts = (2 * torch.rand(args.samples, 2) - 1).split(10_000)
    return torch.cat([langevin(target.energy_gradient, a, step, n) for a in starts]), None


# FAB ------------------------------------------------------------------------------------------------


class RealNVP(nn.Module):
    """Affine coupling layers that turn z ~ N(0, 0.5^2 I) into a; each changes one coordinate, given the other."""

    def __init__(self, layers: int = 10, hidden: int = 64):
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(1, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 2))
            for _ in range(layers)
        )
        for net in self.nets:  # start as the identity
            nn.init.zeros_(net[-1].weight)
            nn.init.zeros_(net[-1].bias)

    def scale_and_shift(self, net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = net(x).split(1, dim=1)
        return 2 * torch.tanh(log_scale / 2), shift

    def sample(self, n: int) -> Tensor:
        parts = list((0.5 * torch.randn(n, 2)).split(1, dim=1))
        for i, net in enumerate(self.nets):
            log_scale, shift = self.scale_and_shift(net, parts[i % 2])
            parts[1 - i % 2] = parts[1 - i % 2] * log_scale.exp() + shift
        return torch.cat(parts, dim=1)

    def log_prob(self, a: Tensor) -> Tensor:
        """log q of points (n, 2), (n,), by the change of variables."""
        parts, log_det = list(a.split(1, dim=1)), 0.0
        for i, net in reversed(list(enumerate(self.nets))):
            log_scale, shift = self.scale_and_shift(net, parts[i % 2])
            parts[1 - i % 2] = (parts[1 - i % 2] - shift) * (-log_scale).exp()
            log_det = log_det - log_scale[:, 0]
        z = torch.cat(parts, dim=1)
        return -2 * (z**2).sum(1) - math.log(2 * math.pi * 0.25) + log_det


class Densities(NamedTuple):
    log_q: Tensor  # (n,)
    grad_log_q: Tensor  # (n, 2)
    log_f: Tensor  # f is what the annealing leads to, not normalised
    grad_log_f: Tensor


@torch.no_grad()
def annealed_importance_sampling(a: Tensor, densities: Callable, betas: list[float], step: float, leapfrogs: int = 2):
    """Move samples a (n, 2) of q towards f: Hamiltonian Monte Carlo on q^{1-beta} f^beta, at each of `betas` but the
    last, which is 1. `densities(a)` gives their `Densities`.

    Returns the moved samples, log w (n,), where w estimates ∫f without bias, and the mean acceptance rate.
    """

    def annealed(state: Densities, beta: float) -> tuple[Tensor, Tensor]:
        """Log-density and its gradient."""
        return (1 - beta) * state.log_q + beta * state.log_f, (1 - beta) * state.grad_log_q + beta * state.grad_log_f

    state, log_w, accepted, before = densities(a), torch.zeros(len(a)), [], 0.0
    for beta in betas:
        log_w, before = log_w + (beta - before) * (state.log_f - state.log_q), beta
        if beta == 1:
            break
        momentum = torch.randn_like(a)
        new_a, new_state, p = a, state, momentum
        for _ in range(leapfrogs):
            p = p + step / 2 * annealed(new_state, beta)[1]
            new_a = new_a + step * p
            new_state = densities(new_a)
            p = p + step / 2 * annealed(new_state, beta)[1]
        log_ratio = annealed(new_state, beta)[0] - annealed(state, beta)[0] + (momentum**2 - p**2).sum(1) / 2
        accept = torch.rand(len(a)).log() < log_ratio
        a = torch.where(accept[:, None], new_a, a)
        mask = accept, accept[:, None], accept, accept[:, None]
        state = Densities(*(torch.where(m, new, old) for m, new, old in zip(mask, new_state, state)))
        accepted.append(accept.float().mean().item())
    return a, log_w, sum(accepted) / max(len(accepted), 1)


def run_fab(target: Target, args: Args, iterations=1200, batch=512, intermediate=2) -> tuple[Tensor, Callable]:
    flow = RealNVP()
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    betas, step = [i / (intermediate + 1) for i in range(1, intermediate + 2)], 0.03

    def log_q_and_score(a: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            a = a.detach().requires_grad_(True)
            log_q = flow.log_prob(a)
            return log_q.detach(), torch.autograd.grad(log_q.sum(), a)[0]

    def densities(a: Tensor) -> Densities:
        """q and pi^2 / q, whose integral is the alpha = 2 divergence."""
        (log_q, grad_log_q), (energy, gradient) = log_q_and_score(a), target.energy_gradient(a)
        return Densities(log_q, grad_log_q, -2 * energy - log_q, -2 * gradient - grad_log_q)

    for _ in range(iterations):
        with torch.no_grad():
            a = flow.sample(batch)
        a, log_w, acceptance = annealed_importance_sampling(a, densities, betas, step)
        step *= 1.05 if acceptance > 0.65 else 1 / 1.05
        loss = -(torch.softmax(log_w, dim=0) * flow.log_prob(a)).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        optimizer.step()
        decay.step()
    with torch.no_grad():
        return flow.sample(args.samples), lambda a: log_q_and_score(a)[1]


# Methods, metrics, picture, program -----------------------------------------------------------------


class Sampler(NamedTuple):
    name: str  # in pictures
    caption: str  # of its score field
    run: Callable  # run(target, args) gives samples and score


NOISED_SCORE = f"score at noise {SHOWN_NOISE}"
METHODS = {
    "rssm": Sampler("RSSM", NOISED_SCORE, run_rssm),
    "dsm": Sampler("DSM (true samples)", NOISED_SCORE, run_dsm),
    "idem": Sampler("iDEM", NOISED_SCORE, run_idem),
    "langevin": Sampler("Langevin", "no learned score", run_langevin),
    "fab": Sampler("FAB", "score of the flow", run_fab),
    "qsm": Sampler("QSM", NOISED_SCORE, run_qsm),
    "true": Sampler("True samples", NOISED_SCORE, run_true),
}


def cell_masses(log_prob, cells: int = 40, per_side: int = 10) -> Tensor:
    """Mass of a density in each cell of the box, (cells, cells), normalised; by per_side^2 midpoints each."""
    x = (torch.arange(cells * per_side) + 0.5) / (cells * per_side) * 2 - 1
    points = torch.stack(torch.meshgrid(x, x, indexing="ij"), dim=-1)
    density = torch.stack([log_prob(row).double().exp() for row in points])
    mass = density.reshape(cells, per_side, cells, per_side).sum((1, 3))
    return mass / mass.sum()


def grid_kl(masses: Tensor, samples: Tensor, pseudo_count: float = 0.1) -> float:
    """KL(P|Q) of cell masses P against the histogram Q of samples (n, 2); those outside [-1, 1)^2 are in no cell."""
    cells = len(masses)
    index = ((samples + 1) / 2 * cells).floor().long()
    index = index[((index >= 0) & (index < cells)).all(1)]
    counts = torch.bincount(index[:, 0] * cells + index[:, 1], minlength=cells**2).reshape(cells, cells).double()
    q = (counts + pseudo_count) / (len(samples) + pseudo_count * cells**2)
    p = masses[masses > 0]
    return (p * (p / q[masses > 0]).log()).sum().item()


def mode_error(target: Target, samples: Tensor) -> float:
    """Total variation between the shares of samples in each mode and the modes' weights, 0 to 1."""
    share = torch.bincount(target.mode(samples), minlength=len(target.weights)) / len(samples)
    return (share - target.weights).abs().sum().item() / 2


def draw_picture(path: Path, target: Target, name: str, results: dict) -> None:
    """A column per method: samples over the density's contours; below them, the score field where there is one."""
    fig, axes = plt.subplots(2, len(results), figsize=(3.3 * len(results), 6.8), layout="constrained")
    x = torch.linspace(-1.15, 1.15, 161)
    points = torch.stack(torch.meshgrid(x, x, indexing="xy"), dim=-1)
    density = torch.stack([target.log_prob(row) for row in points]).exp()
    levels = density.max() * torch.tensor([0.01, 0.1, 0.3, 0.6])
    for (method, (samples, score, row)), (top, bottom) in zip(results.items(), axes.T):
        for axis in (top, bottom):
            axis.contour(x, x, density, levels=levels, colors="tab:gray", linewidths=0.6)
            axis.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
        top.scatter(*samples[:4000].T, s=1.5, alpha=0.35, color="tab:blue", linewidths=0, rasterized=True)
        top.set_title(f"{METHODS[method].name}: KL {row['kl']:.3f}", fontsize=11)
        bottom.set_title(METHODS[method].caption, fontsize=9)
        if score is not None:
            coarse = torch.linspace(-1.05, 1.05, 22)
            where = torch.stack(torch.meshgrid(coarse, coarse, indexing="xy"), dim=-1).reshape(-1, 2)
            field = score(where).detach()
            size = field.norm(dim=1, keepdim=True)
            arrows = field / size.clamp(min=1e-9) * (size / size.quantile(0.9)).clamp(max=1).sqrt()
            bottom.quiver(*where.T, *arrows.T, size[:, 0].log10(), cmap="viridis", scale=22, width=0.004, headwidth=4)
    fig.suptitle(f"Sampling '{name}': true density as contours, arrows coloured by log10 |score|", fontsize=11)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main() -> None:
    args = tyro.cli(Args)
    folder = Path("runs", f"toy_{args.target}__{args.seed}__{time.time_ns()}")
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(vars(args), indent=2))
    masses, results = cell_masses(make_target(args.target).log_prob), {}

    def peak_mb() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    for method in dict.fromkeys([*args.methods, "true"]):
        print(f"{method} ...", flush=True)
        torch.manual_seed(args.seed)
        target, start, memory = make_target(args.target), time.time(), peak_mb()
        samples, score = METHODS[method].run(target, args)
        seconds, memory = time.time() - start, peak_mb() - memory
        row = {"method": method, "kl": grid_kl(masses, samples), "mode_error": mode_error(target, samples)}
        row |= {"energies": target.energies, "gradients": target.gradients}
        row |= {"seconds": round(seconds, 1), "peak_mb": round(memory)}
        results[method] = samples, score, row
    rows = [row for _, _, row in results.values()]
    table = [rows[0].keys(), *(row.values() for row in rows)]
    (folder / "metrics.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in table))
    draw_picture(folder / "picture.png", target, args.target, results)

    print(f"\n{'method':<10}{'kl':>8}{'mode error':>12}{'energies':>14}{'gradients':>13}{'seconds':>9}{'peak MiB':>9}")
    for method, kl, error, energies, gradients, seconds, mb in (row.values() for row in rows):
        print(f"{method:<10}{kl:>8.4f}{error:>12.4f}{energies:>14,}{gradients:>13,}{seconds:>9}{mb:>9}")
    print(f"\ntable: {folder}/metrics.csv\npicture: {folder}/picture.png")


if __name__ == "__main__":
    main()
