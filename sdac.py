# SPDX-License-Identifier: MIT
"""Soft Diffusion Actor-Critic (SDAC): online reinforcement learning of a diffusion policy.

Ma, Chen, Wang, Li, Dai: "Efficient Online Reinforcement Learning for Diffusion Policy", ICML 2025, arXiv 2502.00361.
The policy is a diffusion model whose score is trained by Reverse Sampling Score Matching (RSSM), which needs only
values of Q: neither samples of the desired policy nor gradients of Q.

The desired policy is pi(a|s) = exp(Q(s,a)/lambda)/Z(s) for a in the box [-2, 2]^d, with Q evaluated at a clipped to
[-1, 1]^d. Without a box Z would be infinite; the box is wider than the actions' [-1, 1]^d so that the weighted mean in
(9) can reach 1. The temperature lambda falls on a fixed curve. Noising a_0 to a_t, t = 1..T, with abar_t falling:

    q_{t|0}(a_t|a_0) = N(a_t; sqrt(abar_t) a_0, (1-abar_t) I)               forward kernel          (1)
    p_t(a_t|s) = ∫ pi(a_0|s) q_{t|0}(a_t|a_0) da_0                          noised policy           (2)

and the diffusion model needs the score ∇ log p_t. Denoising score matching would fit it to ∇ log q_{t|0} at samples
from pi, which we do not have. Read the same Gaussian formula as a density of a_0:

    qtilde_{0|t}(a_0|a_t) = N(a_0; a_t/sqrt(abar_t), (1-abar_t)/abar_t I)   reverse sampling        (3)
    q_{t|0}(a_t|a_0) = abar_t^{-d/2} qtilde_{0|t}(a_0|a_t)   for every pair                         (4)
    ∇_{a_t} log q_{t|0} = -(a_t - sqrt(abar_t) a_0)/(1-abar_t)                                      (5)

qtilde is not the posterior of a_0. Draw a_t from any proposal ptilde_t(a_t|s) with full support, a_0 from qtilde, and
weight the pair by exp(Q(s,a_0)/lambda), or by 0 where a_0 is outside the box:

    L = E_{s,t} E_{a_t~ptilde_t} E_{a_0~qtilde} exp(Q(s,a_0)/lambda) |s_theta(s,a_t,t) - ∇ log q_{t|0}|^2   (6)

This weight is Z(s) pi(a_0|s), so by (4) L is denoising score matching with every (s, a_t, t) weighted by
ptilde_t(a_t|s) Z(s) abar_t^{d/2} > 0 instead of 1. A positive weight that does not depend on a_0 leaves the minimiser
s_theta = ∇ log p_t(.|s) unchanged, since s_theta can be chosen independently at each (s, a_t, t): any proposal will
do. Drawing a_0 from qtilde truncated to the box, in place of the weight 0, only adds one more such weight: 1 over its
probability of the box. With the predicted noise eps_theta = -sqrt(1-abar_t) s_theta, and M reverse samples a_0^k,

    a_0^k = a_t/sqrt(abar_t) - sqrt(1/abar_t - 1) eps_k,   eps_k ~ N(0, I) with a_0^k in the box    (7)
    w_k = softmax_k(Q(s,a_0^k)/lambda)                                                              (8)
    L' = E sum_k w_k |eps_theta(s,a_t,t) - eps_k|^2 = E |eps_theta(s,a_t,t) - sum_k w_k eps_k|^2 + const     (9)

since (5) is -eps_k/sqrt(1-abar_t) at a_0^k, and the w_k add up to 1: one pass of eps_theta serves all M. The factor
1/(1-abar_t) that (9) drops is a weight without a_0 too, and so is, for large M, the denominator of (8): M times a
function of (s, a_t, t). For finite M it biases (9) towards equal w_k: by order 1/M where many count, else more.

The algorithm, with two critics Q_j, moving averages Qbar_j of them and one of the policy, T = 5, N = M = 16:
     1  repeat
     2      act in 5 environments: denoise N particles with the averaged policy, keep the one with the largest
            min_j Q_j(s,a), add N(0, std^2 I), std = 10 lambda, clip to [-1, 1]; each returns r, s' and done
     3      store each (s, a, s', r, done), the first 30,000 with uniform a; from then on, lines 4 to 13 on a batch:
     4      targets: y = 0.2 r + gamma (1-done) min_j Qbar_j(s',a'), a' one particle of the online policy, noisy as in 2
     5      every second update
     6          proposal: a_0 = a from the buffer, t uniform in 1..T, and a_t by (1)
     7          reverse sampling: M actions by (7), weighted with min_j Q_j by (8)
     8          policy: one step of Adam on (9), with a learning rate that falls from 3e-4 to 3e-5
     9      critics: one step of Adam on sum_j E (Q_j(s,a) - y)^2
    10      every 250th update
    11          lambda: one step of Adam on (H - Hbar) log lambda, Hbar = -0.9 d, without gradient through H, the
                exploration noise's entropy, a function of lambda: std falls from 0.5 to 0.1 in 125,000 updates
    12      every second update
    13          averages: of the policy, and Qbar of Q, with step size 0.01

Usage:
    python sdac.py --env-id Humanoid-v4
    python sdac.py --resume runs/RUN_FOLDER
    python sdac.py --evaluate runs/RUN_FOLDER --eval-episodes 10

Where this file differs from the paper's official code (JAX, mahaitongdae/diffusion_policy_online_rl at a50cf41):
- In flags, the official defaults are `--temperature 1 --target-particles 32 --num-particles 32
  --num-reverse-samples 64 --proposal policy --no-bounded-reverse-sampling --diffusion-steps 20 --beta-power 1
  --denoising-noise 1 --tau 0.005`, which take 30 to 37 times the arithmetic. Here:
  - lambda starts at 0.05, which makes the policy greedy enough without the best of 32 particles in the target;
  - N = 16, M = 16 and T = 5 take less arithmetic; the betas grow as a fourth power, so more levels have little noise;
  - the proposal takes the buffer's actions: any proposal will do, and the policy's would have to be sampled;
  - reverse samples lie in the box, officially anywhere; tau = 0.01 every second update is SAC's 0.005 every update;
  - denoising adds no noise: later steps would have to take it out again, for which the score learnt from M = 16 samples
    is too small (the bias below (9)); and pi, clipped, is nearly a point, so that little spread is lost.
- Actions are clipped to [-1, 1] after the exploration noise, in acting, in the target and in the policy's proposals;
  the official code does not, and MuJoCo's tasks then clip the motors' input, but not the action in the control cost.
- The same, but easily missed: best-of-N in line 2, which the paper's first version omits; the averaged policy acts, and
  the online one takes the action in the targets; denoising from N(0, 0.5^2 I), not N(0, I).
- `--soft-critic` adds lambda times the entropy of the exploration noise to the target, which the official code leaves
  out: on average the same number at every state, so a bonus or penalty per step of staying alive.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium[mujoco]==1.4.0", "mujoco==3.14.0", "tyro==1.0.17",
#     "pydantic==2.14.3", "tensorboard==2.21.0", "tqdm==4.70.1", "wandb==0.31.0", "moviepy==2.2.1"]
# ///
from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.wrappers import DtypeObservation, FlattenObservation, RecordVideo, RescaleAction
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(config={"extra": "forbid"})
class Args:
    exp_name: Annotated[str, Field(pattern="^[^/]+$")] = "sdac"  # name of the experiment, part of the run folder's name
    env_id: str = "Humanoid-v4"  # gymnasium id; `module:id` imports the module first
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1  # seed of PyTorch and of the environments
    device: Literal["auto", "cpu", "cuda"] = "auto"  # device of the networks; auto uses CUDA if available
    compile: bool = True  # use torch.compile, which needs a C++ compiler, or Triton on CUDA
    total_timesteps: Count = 1_000_000  # environment steps of the whole run, summed over the environments
    num_envs: Count = 5  # parallel environments
    updates_per_step: Count = 1  # updates after each step of all environments together
    learning_starts: Annotated[int, Field(ge=0)] = 30_000  # environment steps of random actions before the first update
    buffer_size: Count = 1_000_000  # transitions that the replay buffer holds
    batch_size: Count = 256  # transitions per update
    eval_frequency: Count = 10_000  # environment steps between evaluations
    eval_episodes: Count = 20  # episodes per evaluation, played in parallel
    checkpoint_frequency: Count = 50_000  # environment steps between checkpoints
    capture_video: bool = False  # record the first episode of each evaluation in the run folder's `videos`
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "diffusion-policy-online-rl"  # W&B project
    wandb_entity: str | None = None  # W&B team or user
    resume: str | None = None  # run folder to resume; arguments default to its own, but not --track and --wandb-entity
    evaluate: str | None = None  # run folder whose policy plays `--eval-episodes` episodes; arguments as for --resume

    # Algorithm specific arguments
    gamma: Fraction = 0.99  # discount factor
    tau: Fraction = 0.01  # step size of the moving averages of critics and policy
    q_lr: Fraction = 3e-4  # learning rate of the critics
    policy_lr: Fraction = 3e-4  # initial learning rate of the policy
    policy_lr_end: Fraction = 3e-5  # final learning rate of the policy; linear in between
    policy_lr_decay_begin: Annotated[int, Field(ge=0)] = 25_000  # policy updates before that decay
    policy_lr_decay_end: Annotated[int, Field(ge=0)] = 75_000  # policy updates after which it ends
    policy_frequency: Count = 2  # updates per update of the policy and the averages
    reward_scale: Positive = 0.2  # factor on rewards in the critics' target; scales Q, and the lambda that suits it
    hidden_size: Count = 256  # width of the three hidden layers of critics and policy
    diffusion_steps: Annotated[int, Field(ge=2, le=200)] = 5  # denoising steps T
    beta_power: Annotated[float, Field(ge=1, le=10)] = 4.0  # the betas grow as this power of a linear function of t
    denoising_noise: Fraction = 0.0  # factor on the noise that denoising adds after each step
    num_particles: Count = 16  # N: actions denoised per state, of which the best by min(Q1, Q2) is played
    target_particles: Count = 1  # the same for the actions in the critics' target
    target_noise: Fraction = 1.0  # factor on the exploration noise that is added to those
    bfloat16_sampling: bool = False  # denoise in bfloat16: native on GPUs and where `lscpu` has avx512_bf16 or amx_bf16
    num_reverse_samples: Count = 16  # M: reverse samples per noised action
    proposal: Literal["policy", "replay"] = "replay"  # noised: the policy's actions, best of N, or the buffer's
    bounded_reverse_sampling: bool = True  # draw reverse samples inside a box, besides clipping them for Q
    reverse_bound: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0  # half the width of that box
    soft_critic: bool = False  # add lambda times the entropy of the exploration noise to the critics' target
    temperature: Positive = 0.05  # initial lambda
    exploration_noise: Positive = 0.5  # initial std of the exploration noise; the std stays proportional to lambda
    lambda_lr: Fraction = 7e-3  # learning rate of log lambda
    lambda_frequency: Count = 250  # updates per update of lambda
    target_entropy_scale: Annotated[float, Field(allow_inf_nan=False)] = -0.9  # target entropy per action dimension


# ALGO LOGIC: diffusion and reverse sampling -------------------------------------------------------------------------


class Schedule(nn.Module):
    """Noise schedule. t counts from 0 in the code, from 1 in the equations; a_0 is noise-free in both. beta_t grows
    from 8e-5 to 0.7992 as a power of a linear function; abar_t is the product of 1 - beta_0 to 1 - beta_t. The tables
    (T,) are made in float64: 1 - abar_0 would lose half its digits in float32. From a_t and a_0, DDPM's posterior of
    the action one level below is N(mean_a0_t a_0 + mean_at_t a_t, posterior_std_t^2 I); for t = 0 it is a_0."""

    start_std = 0.5  # of the Gaussian noise that denoising starts from, as in the official code; in DDPM 1

    def __init__(self, steps: int, power: float):
        super().__init__()
        beta = 0.8 * torch.linspace(1e-4 ** (1 / power), 0.999 ** (1 / power), steps, dtype=torch.float64) ** power
        abar = torch.cumprod(1 - beta, dim=0)
        abar_before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        tables = {
            "sqrt_abar": abar.sqrt(),
            "sqrt_1m_abar": (1 - abar).sqrt(),
            "reverse_std": (1 / abar - 1).sqrt(),
            "mean_a0": beta * abar_before.sqrt() / (1 - abar),
            "mean_at": (1 - abar_before) * (1 - beta).sqrt() / (1 - abar),
            "posterior_std": (beta * (1 - abar_before) / (1 - abar)).sqrt(),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.to(torch.get_default_dtype()), persistent=False)

    def noised(self, a_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """a_t, equation (1), for a_0 and eps (B, d) and t (B,)."""
        return self.sqrt_abar[t, None] * a_0 + self.sqrt_1m_abar[t, None] * eps

    def reverse_samples(self, a_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """a_0^k (B, M, d), equation (7), from a_t (B, d), t (B,) and eps (B, M, d): (1) solved for a_0."""
        return (a_t / self.sqrt_abar[t, None])[:, None] - self.reverse_std[t, None, None] * eps

    def bounded_noise(self, a_t: Tensor, t: Tensor, u: Tensor, bound: float) -> Tensor:
        """Noise (B, M, d) whose reverse samples (7) lie in [-bound, bound]^d, from uniform u (B, M, d) in float64:
        a normal truncated to [low, high], drawn by inversion, eps = Phi^-1(Phi(low) + u (Phi(high) - Phi(low)))."""
        mean, std = (a_t / self.sqrt_abar[t, None])[:, None], self.reverse_std[t, None, None]
        low, high = (mean - bound) / std, (mean + bound) / std  # where a_0 is bound and -bound
        # Float64 keeps enough digits of Phi near 1: as a_t is noised from an action in the box, low stays below 6.
        below, above = torch.special.ndtr(low.double()), torch.special.ndtr(high.double())
        return torch.special.ndtri(below + u * (above - below)).to(a_t.dtype).clamp(low, high)


# SPEED: "1.6 times" means 1.6 times as many updates per second, at Humanoid-v4's sizes, on one core of a Xeon ---------


class Mish(nn.Module):
    """x tanh(log(1 + e^x)) = x - x/(e (e/2 + 1) + 1) with e = exp(x), instead of nn.Mish: 1.6 times."""

    def forward(self, x: Tensor) -> Tensor:
        # Where exp overflows, the fraction is rightly 0 but its gradient NaN; above 20 it is lost in rounding anyway.
        e = (x.clamp(max=20) if torch.is_grad_enabled() else x).exp()
        return x - x / (e * (e / 2 + 1) + 1)


def states_per_chunk(actions: int, device: torch.device) -> int:
    """How many states with that many actions each fit a CPU's cache, all layers' activations included: 1.07 times."""
    return max(1024 // actions, 1) if device.type == "cpu" else 10**9


compiled = torch.compile(dynamic=False, mode="reduce-overhead")  # 1.9 times, with that on `gradients` below


# ALGO LOGIC: networks -----------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """x W + b, (..., i) to (..., j). As in the official code, b = 0 at first and W is normal of std 1/sqrt(fan_in), cut
    at two std; fan_in is i, or the whole layer's where this is a part. twins: a pair, (2, B, i) to (2, B, j)."""

    def __init__(self, in_features: int, out_features: int, fan_in: int | None = None, bias=True, twins=False):
        super().__init__()
        std, twice = (fan_in or in_features) ** -0.5, (2,) if twins else ()
        self.weight = nn.Parameter(torch.empty(*twice, in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(*twice, 1, out_features)) if bias else None
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else x @ self.weight + self.bias


def trunk(hidden: int, out_features: int, twins: bool = False) -> nn.Sequential:
    """All but the first layer, which Critics and Policy split by input, [s, a] W = s W_s + a W_a, so that the
    state's share is computed once per state and not once per particle, reverse sample and denoising step."""
    sizes = (hidden, hidden), (hidden, hidden), (hidden, out_features)
    return nn.Sequential(*(layer for size in sizes for layer in (Mish(), Linear(*size, twins=twins))))


class Critics(nn.Module):
    """Q1 and Q2: observations (B, o) with actions (B, d) give (2, B), with actions (B, K, d) they give (2, B, K)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int):
        super().__init__()
        self.state_layer = Linear(obs_dim, hidden, obs_dim + action_dim, twins=True)
        self.action_layer = Linear(action_dim, hidden, obs_dim + action_dim, bias=False, twins=True)
        self.trunk = trunk(hidden, 1, twins=True)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        state_share = self.state_layer(observations.expand(2, -1, -1))  # (2, B, h)
        action_share = self.action_layer(actions.flatten(0, -2).expand(2, -1, -1))  # (2, B K, h); K = 1 for (B, d)
        hidden = state_share[:, :, None] + action_share.unflatten(1, (len(observations), -1))  # (2, B, K, h)
        return self.trunk(hidden.flatten(1, 2)).view(2, *actions.shape[:-1])


class Policy(nn.Module):
    """Noise prediction eps_theta(s, a_t, t): observations (B, o), a_t (B, d), t (B,) in 0..T-1 give (B, d)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, time_dim: int = 16):
        super().__init__()
        fan_in = obs_dim + action_dim + time_dim
        self.register_buffer("frequencies", 10_000 ** -torch.arange(0, 1, 2 / time_dim), persistent=False)
        self.time_layers = nn.Sequential(
            Linear(time_dim, 2 * time_dim),
            Mish(),
            Linear(2 * time_dim, time_dim),
            Linear(time_dim, hidden, fan_in, bias=False),  # the share of t in the first layer
        )
        self.state_layer = Linear(obs_dim, hidden, fan_in)
        self.action_layer = Linear(action_dim, hidden, fan_in, bias=False)
        self.trunk = trunk(hidden, action_dim)

    def time_share(self, t: Tensor) -> Tensor:
        """The share of t (B,) in the first layer, (B, hidden)."""
        angles = t[:, None] * self.frequencies  # (B, time_dim/2)
        features = torch.cat([angles.sin(), angles.cos()], dim=1)
        return self.time_layers(features / features.shape[1] ** 0.5)  # scaled as in the official code

    def forward(self, observations: Tensor, a_t: Tensor, t: Tensor) -> Tensor:
        return self.trunk(self.state_layer(observations) + self.action_layer(a_t) + self.time_share(t))


