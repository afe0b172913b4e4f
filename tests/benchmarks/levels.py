"""How near the best action M reverse samples bring SDAC's policy, by T and --beta-power. Nothing is trained.

    python tests/benchmarks/levels.py

Q = -500 |a - a*|^2 and lambda = 1, so pi is nearly all within 0.1 of a*, which is uniform in [-0.9, 0.9]^d. A perfectly
trained policy predicts the expectation of sum_k w_k eps_k, equation (9) of sdac.py; here it is averaged over 64 draws.
Printed is the root mean square of a - a* per action dimension, over 256 actions denoised with it. With the true score
it is 0.01: the rest is the bias of the softmax over M samples.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sdac

ACTIONS, DRAWS = 256, 64


def mean_eps(schedule, a_t, t, best, samples):
    """The expectation of sum_k w_k eps_k, (B, d), for a_t and a* (B, d)."""
    a_t, best = a_t.repeat_interleave(DRAWS, dim=0), best.repeat_interleave(DRAWS, dim=0)
    t = torch.full((len(a_t),), t)
    eps = schedule.bounded_noise(a_t, t, torch.rand(len(a_t), samples, a_t.shape[1]))
    q = -500 * (schedule.reverse_samples(a_t, t, eps) - best[:, None]).square().sum(2)
    return torch.einsum("bm,bmd->bd", q.softmax(1), eps).unflatten(0, (-1, DRAWS)).mean(1)


def error(schedule, dim, samples):
    """Root mean square of a - a*, with the sampler of `sdac.denoise`."""
    best = 1.8 * torch.rand(ACTIONS, dim) - 0.9
    a_t = schedule.start_std * torch.randn(ACTIONS, dim)
    for t in reversed(range(len(schedule.sqrt_abar))):
        eps = mean_eps(schedule, a_t, t, best, samples)
        a_0 = (a_t / schedule.sqrt_abar[t] - schedule.reverse_std[t] * eps).clamp(-1, 1)
        a_t = schedule.mean_a0[t] * a_0 + schedule.mean_at[t] * a_t + schedule.posterior_std[t] * torch.randn_like(a_t)
    return (a_t - best).square().mean().sqrt().item()


if __name__ == "__main__":
    torch.manual_seed(1)
    sizes = [(dim, samples) for dim in (6, 17) for samples in (16, 64)]
    print(f"| T, power | reverse std | {' | '.join(f'd = {d}, M = {m}' for d, m in sizes)} |")
    print("| --- | --- |" + " --- |" * len(sizes))
    for steps, power in ((20, 1), (10, 1), (5, 1), (10, 2), (5, 4), (4, 7), (3, 7)):
        schedule = sdac.Schedule(steps, power)
        stds = ", ".join(f"{std:.2g}" for std in schedule.reverse_std[:5].tolist()) + ", ..." * (steps > 5)
        errors = " | ".join(f"{error(schedule, *size):.2f}" for size in sizes)
        print(f"| {steps}, {power} | {stds} | {errors} |", flush=True)
