"""How near the best action M reverse samples bring SDAC's policy, for several schedules of noise. Nothing is trained.

    python tests/benchmarks/levels.py

Q = -500 |a - a*|^2 and lambda = 1, so pi is nearly all within 0.1 of a*, which is uniform in [-0.9, 0.9]^d. A perfectly
trained policy predicts the expectation of sum_k w_k eps_k, equation (9) of sdac.py; here it is averaged over 64 draws.
Printed is the root mean square of a - a* per action dimension, over 256 actions denoised with it. It is 0 for the true
score but for pi's own width, 0.03: what remains is the bias of the softmax over M samples.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sdac

ACTIONS, DRAWS = 256, 64


def schedule(steps, power):
    """beta grows as this power of a linear function between the official code's ends; 1 is the official code's."""
    low, high = 1e-4 ** (1 / power), 0.999 ** (1 / power)
    beta = 0.8 * torch.linspace(low, high, steps, dtype=torch.float64) ** power
    abar = torch.cumprod(1 - beta, dim=0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    tables = sdac.Schedule(steps)
    tables.sqrt_abar, tables.reverse_std = abar.sqrt().float(), (1 / abar - 1).sqrt().float()
    tables.mean_a0 = (beta * before.sqrt() / (1 - abar)).float()
    tables.mean_at = ((1 - before) * (1 - beta).sqrt() / (1 - abar)).float()
    tables.posterior_std = (beta * (1 - before) / (1 - abar)).sqrt().float()
    return tables


def mean_eps(tables, a_t, t, best, samples):
    """The expectation of sum_k w_k eps_k, (B, d), for a_t and a* (B, d)."""
    a_t, best = a_t.repeat_interleave(DRAWS, dim=0), best.repeat_interleave(DRAWS, dim=0)
    t = torch.full((len(a_t),), t)
    eps = tables.bounded_noise(a_t, t, torch.rand(len(a_t), samples, a_t.shape[1]))
    q = -500 * (tables.reverse_samples(a_t, t, eps) - best[:, None]).square().sum(2)
    return torch.einsum("bm,bmd->bd", q.softmax(1), eps).unflatten(0, (-1, DRAWS)).mean(1)


def error(tables, dim, samples):
    """Root mean square of a - a*, with the sampler of `sdac.denoise`."""
    best = 1.8 * torch.rand(ACTIONS, dim) - 0.9
    a_t = tables.start_std * torch.randn(ACTIONS, dim)
    for t in reversed(range(len(tables.sqrt_abar))):
        eps = mean_eps(tables, a_t, t, best, samples)
        a_0 = (a_t / tables.sqrt_abar[t] - tables.reverse_std[t] * eps).clamp(-1, 1)
        a_t = tables.mean_a0[t] * a_0 + tables.mean_at[t] * a_t + tables.posterior_std[t] * torch.randn_like(a_t)
    return (a_t - best).square().mean().sqrt().item()


if __name__ == "__main__":
    torch.manual_seed(1)
    sizes = [(dim, samples) for dim in (6, 17) for samples in (16, 64)]
    print(f"| T, power | reverse std | {' | '.join(f'd = {d}, M = {m}' for d, m in sizes)} |")
    print("| --- | --- |" + " --- |" * len(sizes))
    for steps, power in ((20, 1), (10, 1), (5, 1), (10, 2), (5, 4), (4, 5), (3, 20 / 3)):
        tables = schedule(steps, power)
        stds = ", ".join(f"{std:.2g}" for std in tables.reverse_std[:5].tolist()) + ", ..." * (steps > 5)
        errors = " | ".join(f"{error(tables, *size):.2f}" for size in sizes)
        print(f"| {steps}, {power:.3g} | {stds} | {errors} |", flush=True)
