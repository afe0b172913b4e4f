"""How near the best action M reverse samples bring SDAC's policy, by its noise levels, its box and its denoising noise.

    python tests/benchmarks/levels.py

Nothing is trained. Q = -500 |a - a*|^2 and lambda = 1, so pi is nearly all within 0.1 of a*. A perfectly trained policy
predicts the expectation of sum_k w_k eps_k, equation (9) of sdac.py; here it is averaged over 64 draws. Printed is the
root mean square of a - a* per action dimension, of actions denoised with it: the bias of the softmax over M samples.
With the true score it is 0.01. In the first table a* is uniform in [-0.9, 0.9]^d. In the second, by --reverse-bound and
--denoising-noise, it is so too, or uniform in [-1.5, 1.5]^d and clipped to [-1, 1]^d, or a corner of that box; and
behind the stroke is the best of 16.
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sdac

DRAWS, PARTICLES = 64, 16


def mean_eps(schedule, a_t, t, best, samples, bound):
    """The expectation of sum_k w_k eps_k, (B, d), for a_t and a* (B, d)."""
    a_t, best = a_t.repeat_interleave(DRAWS, dim=0), best.repeat_interleave(DRAWS, dim=0)
    t, shape = torch.full((len(a_t),), t), (len(a_t), samples, a_t.shape[1])
    if bound < math.inf:
        eps = schedule.bounded_noise(a_t, t, torch.rand(shape, dtype=torch.float64), bound)
    else:
        eps = torch.randn(shape)
    q = -500 * (schedule.reverse_samples(a_t, t, eps).clamp(-1, 1) - best[:, None]).square().sum(2)
    return torch.einsum("bm,bmd->bd", q.softmax(1), eps).unflatten(0, (-1, DRAWS)).mean(1)


def errors(schedule, best, samples, bound=1.0, noise=1.0):
    """Mean square of a - a*, (B,), for a* (B, d), with the sampler of `sdac.denoise`."""
    a_t = schedule.start_std * torch.randn_like(best)
    for t in reversed(range(len(schedule.sqrt_abar))):
        eps = mean_eps(schedule, a_t, t, best, samples, bound)
        a_0 = (a_t / schedule.sqrt_abar[t] - schedule.reverse_std[t] * eps).clamp(-1, 1)
        a_t = schedule.mean_a0[t] * a_0 + schedule.mean_at[t] * a_t
        a_t = a_t + noise * schedule.posterior_std[t] * torch.randn_like(a_t)
    return (a_t - best).square().mean(1)


def levels():
    sizes = [(dim, samples) for dim in (6, 17) for samples in (16, 64)]
    print(f"| T, power | reverse std | {' | '.join(f'd = {d}, M = {m}' for d, m in sizes)} |")
    print("| --- | --- |" + " --- |" * len(sizes))
    for steps, power in ((20, 1), (10, 1), (5, 1), (10, 2), (5, 4), (4, 7), (3, 7)):
        schedule = sdac.Schedule(steps, power)
        stds = ", ".join(f"{std:.2g}" for std in schedule.reverse_std[:5].tolist()) + ", ..." * (steps > 5)
        means = [errors(schedule, 1.8 * torch.rand(256, dim) - 0.9, samples).mean() for dim, samples in sizes]
        print(f"| {steps}, {power} | {stds} | {' | '.join(f'{mean.sqrt():.2f}' for mean in means)} |", flush=True)


def boxes():
    widths = {"inside": 0.9, "half": 1.5, "corner": 1e9}
    columns = [(dim, place) for dim in (6, 17) for place in widths]
    print(f"\n| T, power, bound, noise | {' | '.join(f'd = {dim}, {place}' for dim, place in columns)} |")
    print("| --- |" + " --- |" * len(columns))
    clipped = math.inf
    rows = [(5, 1, 1, 1), (5, 1, clipped, 1), (5, 4, 1, 1), (5, 4, 1.25, 1), (5, 4, 1.5, 1), (5, 4, 2, 1)]
    rows += [(5, 4, clipped, 1), (5, 4, 1, 0.5), (5, 4, 2, 0.5), (5, 1, 1, 0), (5, 4, 1, 0), (5, 4, 2, 0)]
    rows += [(5, 4, clipped, 0), (10, 2, 2, 0), (20, 1, 2, 0)]
    for steps, power, bound, noise in rows:
        cells = []
        for dim, place in columns:
            best = ((2 * torch.rand(64, dim) - 1) * widths[place]).clamp(-1, 1).repeat_interleave(PARTICLES, dim=0)
            squares = errors(sdac.Schedule(steps, power), best, 16, bound, noise).unflatten(0, (-1, PARTICLES))
            cells.append(f"{squares.mean().sqrt():.2f} / {squares.min(1).values.mean().sqrt():.2f}")
        print(f"| {steps}, {power}, {bound}, {noise} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    torch.manual_seed(1)
    levels()
    boxes()