@compiled
def denoise(policy: Policy, schedule: Schedule, observations: Tensor, a_t: Tensor, z: Tensor) -> Tensor:
    """N particles (B, N, d) for observations (B, o), from noise a_t (B, N, d). Each step predicts a_0, clips it and
    goes to the mean of DDPM's posterior (see Schedule) plus its std times z[t]; z (T, B, N, d)."""
    state, times = policy.state_layer(observations)[:, None], policy.time_share(torch.arange(len(z), device=z.device))
    for t in reversed(range(len(z))):
        predicted_eps = policy.trunk(policy.action_layer(a_t) + (state + times[t]))
        a_0 = (a_t / schedule.sqrt_abar[t] - schedule.reverse_std[t] * predicted_eps.to(a_t.dtype)).clamp(-1, 1)
        a_t = schedule.mean_a0[t] * a_0 + schedule.mean_at[t] * a_t + schedule.posterior_std[t] * z[t]
    return a_t


@compiled
def min_q(critics: Critics, observations: Tensor, actions: Tensor) -> Tensor:
    """min(Q1, Q2), shapes as in `Critics` but for the 2."""
    return critics(observations, actions).amin(0)


# ==== TOOLS: the same text in sac.py, td3.py, qsm.py and sdac.py ====================================================


class Batch(NamedTuple):  # of B transitions
    observations: Tensor  # (B, o)
    actions: Tensor  # (B, d), in [-1, 1]
    next_observations: Tensor  # (B, o), at the end of an episode its true last observation
    rewards: Tensor  # (B,)
    dones: Tensor  # (B,), 1 where the episode terminated; truncation does not count


@torch.compile(dynamic=False, mode="reduce-overhead")  # CUDA graphs on GPUs; on CPUs SAC, TD3 1.3 to 1.6 times as fast
def gradients(loss: Callable, parameters: list[Tensor], *inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The gradients of a loss, and its metrics. With `trace_autograd_ops` this is one compiled graph; `backward` would
    split it. Losses are given their random numbers; compiled code would draw others than `--no-compile`."""
    value, metrics = loss(*inputs)
    return torch.autograd.grad(value, parameters), {name: metric.detach() for name, metric in metrics.items()}


def minimize(optimizer: torch.optim.Optimizer, loss: Callable, *inputs) -> dict[str, Tensor]:
    """One step of the optimizer on `loss(*inputs)`, with all other parameters held fixed. Returns the metrics."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grads, metrics = gradients(loss, parameters, *inputs)
    for parameter, grad in zip(parameters, grads):
        parameter.grad = grad.contiguous()  # compiled for CUDA, it may have padded rows, which Adam refuses
    optimizer.step()
    optimizer.zero_grad()  # CUDA graphs overwrite their results: keep none of them
    return {name: metric.clone() for name, metric in metrics.items()}


@torch.no_grad()
def move_average(average: nn.Module, online: nn.Module, tau: float) -> None:
    """average <- (1-tau) average + tau online, parameter by parameter."""
    torch._foreach_lerp_(list(average.parameters()), list(online.parameters()), tau)


# ALGO LOGIC: the agent ---------------------------------------------------------------------------------------------


class SDAC(nn.Module):
    """The agent. Actions played, stored and given to the critics are in [-1, 1]^d."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args, self.action_dim, self.updates = args, action_dim, 0
        self.schedule = Schedule(args.diffusion_steps, args.beta_power)
        self.policy = Policy(obs_dim, action_dim, args.hidden_size)
        self.critics = Critics(obs_dim, action_dim, args.hidden_size)
        self.ema_policy = copy.deepcopy(self.policy).requires_grad_(False)  # the averaged policy, which acts
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)  # Qbar
        self.log_lambda = nn.Parameter(torch.tensor(math.log(args.temperature)))
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), args.policy_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), args.q_lr, fused=True)
        self.lambda_optimizer = torch.optim.Adam([self.log_lambda], args.lambda_lr, fused=True)
        self.optimizers = [self.policy_optimizer, self.critic_optimizer, self.lambda_optimizer]

    @property
    def temperature(self) -> Tensor:
        return self.log_lambda.detach().exp()  # lambda now; args.temperature is its initial value

    @property
    def exploration_std(self) -> Tensor:
        return self.args.exploration_noise * self.temperature / self.args.temperature  # 10 lambda by default

    @torch.no_grad()
    def act(self, observations: Tensor, explore: bool) -> Tensor:
        """Actions (B, d) for observations (B, o), with exploration noise or without."""
        actions = self.best_of_n(self.ema_policy, observations, self.args.num_particles)
        return self.perturbed(actions, torch.randn_like(actions)) if explore else actions

    def best_of_n(self, policy: Policy, observations: Tensor, n: int) -> Tensor:
        """Of n particles of the policy for each state, the one with the largest online min(Q1, Q2), (B, d)."""
        particles = []
        for chunk in observations.split(states_per_chunk(n, observations.device)):
            start = self.schedule.start_std * torch.randn(len(chunk), n, self.action_dim, device=chunk.device)
            z = self.args.denoising_noise * torch.randn(self.args.diffusion_steps, *start.shape, device=chunk.device)
            with torch.autocast(chunk.device.type, torch.bfloat16, enabled=self.args.bfloat16_sampling):
                particles.append(denoise(policy, self.schedule, chunk, start, z))
        particles = torch.cat(particles)
        if n == 1:
            return particles[:, 0]
        best = self.values(observations, particles).argmax(dim=1)
        return particles.take_along_dim(best[:, None, None], 1)[:, 0]

    def perturbed(self, actions: Tensor, eps: Tensor) -> Tensor:
        """Actions with exploration noise, all (B, d)."""
        return (actions + self.exploration_std * eps).clamp(-1, 1)

    def values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Online min(Q1, Q2), (B, K), of K actions for each state, (B, K, d)."""
        states = states_per_chunk(actions.shape[1], actions.device)
        chunks = zip(observations.split(states), actions.split(states))
        return torch.cat([min_q(self.critics, *chunk) for chunk in chunks])

    @torch.no_grad()
    def target_values(self, batch: Batch) -> Tensor:
        """y = reward_scale r + gamma (1-done) min(Qbar1, Qbar2)(s', a'), (B,)."""
        args, observations = self.args, batch.next_observations
        actions = self.best_of_n(self.policy, observations, args.target_particles)
        eps = torch.randn_like(actions)
        next_q = min_q(self.target_critics, observations, self.perturbed(actions, args.target_noise * eps))
        if args.soft_critic:  # minus lambda times the log-density of the exploration noise
            log_prob = -0.5 * eps**2 - self.exploration_std.log() - 0.5 * math.log(2 * math.pi)
            next_q = next_q - self.temperature * log_prob.sum(1)
        return args.reward_scale * batch.rewards + args.gamma * (1 - batch.dones) * next_q

    @torch.no_grad()
    def propose(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """a_t (B, d) and t (B,): noised actions from the policy or from the replay buffer."""
        a_0 = batch.actions
        if self.args.proposal == "policy":
            a_0 = self.best_of_n(self.policy, batch.observations, self.args.num_particles)
            a_0 = self.perturbed(a_0, torch.randn_like(a_0))
        t = torch.randint(self.args.diffusion_steps, batch.rewards.shape, device=a_0.device)
        return self.schedule.noised(a_0, t, torch.randn_like(a_0)), t

    @torch.no_grad()
    def reverse_sampling(self, batch: Batch, a_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """sum_k w_k eps_k of (9), (B, d), and the effective sample size 1/sum_k w_k^2 (harmonic mean over B)."""
        shape = (len(a_t), self.args.num_reverse_samples, self.action_dim)
        if self.args.bounded_reverse_sampling:
            u = torch.rand(shape, dtype=torch.float64, device=a_t.device)  # float32's are 0 now and then: a_0 at 2
            eps = self.schedule.bounded_noise(a_t, t, u, self.args.reverse_bound)
        else:
            eps = torch.randn(shape, device=a_t.device)
        a_0 = self.schedule.reverse_samples(a_t, t, eps).clamp(-1, 1)  # the critics know clipped actions only
        weights = F.softmax(self.values(batch.observations, a_0) / self.temperature, dim=1)
        return torch.einsum("bm,bmd->bd", weights, eps), 1 / weights.square().sum(1).mean()

    def policy_loss(self, batch: Batch, a_t: Tensor, t: Tensor, mean_eps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation (9), averaged over action dimensions too, a factor to which Adam is invariant."""
        loss = F.mse_loss(self.policy(batch.observations, a_t, t), mean_eps)
        return loss, {"actor_loss": loss}

    def critic_loss(self, batch: Batch, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared errors of both critics against y (B,)."""
        q = self.critics(batch.observations, batch.actions)
        (qf1_loss, qf2_loss), (q1, q2) = (q - y).square().mean(1), q.mean(1)
        return qf1_loss + qf2_loss, {"qf1_loss": qf1_loss, "qf2_loss": qf2_loss, "qf1_values": q1, "qf2_values": q2}

    def lambda_loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        """(H - Hbar) log lambda, H = d/2 log(2 pi e std^2), the entropy of the exploration noise, without gradient."""
        entropy = self.action_dim / 2 * torch.log(2 * math.pi * math.e * self.exploration_std**2)
        loss = self.log_lambda * (entropy - self.args.target_entropy_scale * self.action_dim)
        return loss, {"lambda": self.temperature}

    def policy_lr(self) -> float:
        """The current one: linear decay over the policy's own steps."""
        begin, end = self.args.policy_lr_decay_begin, self.args.policy_lr_decay_end
        progress = (self.updates // self.args.policy_frequency - begin) / max(end - begin, 1)
        return self.args.policy_lr + min(max(progress, 0), 1) * (self.args.policy_lr_end - self.args.policy_lr)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Lines 4 to 13 of the algorithm, numbered here too. Returns what to log."""
        args, metrics = self.args, {}
        policy_due = self.updates % args.policy_frequency == 0
        y = self.target_values(batch)  # 4
        if policy_due:  # 5
            a_t, t = self.propose(batch)  # 6
            mean_eps, metrics["effective_sample_size"] = self.reverse_sampling(batch, a_t, t)  # 7
            self.policy_optimizer.param_groups[0]["lr"] = self.policy_lr()
            metrics |= minimize(self.policy_optimizer, self.policy_loss, batch, a_t, t, mean_eps)  # 8
        metrics |= minimize(self.critic_optimizer, self.critic_loss, batch, y)  # 9
        if self.updates % args.lambda_frequency == 0:  # 10
            metrics |= minimize(self.lambda_optimizer, self.lambda_loss)  # 11
        if policy_due:  # 12
            move_average(self.ema_policy, self.policy, args.tau)  # 13
            move_average(self.target_critics, self.critics, args.tau)
        self.updates += 1
        return metrics


# ==== HARNESS: the same text in sac.py, td3.py, qsm.py and sdac.py ==================================================
# It trains any class with these members, on gymnasium environments with bounded continuous actions:
#     Agent(obs_dim, action_dim, args)    an nn.Module; its state_dict is what the run folder keeps of it
#     .act(observations, explore)         actions (B, d) in [-1, 1] for observations (B, o), with or without exploration
#     .update(batch)                      one update from a `Batch`; returns metrics to log, {name: tensor ()}
#     .updates, .optimizers               the number of updates made, and the list of optimizers; checkpoints keep both


class ReplayBuffer:
    """The last `size` transitions. The operating system commits memory only as rows are written."""

    def __init__(self, size: int, obs_dim: int, action_dim: int):
        self.size, self.added = size, 0
        shapes = ((size, obs_dim), (size, action_dim), (size, obs_dim), (size,), (size,))
        self.columns = [np.empty(shape, np.float32) for shape in shapes]

    def __len__(self) -> int:
        return min(self.added, self.size)

    def add(self, *transitions: np.ndarray) -> None:
        """Add one row per environment, given as the columns of a `Batch`, in place of the oldest rows."""
        rows = np.arange(self.added, self.added + len(transitions[0])) % self.size
        for column, values in zip(self.columns, transitions):
            column[rows] = values
        self.added += len(rows)

    def sample(self, batch_size: int, device: torch.device) -> Batch:
        """Uniform with replacement."""
        rows = torch.randint(len(self), (batch_size,)).numpy()
        return Batch(*(torch.from_numpy(column[rows]).to(device) for column in self.columns))

    def state_dict(self) -> dict:
        return {"added": self.added, "columns": [torch.from_numpy(column[: len(self)]) for column in self.columns]}

    def load_state_dict(self, state: dict) -> None:
        oldest = state["added"] % max(len(state["columns"][0]), 1)  # the oldest row of a full buffer; 0 otherwise
        for chunk in (slice(oldest, None), slice(oldest)):
            self.add(*(column[chunk][-self.size :] for column in state["columns"]))  # fewer if --buffer-size shrank


def fail(message: object) -> NoReturn:
    """Exit with a message instead of a traceback, for what the user can fix."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def check_finite(when: str, quantities: dict[str, Tensor | np.ndarray]) -> None:
    """Exit with the name of the first quantity that is NaN or infinite."""
    for name, values in quantities.items():
        if not torch.as_tensor(values).isfinite().all():
            fail(f"{name} is NaN or infinite at {when}")


def make_envs(args: Args, num_envs: int) -> gym.vector.VectorEnv:
    """Environments with flat float32 observations and actions in [-1, 1], which reset within the step that ends an
    episode: `step` returns the next episode's first observation; the last one is in `infos["final_obs"]`."""

    def rescale(env: gym.Env) -> gym.Env:
        box = env.action_space
        floats = isinstance(box, gym.spaces.Box) and np.issubdtype(box.dtype, np.floating)
        if not (floats and box.is_bounded() and (box.low < box.high).all()):
            fail(f"{args.env_id} has the action space {box}; it must be a Box of floats with finite low < high")
        return RescaleAction(env, -1, 1)

    wrappers = [FlattenObservation, lambda env: DtypeObservation(env, np.float32), rescale]
    same_step = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    video = {"render_mode": "rgb_array"} if args.capture_video else {}  # some environments refuse render_mode=None
    envs = gym.make_vec(args.env_id, num_envs, "sync", vector_kwargs=same_step, wrappers=wrappers, **video)
    return RecordEpisodeStatistics(envs, stats_key="statistics")  # an environment may have an "episode" of its own


def evaluate(agent: nn.Module, args: Args, device: torch.device, signals: list, videos: Path, name: str) -> np.ndarray:
    """Episode returns (episodes,), one from each of `--eval-episodes` new environments, without exploration noise, cut
    at 100,000 steps. The seeds are the same each time; training's random state is untouched."""
    seeds = np.random.SeedSequence([args.seed, 1]).generate_state(args.eval_episodes).tolist()
    returns, running = np.zeros(args.eval_episodes), np.ones(args.eval_episodes, dtype=bool)
    devices = [device] if device.type == "cuda" else []  # whose generators are forked, besides the CPU's
    with contextlib.closing(make_envs(args, args.eval_episodes)) as envs, torch.random.fork_rng(devices):
        if args.capture_video:
            envs.unwrapped.envs[0] = RecordVideo(envs.unwrapped.envs[0], videos, lambda n: n == 0, name_prefix=name)
        torch.manual_seed(seeds[0])
        observations, _ = envs.reset(seed=seeds)
        for _ in range(100_000):
            actions = agent.act(torch.as_tensor(observations, device=device), explore=False).cpu().numpy()
            observations, rewards, terminations, truncations, _ = envs.step(actions.reshape(envs.action_space.shape))
            returns[running] += rewards[running]
            running &= ~(terminations | truncations)
            if signals:  # see `settings`; this evaluation is dropped
                sys.exit(128 + signals[0])
            if not running.any():
                break
    check_finite(f"evaluation {name}", {"return": returns})
    return returns


def write(path: Path, content: dict | str) -> None:
    """Write a temporary file, then rename it: a kill at any moment leaves a whole file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_text(content) if isinstance(content, str) else torch.save(content, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(folder: Path, agent: nn.Module, buffer: ReplayBuffer, step: int, seconds: float, evaluations: list) -> None:
    """Write policy.pt (all networks) and checkpoint.pt; if a parameter is not finite, exit and keep the old files."""
    check_finite(f"step {step}", dict(agent.named_parameters()))
    checkpoint = {"step": step, "seconds": seconds, "evaluations": evaluations, "updates": agent.updates}
    checkpoint |= {"agent": agent.state_dict(), "buffer": buffer.state_dict()}
    checkpoint["optimizers"] = [optimizer.state_dict()["state"] for optimizer in agent.optimizers]
    write(folder / "policy.pt", agent.state_dict())
    write(folder / "checkpoint.pt", checkpoint)


def restore(folder: Path, agent: nn.Module, buffer: ReplayBuffer) -> tuple[int, float, list]:
    """Load the checkpoint into agent and buffer. Returns step, seconds and evaluations."""
    try:
        checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        agent.updates = checkpoint["updates"]
        agent.load_state_dict(checkpoint["agent"])
        buffer.load_state_dict(checkpoint["buffer"])
        for optimizer, state in zip(agent.optimizers, checkpoint["optimizers"]):  # learning rates come from args
            optimizer.load_state_dict(optimizer.state_dict() | {"state": copy.deepcopy(state)})  # off the mapped file
        return checkpoint["step"], checkpoint["seconds"], checkpoint["evaluations"]
    except Exception as error:
        fail(f"can't resume the run in {folder}: {error}")


@contextlib.contextmanager
def settings(args: Args) -> Iterator[list[int]]:
    """Process-wide settings of a run, undone at the end. Yields a list that collects signals: they end the run
    between two steps, since an exception from a handler may get lost in a callback, or interrupt an update halfway."""
    signals, handlers = [], {}

    def handle(number: int, frame: object) -> None:
        signals.append(number)
        with contextlib.suppress(AttributeError, OSError):  # stderr may be closed; `print` is not safe in a handler
            os.write(sys.stderr.fileno(), b"\nstopping before the next step\n")

    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup ignores SIGHUP
                handlers[number] = signal.signal(number, handle)
    torch.set_flush_denormal(True)  # CPUs are slow with numbers below 1e-38
    cpu, matmul = torch.cpu.get_capabilities(), torch.backends.mkldnn.matmul
    # MKL leaves AMD's AVX-512 unused. "bf16" means oneDNN, in float32 without AMX: 1.5 to 1.9 times as fast on AMD
    onednn = cpu.get("avx512_f") and not cpu.get("amx_bf16") and not torch.cuda.is_available()  # CUDA: not tried
    matmul.fp32_precision = "bf16" if onednn else "none"
    try:
        with torch.compiler.set_stance("default" if args.compile else "force_eager"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="gymnasium")  # v4 tasks are out of date
            yield signals
    finally:
        torch.set_flush_denormal(False)
        matmul.fp32_precision = "none"
        for number, handler in handlers.items():
            signal.signal(number, handler)


def parse_arguments() -> Args:
    """Parse the command line; what it leaves open comes from the run that --resume or --evaluate names."""
    args = tyro.cli(Args)
    run = args.resume if args.evaluate is None else args.evaluate
    if run is None:
        return args
    not_restored = {"resume": None, "evaluate": None, "track": False, "wandb_entity": None}
    try:
        saved = Args(**json.loads(Path(run, "args.json").read_text()) | not_restored)
    except (OSError, TypeError, ValueError) as error:
        fail(f"{run!r} is not a run folder of this script: {error}")
    if ":" in saved.env_id and args.env_id != saved.env_id:  # importing runs code, and the folder may be untrusted
        fail(f"the run imports the module in its env_id {saved.env_id}; if you trust that, add --env-id {saved.env_id}")
    return tyro.cli(Args, default=saved)


def compile_ahead(agent: nn.Module, args: Args, obs_dim: int, action_dim: int, device: torch.device) -> None:
    """Compile before the run starts, by acting and updating once on zeros; if that fails, go on without."""
    print("compiling, which takes up to a few minutes the first time", file=sys.stderr)
    shapes = (obs_dim,), (action_dim,), (obs_dim,), (), ()
    try:
        torch._dynamo.config.trace_autograd_ops = True  # for `gradients`
        agent.act(torch.zeros(args.eval_episodes, obs_dim, device=device), explore=False)
        if args.evaluate is None:
            agent.act(torch.zeros(args.num_envs, obs_dim, device=device), explore=True)
            agent.update(Batch(*(torch.zeros(args.batch_size, *shape, device=device) for shape in shapes)))
    except Exception as error:
        torch.compiler.set_stance("force_eager")
        print(f"running without torch.compile, which fails here: {error!r:.200}", flush=True)


def train(agent, buffer: ReplayBuffer, envs, args: Args, device: torch.device, folder: Path, signals: list) -> None:
    """Train until --total-timesteps or a signal, with --resume from the checkpoint on."""
    step, seconds, evaluations = 0, 0.0, []
    if args.resume is not None:
        step, seconds, evaluations = restore(folder, agent, buffer)
        torch.manual_seed(args.seed + step)  # do not replay the first run's random numbers
    last_evaluated = evaluations[-1][0] if evaluations else 0
    if last_evaluated >= args.total_timesteps:
        fail(f"the run has made {step} steps; --total-timesteps {args.total_timesteps} leaves nothing to do")
    observations, _ = envs.reset(seed=args.seed + step)
    if args.track:
        import wandb

        options = {"id": folder.name, "resume": "allow", "sync_tensorboard": True, "save_code": True}
        try:
            wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, config=vars(args), **options)
        except wandb.errors.UsageError as error:
            fail(f"--track: {error} (WANDB_MODE=offline needs no login)")
    print(f"{args.env_id} on {device}, run folder {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=args.resume is not None)
    write(folder / "args.json", json.dumps(vars(args) | {"resume": None}, indent=2))

    start, shape, metrics, shown = time.time() - seconds, envs.action_space.shape, {}, {}
    drawing = {"mininterval": 0.1 if sys.stderr and sys.stderr.isatty() else 30, "disable": sys.stderr is None}
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", miniters=1, smoothing=0, **drawing)
    with bar, SummaryWriter(folder, purge_step=step + 1) as writer:
        try:
            while not signals:
                # Evaluate; a resumed run makes up here for an evaluation that was cut short
                if step // args.eval_frequency > last_evaluated // args.eval_frequency or step >= args.total_timesteps:
                    returns = evaluate(agent, args, device, signals, folder / "videos", f"step-{step}")
                    statistics = [float(f(returns)) for f in (np.mean, np.std, np.min, np.max)]
                    evaluations.append([step, agent.updates, *statistics, round(time.time() - start, 3)])
                    table = [["step", "updates", "mean", "std", "min", "max", "seconds"], *evaluations]
                    write(folder / "evaluations.csv", "".join(",".join(map(str, row)) + "\n" for row in table))
                    last_evaluated, shown["evaluation"] = step, f"{statistics[0]:.1f}"
                    writer.add_scalar("eval/episodic_return", statistics[0], step)
                bar.set_postfix(shown, refresh=False)
                bar.update(step - bar.n)
                if step >= args.total_timesteps:
                    break

                # Act, line 2 of the algorithm
                if step < args.learning_starts:
                    actions = 2 * torch.rand(args.num_envs, math.prod(shape[1:])).numpy() - 1
                    bar.initial, bar.start_t = step, getattr(bar, "last_print_t", 0)  # the bar's clock starts here
                else:
                    actions = agent.act(torch.as_tensor(observations, device=device), explore=True).cpu().numpy()

                # Step; where an episode ends, `new_observations` are the next one's first
                new_observations, rewards, terminations, truncations, infos = envs.step(actions.reshape(shape))
                step += args.num_envs
                next_observations, rewards = new_observations.copy(), rewards.astype(np.float32)
                for i in np.flatnonzero(terminations | truncations):
                    next_observations[i] = infos["final_obs"][i]
                    shown["return"] = f"{infos['statistics']['r'][i]:.1f}"
                    writer.add_scalar("charts/episodic_return", infos["statistics"]["r"][i], step)
                    writer.add_scalar("charts/episodic_length", infos["statistics"]["l"][i], step)

                # Store, line 3
                check_finite(f"step {step}", {"next_observation": next_observations, "reward": rewards})
                buffer.add(observations, actions, next_observations, rewards, terminations)
                observations = new_observations

                # Learn: draw a batch, line 3, and update, from line 4 on
                for _ in range(args.updates_per_step if step > args.learning_starts else 0):
                    metrics |= agent.update(buffer.sample(args.batch_size, device))  # some come less often than others
                    if agent.updates % 100 == 0:
                        check_finite(f"step {step}", metrics)
                        for name, metric in metrics.items():
                            writer.add_scalar(f"losses/{name}", metric.item(), step)
                        writer.add_scalar("charts/SPS", int(step / (time.time() - start)), step)

                if step % args.checkpoint_frequency < args.num_envs and step < args.total_timesteps:
                    save(folder, agent, buffer, step, time.time() - start, evaluations)
        finally:  # whatever ended the run: its last step, a signal, or an exception
            save(folder, agent, buffer, step, time.time() - start, evaluations)


def main(agent_class: type) -> None:
    """Train, resume or evaluate as the command line says."""
    args = parse_arguments()
    new = f"runs/{args.env_id.replace('/', '-').replace(':', '-')}__{args.exp_name}__{args.seed}__{time.time_ns()}"
    folder = Path(args.evaluate or args.resume or new).resolve()  # now, since an environment may change directories
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: PyTorch finds no CUDA device")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    with settings(args) as signals, contextlib.ExitStack() as stack:
        try:
            envs = stack.enter_context(contextlib.closing(make_envs(args, args.num_envs)))
            sizes = envs.single_observation_space.shape[0], math.prod(envs.single_action_space.shape)
            buffer = ReplayBuffer(args.buffer_size, *sizes)
        except (gym.error.Error, ImportError, MemoryError) as error:
            fail(error)
        if args.capture_video:
            try:
                envs.reset()
                envs.unwrapped.envs[0].render()
            except Exception as error:
                fail(f"--capture-video can't render {args.env_id} ({error}): try MUJOCO_GL=egl, or MUJOCO_GL=osmesa")
        if args.compile:
            compile_ahead(agent_class(*sizes, args).to(device), args, *sizes, device)
        torch.manual_seed(args.seed)
        agent = agent_class(*sizes, args).to(device)
        if args.evaluate is None:
            train(agent, buffer, envs, args, device, folder, signals)
        else:
            try:
                agent.load_state_dict(torch.load(folder / "policy.pt", map_location=device, weights_only=True))
            except Exception as error:
                fail(f"can't load the policy of {folder}: {error}")
            returns = evaluate(agent, args, device, signals, folder / "videos", "evaluate")
            print(*(f"episode {i}: return {value:.2f}" for i, value in enumerate(returns)), sep="\n")
            print(f"mean {returns.mean():.2f}, standard deviation {returns.std():.2f} over {len(returns)} episodes")
    if signals:
        sys.exit(128 + signals[0])


# ==== END OF HARNESS ================================================================================================


if __name__ == "__main__":
    main(SDAC)
