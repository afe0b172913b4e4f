# SPDX-License-Identifier: MIT
"""Soft Diffusion Actor-Critic (SDAC): online reinforcement learning of a diffusion policy.

Ma, Chen, Wang, Li, Dai: "Efficient Online Reinforcement Learning for Diffusion Policy", ICML 2025,
arXiv 2502.00361. The policy is a diffusion model whose score is trained by Reverse Sampling Score
Matching (RSSM): it needs values of Q only, neither samples of the wanted policy nor gradients of Q.

The wanted policy is pi(a|s) ∝ exp(Q(s,a)/tau), tau the temperature (`--temperature` in the code, where the
argument `--tau` is the rate of the moving averages, as in CleanRL). Noising an action a_0 gives

    q_{t|0}(a_t|a_0) = N(a_t; sqrt(abar_t) a_0, (1-abar_t) I)            forward kernel             (1)
    p_t(a_t|s) = ∫ pi(a_0|s) q_{t|0}(a_t|a_0) da_0                       noised policy              (2)

and the diffusion model needs the score ∇ log p_t. Denoising score matching would fit it to
∇ log q_{t|0} at samples of pi, which nobody has. Read the same Gaussian formula as a density of a_0:

    qtilde_{0|t}(a_0|a_t) = N(a_0; a_t/sqrt(abar_t), (1-abar_t)/abar_t I)   reverse sampling        (3)
    q_{t|0}(a_t|a_0) = abar_t^{-d/2} qtilde_{0|t}(a_0|a_t)   for every pair, so                      (4)
    ∇_{a_t} log qtilde_{0|t} = ∇_{a_t} log q_{t|0} = -(a_t - sqrt(abar_t) a_0)/(1-abar_t)            (5)

qtilde is not the posterior of a_0, and Bayes' rule plays no part. Draw a_t from any proposal
ptilde_t(a_t|s) with full support, a_0 from qtilde, and weigh the pair with exp(Q(s,a_0)/tau). By (4)
this is denoising score matching with every a_t weighted by ptilde_t(a_t|s) Z(s) abar_t^{d/2} > 0
instead of 1, and a positive weight that depends on a_t alone moves no minimiser. So

    L = E_t E_{a_t~ptilde_t} E_{a_0~qtilde} exp(Q(s,a_0)/tau) |s_theta(a_t;s,t) - ∇ log qtilde|^2    (6)

has the minimiser s_theta = ∇ log p_t(.|s), whatever the proposal. In terms of predicted noise,
eps_theta = -sqrt(1-abar_t) s_theta, with M reverse samples for each (s, a_t),

    a_0^k = a_t/sqrt(abar_t) - sqrt(1/abar_t - 1) eps_k,   eps_k ~ N(0, I)                           (7)
    w_k = softmax_k(Q(s,a_0^k)/tau)                                                                  (8)
    L = E |eps_theta(s,a_t,t) - sum_k w_k eps_k|^2 + const                                           (9)

The softmax is one more positive weight on a_t (exact for large M, biased of order 1/M before), and the
factor 1/(1-abar_t) between (6) and (9) a weight that depends on t alone. The sum moved inside the square,
up to a constant, because eps_theta does not depend on k.

Actions live in the box [-1, 1]^d. As in the official code, Q in (8) is evaluated at clipped a_0^k, so the
wanted policy is exp(Q(s, clip(a))/tau), which has no finite integral over R^d; the loss is exact for the
policy on the box with `--bounded-reverse-sampling`, where qtilde is truncated to it.

Usage:
    python sdac.py --env-id Humanoid-v4
    python sdac.py --resume runs/RUN_FOLDER
    python sdac.py --evaluate runs/RUN_FOLDER --eval-episodes 10

Departures from the paper and from its official code (JAX, mahaitongdae/diffusion_policy_online_rl):
- Actions are clipped to [-1, 1] after the exploration noise, in acting, in the critic's target and in the
  proposal; the official code stores and bootstraps them unclipped, though they are never played so.
- Denoising starts from N(0, 0.5^2 I) as in the official code; theory says N(0, I).
- Best-of-N (the "efficient behaviour policy", see `SDAC.sample_action`) is part of the method here:
  `--num-particles 1` switches it off, in training and evaluation.
- One policy pass per (s, a_t), as in (9), where the official code makes M identical ones; the loss is
  averaged over batch and action dimensions, and Adam ignores the official code's extra factor 1/M.
- A new proposal is denoised only for updates that train the policy.
- `--soft-critic` adds the entropy of the exploration noise to the critic's target, which the official code
  leaves out: after best-of-N the policy is nearly deterministic, and the noise carries the entropy. On
  average that is the same constant at every state, a bonus or penalty per step of staying alive. Off by
  default: on small networks and three seeds it ruined InvertedPendulum-v4 (a return of 3 instead of 1000) and
  did nothing for Reacher-v4. Neither `--bounded-reverse-sampling` nor a start from N(0, I) made a difference
  there beyond the scatter of three seeds, so both stay as in the official code.
- `--temperature` is 1 in the official code. Where rewards are small that makes the weights (8) close to uniform:
  Reacher-v4 came to -32 with it and to -8 with 0.01. Only when cold like that do `--proposal replay` and
  `--target-particles 1` hold up, which save nine tenths of an update's arithmetic.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "numpy==2.4.6",
#     "gymnasium[mujoco]==1.4.0",
#     "mujoco==3.17.0",
#     "tyro==1.0.17",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "wandb==0.31.0",
#     "moviepy==2.2.1",
#     "matplotlib==3.11.2",
# ]
# ///
from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import difflib
import io
import json
import math
import os
import random
import re
import signal
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.wrappers import DtypeObservation, FlattenObservation, RecordVideo, RescaleAction
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = "sdac"
    """name of the experiment, part of the run folder's name"""
    env_id: str = "Humanoid-v4"
    """id of a gymnasium environment with bounded continuous actions; `module:id` imports the module first"""
    seed: int = 1
    """seed of everything random"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto takes CUDA if there is one"""
    compile: bool = True
    """torch.compile what is slow, and on CUDA replay whole updates as graphs"""
    total_timesteps: int = 1_000_000
    """environment steps of the whole run, summed over the environments"""
    num_envs: int = 5
    """environments that step together"""
    updates_per_step: int = 1
    """updates after each such vector step"""
    learning_starts: int = 30_000
    """environment steps with uniformly random actions before the first update"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds"""
    batch_size: int = 256
    """transitions in each update"""
    eval_frequency: int = 10_000
    """environment steps between evaluations"""
    eval_episodes: int = 20
    """episodes of an evaluation, played in parallel"""
    checkpoint_frequency: int = 50_000
    """environment steps between checkpoints"""
    capture_video: bool = False
    """record the first episode of each evaluation in the run folder's `videos`"""
    track: bool = False
    """send the curves to Weights & Biases too"""
    wandb_project_name: str = "diffusion-policy-online-rl"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team or user"""
    resume: str | None = None
    """go on with the run in this folder, with its arguments"""
    evaluate: str | None = None
    """play `--eval-episodes` episodes with the policy in this run folder, print the returns and stop"""

    # Algorithm specific arguments
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """step size of the exponential moving averages of critics and policy"""
    q_lr: float = 3e-4
    """learning rate of the critics"""
    policy_lr: float = 3e-4
    """learning rate of the policy at first"""
    policy_lr_end: float = 3e-5
    """... and in the end; linear in between"""
    policy_lr_decay_begin: int = 25_000
    """policy updates before that decay"""
    policy_lr_decay_end: int = 75_000
    """policy updates at its end; if that is not later, the rate jumps"""
    policy_frequency: int = 2
    """updates per update of the policy and of the moving averages"""
    reward_scale: float = 0.2
    """factor on rewards inside the critics"""
    hidden_size: int = 256
    """width of the three hidden layers of critics and policy"""
    diffusion_steps: int = 20
    """denoising steps T"""
    num_particles: int = 32
    """N: actions denoised per state, of which the best by min(Q1, Q2) is kept; 1 switches best-of-N off"""
    target_particles: int = 0
    """the same for the actions in the critics' target; 0 means as many as --num-particles"""
    num_reverse_samples: int = 64
    """M: reverse samples per noised action"""
    proposal: Literal["policy", "replay"] = "policy"
    """where the proposal a_t comes from: a noised action of the policy, or of the replay buffer"""
    bounded_reverse_sampling: bool = False
    """draw reverse samples inside the action box, instead of clipping them for Q"""
    soft_critic: bool = False
    """add the entropy of the exploration noise to the critic's target"""
    temperature: float = 1.0
    """temperature of the wanted policy at first; it changes in proportion to lambda"""
    noise_scale: float = 0.1
    """exploration noise has standard deviation noise_scale * lambda"""
    lambda_start: float = 5.0
    """lambda_0"""
    lambda_lr: float = 7e-3
    """learning rate of log lambda"""
    lambda_frequency: int = 250
    """updates per update of lambda"""
    target_entropy_scale: float = -0.9
    """entropy of the exploration noise aimed at, per action dimension"""


RANGES = {
    "seed": (0, 2**31 - 1),
    "total_timesteps": (1, 10**12),
    "num_envs": (1, 10_000),
    "updates_per_step": (1, 10_000),
    "learning_starts": (0, 10**12),
    "buffer_size": (1, 10**9),
    "batch_size": (1, 10**9),
    "eval_frequency": (1, 10**12),
    "eval_episodes": (1, 10_000),
    "checkpoint_frequency": (1, 10**12),
    "gamma": (0.0, 1.0),
    "tau": (0.0, 1.0),
    "q_lr": (0.0, 1.0),
    "policy_lr": (0.0, 1.0),
    "policy_lr_end": (0.0, 1.0),
    "policy_lr_decay_begin": (0, 10**12),
    "policy_lr_decay_end": (1, 10**12),
    "policy_frequency": (1, 10**12),
    "reward_scale": (1e-6, 1e6),
    "hidden_size": (1, 10_000),
    "diffusion_steps": (2, 1000),
    "num_particles": (1, 10_000),
    "target_particles": (0, 10_000),
    "num_reverse_samples": (1, 10_000),
    "temperature": (1e-6, 1e6),
    "noise_scale": (1e-6, 10.0),
    "lambda_start": (1e-6, 1e6),
    "lambda_lr": (0.0, 1.0),
    "lambda_frequency": (1, 10**12),
    "target_entropy_scale": (-100.0, 100.0),
}  # argument: smallest and largest value


# ALGO LOGIC: diffusion and reverse sampling ---------------------------------------------------------


class Schedule(nn.Module):
    """Noise schedule; the paper's steps 1..T are t = 0..T-1 here.

    beta_t grows linearly from 0.8e-4 to 0.7992 and abar_t = prod_{i<=t} (1 - beta_i). Everything is worked
    out in float64, since 1 - abar_0 = 8e-5 would lose half of its digits in float32. Tables of shape (T,):
    `signal` = sqrt(abar_t), `noise` = sqrt(1 - abar_t), `spread` = sqrt(1/abar_t - 1). Rows of `denoising`, (T, 5),
    hold what a step a_t -> a_{t-1} needs: signal, spread, and mean_a0, mean_at, std of the DDPM posterior
    q(a_{t-1} | a_t, a_0) = N(mean_a0 a_0 + mean_at a_t, std^2 I).
    """

    def __init__(self, steps: int):
        super().__init__()
        beta = 0.8 * torch.linspace(1e-4, 0.999, steps, dtype=torch.float64)
        abar = torch.cumprod(1 - beta, dim=0)
        abar_prev = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        signal, noise, spread = abar.sqrt(), (1 - abar).sqrt(), ((1 - abar) / abar).sqrt()
        mean_a0 = beta * abar_prev.sqrt() / (1 - abar)
        mean_at = (1 - abar_prev) * (1 - beta).sqrt() / (1 - abar)
        std = (beta * (1 - abar_prev) / (1 - abar)).sqrt()
        denoising = torch.stack([signal, spread, mean_a0, mean_at, std], dim=1)
        tables = {"signal": signal, "noise": noise, "spread": spread, "denoising": denoising}
        for name, table in tables.items():
            self.register_buffer(name, table.to(torch.get_default_dtype()), persistent=False)


def forward_sample(schedule: Schedule, a_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Noise actions, equation (1): a_t = sqrt(abar_t) a_0 + sqrt(1-abar_t) eps. a_0, eps (B, d), t (B,)."""
    return schedule.signal[t, None] * a_0 + schedule.noise[t, None] * eps


def reverse_sample(schedule: Schedule, a_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Reverse sampling, equation (7): a_0^k for a_t (B, d), t (B,), eps (B, M, d). Returns (B, M, d)."""
    return a_t[:, None] / schedule.signal[t, None, None] - schedule.spread[t, None, None] * eps


def bounded_noise(schedule: Schedule, a_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Turn eps ~ N(0, I) into noise whose reverse samples lie in the box [-1, 1]^d, shapes as above.

    Where the policy lives on the box, qtilde is the Gaussian (3) truncated to it; the factor it needs to
    be a density again depends on (a_t, t) alone. The map is the monotone one between the two normals,
    Phi^-1(Phi(low) + Phi(eps) (Phi(high) - Phi(low))): the identity if the box is wide.
    """
    mean, spread = a_t[:, None] / schedule.signal[t, None, None], schedule.spread[t, None, None]
    low, high = (mean - 1) / spread, (mean + 1) / spread
    # Phi is accurate in its lower tail only, so intervals on the right are mirrored to the left.
    sign = torch.where(low + high > 0, -1.0, 1.0)
    low, high = torch.where(sign < 0, -high, low), torch.where(sign < 0, -low, high)
    cdf = lambda x: 0.5 * torch.erfc(-x.double() * math.sqrt(0.5))  # noqa: E731
    truncated = torch.special.ndtri(cdf(low) + cdf(sign * eps) * (cdf(high) - cdf(low))).to(eps.dtype)
    truncated = torch.where(truncated == -math.inf, high, truncated)  # Phi(high) = 0: the box is out of sight
    return sign * torch.minimum(torch.maximum(truncated, low), high)


def rssm_target(q: Tensor, temperature: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and regression target of RSSM, equations (8) and (9).

    q (B, M) are values at the reverse samples made with eps (B, M, d). Returns the weights
    w_k = softmax_k(q_k / temperature), (B, M), and sum_k w_k eps_k, (B, d).
    """
    weights = F.softmax(q / temperature, dim=1)
    return weights, torch.einsum("bm,bmd->bd", weights, eps)


def denoising_step(coefficients: Tensor, a_t: Tensor, predicted_eps: Tensor, eps: Tensor) -> Tensor:
    """One DDPM step a_t -> a_{t-1} with the predicted a_0 clipped to the box, all of one shape.

    `coefficients` is row t of `Schedule.denoising`; at t = 0 its std is 0, so that no noise is added.
    """
    signal, spread, mean_a0, mean_at, std = coefficients
    a_0 = (a_t / signal - spread * predicted_eps).clamp(-1, 1)
    return mean_a0 * a_0 + mean_at * a_t + std * eps


# ALGO LOGIC: networks -------------------------------------------------------------------------------


class Linear(nn.Module):
    """x W + b, (..., i) to (..., j), initialised like the official library's: W truncated normal of std 1/sqrt(fan_in),
    b = 0. With twins=True a layer for each critic, in one batched product: (2, B, i) to (2, B, j).

    The bias is a sum of its own, for torch.compile to fuse with the Mish that follows.
    """

    def __init__(
        self, in_features: int, out_features: int, fan_in: int | None = None, bias: bool = True, twins: bool = False
    ):
        super().__init__()
        std = (fan_in or in_features) ** -0.5
        shape = (2, in_features, out_features) if twins else (in_features, out_features)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(*shape[:-2], 1, out_features)) if bias else None
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 2 and self.weight.shape[1] < 32:
            # Transposed: a CPU multiplies faster into few rows than into few columns.
            y = (self.weight.T @ x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])
        else:
            y = x @ self.weight
        return y if self.bias is None else y + self.bias


class Mish(nn.Module):
    """x tanh(log(1 + e^x)) = x n/(n+2) = x - x/(n/2+1) with n = e^x (e^x + 2), which takes one exponential."""

    def forward(self, x: Tensor) -> Tensor:
        # Above 20 the fraction is lost in rounding; where exp overflows it is 0, as it should be, but its gradient NaN.
        e = (x.clamp(max=20) if torch.is_grad_enabled() else x).exp()
        return x - x / (e * (e / 2 + 1) + 1)


def trunk(hidden: int, out_features: int, twins: bool = False) -> nn.Sequential:
    """Everything after the first layer. The first one is split by input, W [s; a] = W_s s + W_a a, so that the
    state's share is computed once per state and not once per particle, reverse sample and denoising step."""
    sizes = ((hidden, hidden), (hidden, hidden), (hidden, out_features))
    return nn.Sequential(*(layer for size in sizes for layer in (Mish(), Linear(*size, twins=twins))))


class Critics(nn.Module):
    """Q1 and Q2: observations (B, o) with actions (B, d) give (2, B), with actions (B, K, d) they give (2, B, K)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int):
        super().__init__()
        fan_in = obs_dim + action_dim
        self.state = Linear(obs_dim, hidden, fan_in, twins=True)
        self.action = Linear(action_dim, hidden, fan_in, bias=False, twins=True)
        self.trunk = trunk(hidden, 1, twins=True)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        state, action = (x.flatten(0, -2).expand(2, -1, -1) for x in (observations, actions))
        hidden = self.state(state)[:, :, None] + self.action(action).unflatten(1, (len(observations), -1))
        return self.trunk(hidden.flatten(1, 2)).view(2, *actions.shape[:-1])


class DiffusionPolicy(nn.Module):
    """Noise prediction eps_theta(s, a_t, t): observations (B, o), a_t (B, d), t (B,) in 0..T-1 give (B, d)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, steps: int, time_dim: int = 16):
        super().__init__()
        frequencies = 10_000 ** (-torch.arange(time_dim // 2) / (time_dim // 2))
        angles = torch.arange(steps)[:, None] * frequencies
        self.register_buffer("sinusoids", torch.cat([angles.sin(), angles.cos()], dim=1) / 4, persistent=False)
        fan_in = obs_dim + action_dim + time_dim
        self.state = Linear(obs_dim, hidden, fan_in)
        self.action = Linear(action_dim, hidden, fan_in, bias=False)
        self.time = nn.Sequential(
            Linear(time_dim, 2 * time_dim),
            Mish(),
            Linear(2 * time_dim, time_dim),
            Linear(time_dim, hidden, fan_in, bias=False),  # the time's share of the first layer
        )
        self.trunk = trunk(hidden, action_dim)

    def forward(self, observations: Tensor, a_t: Tensor, t: Tensor) -> Tensor:
        times = self.time(self.sinusoids)
        # A product, as the compiled gradient of a look-up adds up in the order in which threads happen to come.
        time = F.one_hot(t, len(times)).to(times.dtype) @ times
        return self.trunk(self.state(observations) + self.action(a_t) + time)


def denoising_steps(
    policy: DiffusionPolicy, state: Tensor, time: Tensor, coefficients: Tensor, a_t: Tensor, eps: Tensor
) -> Tensor:
    """k steps of the reverse process on particles a_t (B, N, d), from the last of k rows to the first.

    state (B, 1, hidden) and time (k, hidden) are their shares of the first layer, coefficients (k, 5) rows of
    `Schedule.denoising`, eps (k, B, N, d).
    """
    for i in reversed(range(len(time))):
        predicted_eps = policy.trunk(policy.action(a_t) + (state + time[i]))
        a_t = denoising_step(coefficients[i], a_t, predicted_eps, eps[i])
    return a_t


def min_q(critics: Critics, observations: Tensor, actions: Tensor) -> Tensor:
    """min(Q1, Q2), shapes as in `Critics` but for the 2."""
    return critics(observations, actions).amin(0)


def chunks(batch: int, rows: int, device: torch.device) -> list[slice]:
    """Slices of a batch with `rows` rows per state, so few at once that a CPU keeps them in its cache all the way."""
    states = max(1024 // rows, 1) if device.type == "cpu" else batch
    return [slice(i, i + states) for i in range(0, batch, states)]


# ALGO LOGIC: the agent ------------------------------------------------------------------------------


class ActionNoise(NamedTuple):
    """Standard normal numbers for one `SDAC.sample_action`: B states, N particles, T steps, d dimensions."""

    start: Tensor  # (B, N, d)
    steps: Tensor  # (T, B, N, d)
    exploration: Tensor  # (B, d)


class UpdateNoise(NamedTuple):
    """Random numbers for one `SDAC.update`; None where the policy is not trained or the proposal is a replay action."""

    next_action: ActionNoise
    proposal: ActionNoise | None = None
    t: Tensor | None = None  # (B,) in 0..T-1
    forward: Tensor | None = None  # (B, d), standard normal
    reverse: Tensor | None = None  # (B, M, d), standard normal


def critic_target(rewards: Tensor, dones: Tensor, next_q: Tensor, gamma: float) -> Tensor:
    """y = r + gamma (1 - done) Q(s',a'), all of shape (B,)."""
    return rewards + gamma * (1 - dones) * next_q


def exploration_log_prob(eps: Tensor, std: Tensor) -> Tensor:
    """log N(std eps; 0, std^2 I) of exploration noise eps (B, d) before clipping. Returns (B,)."""
    return (-0.5 * eps**2 - torch.log(std) - 0.5 * math.log(2 * math.pi)).sum(1)


def lambda_loss(log_lambda: Tensor, noise_scale: float, action_dim: int, target_entropy: float) -> Tensor:
    """log lambda * (H(lambda) - Hbar), H = d/2 log(2 pi e (noise_scale lambda)^2) held fixed."""
    entropy = action_dim / 2 * torch.log(2 * math.pi * math.e * (noise_scale * log_lambda.detach().exp()) ** 2)
    return log_lambda * (entropy - target_entropy)


class SDAC(nn.Module):
    """The agent. Actions are in [-1, 1]^d everywhere inside."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        self.schedule = Schedule(args.diffusion_steps)
        self.policy = DiffusionPolicy(obs_dim, action_dim, args.hidden_size, args.diffusion_steps)
        self.critics = Critics(obs_dim, action_dim, args.hidden_size)
        self.log_lambda = nn.Parameter(torch.tensor(math.log(args.lambda_start)))
        self.ema_policy = copy.deepcopy(self.policy).requires_grad_(False)
        self.ema_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.register_buffer("policy_steps", torch.tensor(0))
        adam = partial(torch.optim.Adam, fused=True, capturable=True)  # one kernel, which a CUDA graph may capture
        self.policy_optimizer = adam(self.policy.parameters(), args.policy_lr)
        self.critic_optimizer = adam(self.critics.parameters(), args.q_lr)
        self.lambda_optimizer = adam([self.log_lambda], args.lambda_lr)
        self.optimizers = [self.policy_optimizer, self.critic_optimizer, self.lambda_optimizer]
        self.denoising_steps, self.min_q = compiled(denoising_steps, args), compiled(min_q, args)
        self.critic_gradients, self.policy_gradients = compiled(gradients, args), compiled(gradients, args)

    @property
    def temperature(self) -> Tensor:
        return self.args.temperature * self.log_lambda.detach().exp() / self.args.lambda_start

    @property
    def exploration_std(self) -> Tensor:
        return self.args.noise_scale * self.log_lambda.detach().exp()

    @torch.no_grad()
    def denoise(self, policy: DiffusionPolicy, observations: Tensor, noise: ActionNoise) -> Tensor:
        """Denoise N particles for each of B states, from observations (B, o). Returns (B, N, d) in the box."""
        state, time = policy.state(observations)[:, None], policy.time(policy.sinusoids)
        particles = []
        for rows in chunks(*noise.start.shape[:2], state.device):
            a_t = 0.5 * noise.start[rows]  # the official start N(0, 0.5^2); theory says N(0, 1)
            for end in range(self.args.diffusion_steps, 0, -10):  # ten at once: fewer calls, not too long to compile
                t = slice(max(end - 10, 0), end)
                coefficients, eps = self.schedule.denoising[t], noise.steps[t, rows]
                a_t = self.denoising_steps(policy, state[rows], time[t], coefficients, a_t, eps)
            particles.append(a_t)
        return torch.cat(particles)

    @torch.no_grad()
    def evaluate_actions(self, observations: Tensor, actions: Tensor) -> Tensor:
        """min(Q1, Q2) of the online critics, (B, K), for observations (B, o) and K actions each, (B, K, d)."""
        rows = chunks(len(actions), actions.shape[1], actions.device)
        return torch.cat([self.min_q(self.critics, observations[i], actions[i]) for i in rows])

    @torch.no_grad()
    def sample_action(self, policy: DiffusionPolicy, observations: Tensor, noise: ActionNoise) -> Tensor:
        """Best-of-N, the paper's efficient behaviour policy: of N particles per state keep the one with the
        largest min(Q1, Q2), add exploration noise N(0, (noise_scale lambda)^2 I), clip. Returns (B, d)."""
        particles = self.denoise(policy, observations, noise)
        best = self.evaluate_actions(observations, particles).argmax(dim=1)
        actions = particles[torch.arange(len(best), device=best.device), best]
        return (actions + self.exploration_std * noise.exploration).clamp(-1, 1)

    def act(self, observations: Tensor, explore: bool) -> Tensor:
        """Actions (B, d) of the moving-average policy for observations (B, o)."""
        noise = self.draw_action_noise(len(observations), self.args.num_particles, observations.device)
        if not explore:
            noise = noise._replace(exploration=torch.zeros_like(noise.exploration))
        return self.sample_action(self.ema_policy, observations, noise)

    def draw_action_noise(self, batch: int, particles: int, device: torch.device) -> ActionNoise:
        steps = torch.empty(self.args.diffusion_steps, batch, particles, self.action_dim, device=device)
        for eps in steps:  # one by one, since a CPU keeps one step's noise in its cache
            eps.normal_()
        start, exploration = torch.randn_like(steps[0]), torch.randn(batch, self.action_dim, device=device)
        return ActionNoise(start, steps, exploration)

    def draw_update_noise(self, batch: int, train_policy: bool, device: torch.device) -> UpdateNoise:
        args = self.args
        next_action = self.draw_action_noise(batch, args.target_particles or args.num_particles, device)
        if not train_policy:
            return UpdateNoise(next_action)
        return UpdateNoise(
            next_action,
            self.draw_action_noise(batch, args.num_particles, device) if args.proposal == "policy" else None,
            torch.randint(args.diffusion_steps, (batch,), device=device),
            torch.randn(batch, self.action_dim, device=device),
            torch.randn(batch, args.num_reverse_samples, self.action_dim, device=device),
        )

    @torch.no_grad()
    def target_values(self, batch: Batch, noise: ActionNoise) -> Tensor:
        """y = r + gamma Q(s', a') with a' from the policy, (B,)."""
        args, observations = self.args, batch.next_observations
        next_q = min_q(self.ema_critics, observations, self.sample_action(self.policy, observations, noise))
        if args.soft_critic:
            next_q = next_q - self.temperature * exploration_log_prob(noise.exploration, self.exploration_std)
        return critic_target(args.reward_scale * batch.rewards, batch.dones, next_q, args.gamma)

    def critic_loss(self, batch: Batch, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared errors of both critics against y (B,)."""
        q = self.critics(batch.observations, batch.actions)
        losses, means = (q - y).square().mean(1), q.mean(1)
        names = ("qf1_loss", "qf2_loss", "qf1_values", "qf2_values")
        return losses.sum(), dict(zip(names, (*losses, *means)))

    @torch.no_grad()
    def rssm(self, batch: Batch, noise: UpdateNoise) -> tuple[Tensor, Tensor, Tensor]:
        """Proposal and reverse sampling: a_t (B, d), the regression target of equation (9), (B, d), and the effective
        sample size of its weights, 1 / mean of sum_k w_k^2, from 1 to M."""
        a_0 = batch.actions
        if self.args.proposal == "policy":
            a_0 = self.sample_action(self.policy, batch.observations, noise.proposal)
        a_t, eps = forward_sample(self.schedule, a_0, noise.t, noise.forward), noise.reverse
        if self.args.bounded_reverse_sampling:
            eps = bounded_noise(self.schedule, a_t, noise.t, eps)
        samples = reverse_sample(self.schedule, a_t, noise.t, eps).clamp(-1, 1)
        weights, target = rssm_target(self.evaluate_actions(batch.observations, samples), self.temperature, eps)
        return a_t, target, 1 / weights.square().sum(1).mean()

    def policy_loss(self, batch: Batch, a_t: Tensor, t: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation (9), averaged over batch and action dimensions."""
        loss = F.mse_loss(self.policy(batch.observations, a_t, t), target)
        return loss, {"actor_loss": loss}

    def parts(self, step: int) -> tuple[bool, bool]:
        """Whether this update, counted from 0, trains the policy, and whether it adapts lambda."""
        return step % self.args.policy_frequency == 0, step % self.args.lambda_frequency == 0

    def update(self, batch: Batch, step: int, noise: UpdateNoise | None = None) -> dict[str, Tensor]:
        """One iteration of the paper's algorithm; `step` counts updates from 0. Returns what to log.

        As in the official code, both losses see all networks as they were before this update, and the moving
        averages see them as they are after it.
        """
        args, (train_policy, adapt_lambda) = self.args, self.parts(step)
        noise = noise or self.draw_update_noise(len(batch.rewards), train_policy, batch.rewards.device)

        # Critics: regress on r + gamma Q(s', a'), a' from the policy
        y = self.target_values(batch, noise.next_action)
        grads, metrics = self.critic_gradients(self.critic_loss, self.critics, batch, y)

        # Policy: reverse sampling score matching, with the critics from before their step
        if train_policy:
            a_t, target, metrics["effective_sample_size"] = self.rssm(batch, noise)
            inputs = batch, a_t, noise.t, target
            policy_grads, policy_metrics = self.policy_gradients(self.policy_loss, self.policy, *inputs)
            self.policy_optimizer.param_groups[0]["lr"] = self.decayed_policy_lr()
            descend(self.policy_optimizer, policy_grads)
            metrics |= policy_metrics
        descend(self.critic_optimizer, grads)

        # Lambda: scale of the exploration noise, and through it the temperature
        if adapt_lambda:
            target_entropy = args.target_entropy_scale * self.action_dim
            loss = lambda_loss(self.log_lambda, args.noise_scale, self.action_dim, target_entropy)
            descend(self.lambda_optimizer, torch.autograd.grad(loss, [self.log_lambda]))
            metrics["lambda"], metrics["temperature"] = self.log_lambda.detach().exp(), self.temperature

        # Moving averages
        if train_policy:
            move_average(self.ema_policy, self.policy, args.tau)
            move_average(self.ema_critics, self.critics, args.tau)
        return metrics

    def decayed_policy_lr(self) -> Tensor:
        """Linear decay over the policy's own steps, which it counts."""
        begin, end = self.args.policy_lr_decay_begin, self.args.policy_lr_decay_end
        progress = ((self.policy_steps - begin) / max(end - begin, 1)).clamp(0, 1)
        self.policy_steps += 1
        return self.args.policy_lr + progress * (self.args.policy_lr_end - self.args.policy_lr)


def compiled(function: Callable, args: Args) -> Callable:
    """The function under torch.compile, or as it is with --no-compile."""
    torch._dynamo.config.trace_autograd_ops = True  # let it see gradients(), forward and backward pass, as one
    # On a CPU, C++ goes from kernel to kernel (on CUDA, graphs see to that); a multiply-add is one instruction.
    options = {"cpp_wrapper": not torch.cuda.is_available(), "cpp.enable_floating_point_contract_flag": "fast"}
    return torch.compile(function, dynamic=False, options=options) if args.compile else function


def gradients(loss: Callable, network: nn.Module, *inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Gradients of a network for the loss that `loss(*inputs)` returns first, and the metrics beside it."""
    value, metrics = loss(*inputs)
    grads = torch.autograd.grad(value, list(network.parameters()))
    return grads, {name: metric.detach() for name, metric in metrics.items()}


def descend(optimizer: torch.optim.Optimizer, grads: tuple[Tensor, ...]) -> None:
    """One step of this optimizer with these gradients of its parameters."""
    for parameter, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
        parameter.grad = grad.contiguous()  # on CUDA, torch.compile may have padded it
    optimizer.step()


@torch.no_grad()
def move_average(average: nn.Module, online: nn.Module, tau: float) -> None:
    """average <- (1-tau) average + tau online, parameter by parameter."""
    torch._foreach_lerp_(list(average.parameters()), list(online.parameters()), tau)


# ==== HARNESS: the same text in sac.py, td3.py, qsm.py and sdac.py =================================


SIGNALS: list[int] = []  # SIGINT and SIGTERM received; training stops at the next step
# Arguments that may differ from those of the run that is resumed or evaluated.
CHANGEABLE = {
    "resume", "evaluate", "device", "compile", "total_timesteps", "eval_episodes", "track", "wandb_project_name",
    "wandb_entity", "capture_video",
}  # fmt: skip


class Failure(Exception):
    """Something the user has to know about: ends the program with one line on stderr and exit status 2."""


class Batch(NamedTuple):
    """Transitions, one per row."""

    observations: Tensor  # (B, o)
    actions: Tensor  # (B, d), in [-1, 1]
    next_observations: Tensor  # (B, o), at the end of an episode its true last observation
    rewards: Tensor  # (B,)
    dones: Tensor  # (B,), 1 where the episode terminated; truncation does not count


class ReplayBuffer:
    """The last `size` transitions. Allocated at once, but the system commits memory only as rows are written."""

    def __init__(self, size: int, obs_dim: int, action_dim: int):
        self.size, self.added = size, 0
        shapes = ((size, obs_dim), (size, action_dim), (size, obs_dim), (size,), (size,))
        try:
            self.columns = Batch(*(torch.empty(shape, dtype=torch.float32) for shape in shapes))
        except RuntimeError as error:
            raise Failure(f"no memory for {size:,} transitions: lower --buffer-size") from error

    def __len__(self) -> int:
        return min(self.added, self.size)

    def add(self, *transition: np.ndarray) -> None:
        """Add one row per environment; the oldest ones make room."""
        rows = np.arange(self.added, self.added + len(transition[0])) % self.size
        for column, values in zip(self.columns, transition):
            column.numpy()[rows] = values
        self.added += len(rows)

    def sample(self, batch_size: int, device: torch.device) -> Batch:
        """Uniform with replacement."""
        rows = torch.randint(len(self), (batch_size,))
        return Batch(*(column.index_select(0, rows).to(device) for column in self.columns))

    def state_dict(self) -> dict:
        # Through numpy, a slice gets a storage of its own length, so that only filled rows are written.
        return {"added": self.added, "columns": [torch.from_numpy(c.numpy()[: len(self)]) for c in self.columns]}

    def load_state_dict(self, state: dict) -> None:
        self.added = state["added"]
        for column, values in zip(self.columns, state["columns"]):
            column[: len(values)] = values


def make_envs(env_id: str, num_envs: int, **kwargs) -> gym.vector.VectorEnv:
    """Environments with flat float32 observations and actions in [-1, 1], which reset within the step that ends an
    episode: `step` returns the next episode's first observation, the last one is in `infos["final_obs"]`."""
    wrappers = [
        FlattenObservation,
        lambda env: DtypeObservation(env, np.float32),
        lambda env: RescaleAction(env, np.float32(-1), np.float32(1)),
    ]
    same_step = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    envs = gym.make_vec(
        env_id, num_envs, vectorization_mode="sync", vector_kwargs=same_step, wrappers=wrappers, **kwargs
    )
    return RecordEpisodeStatistics(envs)


def sizes(envs: gym.vector.VectorEnv) -> tuple[int, int]:
    """Number of observation and of action dimensions."""
    return envs.single_observation_space.shape[0], math.prod(envs.single_action_space.shape)


def check_environment(env_id: str, capture_video: bool) -> None:
    """Refuse what `make_envs` and the agents can't handle, and say what would work."""
    try:
        env = gym.make(env_id, render_mode="rgb_array" if capture_video else None)
    except gym.error.UnregisteredEnv:
        near = difflib.get_close_matches(env_id, gym.registry, n=3, cutoff=0.4)
        raise Failure(f"--env-id {env_id} is unknown; close matches: {', '.join(near) or 'none'}") from None
    except Exception as error:
        versions = sorted((i for i in gym.registry if i.split("-v")[0] == env_id.split("-v")[0]), reverse=True)
        works = next((f"; use {i}" for i in versions if can_be_made(i)), "")
        raise Failure(f"--env-id {env_id} can't be made here ({one_line(error)}){works}") from None
    space = env.action_space
    if not isinstance(space, gym.spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise Failure(f"{env_id} has the action space {space}; only continuous (Box) actions work here")
    if not space.is_bounded():
        raise Failure(f"the actions of {env_id} have no bounds; wrap it so that its action space is a finite box")
    if not env.observation_space.is_np_flattenable:
        raise Failure(f"the observations of {env_id} can't be flattened to a vector of fixed size")
    if capture_video:
        try:
            with warnings.catch_warnings(action="ignore"):  # GLFW warns before it fails
                env.reset()
                env.render()
        except Exception as error:
            hint = "set MUJOCO_GL=egl (GPU) or MUJOCO_GL=osmesa (CPU) and install that library"
            raise Failure(f"--capture-video can't render {env_id}: {hint} ({one_line(error)})") from None
    env.close()


def can_be_made(env_id: str) -> bool:
    try:
        gym.make(env_id).close()
        return True
    except Exception:
        return False


def one_line(error: object) -> str:
    return " ".join(str(error).split())[:200]


def parse_arguments(default: Args | None = None) -> Args:
    """The command line over `default`; what tyro can't read becomes a `Failure` of one line."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(Args, default=default, description=__doc__)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        # tyro draws a box: a title, paragraphs between rules, the last of which points to --help
        lines = [line.strip("│╭╮╰╯─ ") for line in message.getvalue().splitlines()]
        lines = [line for line in lines if line.strip("-") and not line.startswith("For full helptext")]
        raise Failure(one_line(" ".join(lines[1:]))) from None


def check_arguments(args: Args) -> None:
    """Refuse numbers outside their range, and combinations that make no sense."""
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if not low <= value <= high:
            raise Failure(f"--{name.replace('_', '-')} must lie in [{low:g}, {high:g}], not {value}")
    if args.batch_size > args.buffer_size:
        raise Failure(f"--batch-size {args.batch_size} is larger than --buffer-size {args.buffer_size}")
    if args.num_envs > args.buffer_size:
        raise Failure(f"--num-envs {args.num_envs} is larger than --buffer-size {args.buffer_size}")
    if not args.exp_name or "/" in args.exp_name:
        raise Failure("--exp-name becomes part of a folder's name: it can't be empty or contain a slash")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Failure("--device cuda: PyTorch finds no CUDA device; use --device cpu")
    if args.resume and args.evaluate:
        raise Failure("--resume goes on training and --evaluate does not: give one of them")


def load_checkpoint(folder: str, algorithm: str) -> dict:
    """The whole checkpoint of a run folder. `weights_only` refuses everything that could run code, and the
    checksums of its zip file, which `torch.load` does not read, find flipped bits."""
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file() or not (Path(folder) / "args.json").is_file():
        raise Failure(f"{folder} is not a run folder with args.json and checkpoint.pt")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"checksum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if checkpoint["algorithm"] != algorithm:
            raise Failure(f"{folder} was written by {checkpoint['algorithm']}, this is {algorithm}")
        Args(**checkpoint["args"])
        written = json.loads((Path(folder) / "args.json").read_text())
        if any(written[name] != value for name, value in checkpoint["args"].items() if name not in CHANGEABLE):
            raise ValueError("args.json says something else")
    except Failure:
        raise
    except Exception as error:
        raise Failure(f"{path} is damaged, or no checkpoint of this script: {one_line(error)}") from None
    return checkpoint


def saved_arguments(checkpoint: dict, folder: str, evaluate: bool) -> Args:
    """The run's arguments, with the command line's where they may differ."""
    default = Args(**checkpoint["args"])
    if evaluate:  # tracked and filmed only if asked for now
        default = dataclasses.replace(default, track=False, capture_video=False)
    args = parse_arguments(default)
    for name, value in checkpoint["args"].items():
        if name not in CHANGEABLE and getattr(args, name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise Failure(f"{flag} {getattr(args, name)} contradicts the run in {folder}, which has {flag} {value}")
    return args


def restore(agent: nn.Module, checkpoint: dict, folder: Path) -> None:
    try:
        agent.load_state_dict(checkpoint["agent"])
    except RuntimeError as error:
        raise Failure(f"{folder} is of another version of this script: {one_line(error)}") from None


def write_whole(path: Path, write) -> None:
    """Write a file beside the old one and move it over it in one step: a crash at any moment leaves a whole file."""
    beside = path.with_name(path.name + ".new")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        reason = error.__context__ or error  # torch.save hides "No space left" behind a RuntimeError
        raise Failure(f"can't write {path}, the old one is still whole: {one_line(reason)}") from None


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict:
    """State of every global random stream, in types that a `weights_only` checkpoint may hold."""
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = torch.from_numpy(numpy_state["state"]["key"])
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict) -> None:
    state["numpy"]["state"]["key"] = state["numpy"]["state"]["key"].numpy()
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])


class CUDAGraphs:
    """A function replayed on the GPU as CUDA graphs: one launch instead of thousands, whose end is not waited for.

    Its first argument is a tensor or a `Batch`, copied into the graph's own; `parts` of the second tells which kernels
    run, and each value has its graph. The first three calls run as they are, so that compilers and optimizers settle,
    the fourth is captured. Results are overwritten by the next call.
    """

    def __init__(self, function: Callable, parts: Callable):
        self.function, self.parts, self.calls, self.graphs = function, parts, Counter(), {}
        self.stream = torch.cuda.Stream()  # autograd wants capture on the stream of the calls before it

    def __call__(self, inputs: Tensor | Batch, argument: bool | int) -> Tensor | dict[str, Tensor]:
        kind = self.parts(argument)
        self.calls[kind] += 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if self.calls[kind] == 4:
                own, graph = tree_map(torch.clone, inputs), torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=self.stream):
                    result = self.function(own, argument)
                self.graphs[kind] = graph, own, result
            if kind in self.graphs:
                graph, own, result = self.graphs[kind]
                tree_map(Tensor.copy_, own, inputs)
                graph.replay()
            else:
                result = self.function(inputs, argument)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result


def compiler_works(args: Args, device: torch.device) -> bool:
    """Whether torch.compile finds what it needs: a C++ compiler for the CPU, Triton for CUDA."""
    try:
        compiled(torch.sin, args)(torch.ones(2, device=device))
    except Exception as error:
        print(f"running without torch.compile, which fails here: {one_line(error)}", flush=True)
        return False
    return True


def evaluate(act: Callable, args: Args, device: torch.device, video_folder: Path, name: str) -> np.ndarray | None:
    """Returns of `--eval-episodes` episodes, (episodes,), without exploration noise; None if a signal came between.

    The environments are new ones on seeds of their own, and the random streams are put back afterwards: how
    often a run is evaluated changes nothing in its training.
    """
    before, seed = random_state(), args.seed + 2**31
    seed_everything(seed)
    envs = make_envs(args.env_id, args.eval_episodes, render_mode="rgb_array" if args.capture_video else None)
    if args.capture_video:
        first = lambda episode: episode == 0  # noqa: E731
        envs.unwrapped.envs[0] = RecordVideo(envs.unwrapped.envs[0], str(video_folder), first, name_prefix=name)
    returns, finished = np.zeros(args.eval_episodes), np.zeros(args.eval_episodes, dtype=bool)
    try:
        observations, _ = envs.reset(seed=seed)
        while not finished.all() and not SIGNALS:
            actions = act(torch.as_tensor(observations, device=device), False).cpu().numpy()
            observations, _, _, _, infos = envs.step(actions.reshape(envs.action_space.shape))
            if "episode" in infos:
                ended = infos["_episode"] & ~finished
                returns[ended] = infos["episode"]["r"][ended]
                finished |= ended
    finally:
        envs.close()
        set_random_state(before)
    return None if SIGNALS else returns


def check_finite(step: int, **quantities) -> None:
    for name, value in quantities.items():
        if not np.isfinite(value).all():
            raise Failure(f"{name} is NaN or infinite at step {step}; the last checkpoint is kept")


def train(agent_class: type, args: Args, folder: Path, checkpoint: dict | None, device: torch.device) -> None:
    """Train until `--total-timesteps` or a signal, from the start or from a checkpoint."""
    seed_everything(args.seed)
    envs = make_envs(args.env_id, args.num_envs)
    obs_dim, action_dim = sizes(envs)
    agent = agent_class(obs_dim, action_dim, args).to(device)
    act, act_evaluated, update = agent.act, agent.act, agent.update
    if args.compile and device.type == "cuda":
        act, act_evaluated = (CUDAGraphs(agent.act, parts=lambda explore: explore) for _ in range(2))
        update = CUDAGraphs(agent.update, agent.parts)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, action_dim)
    step, updates, seconds, evaluations = 0, 0, 0.0, []
    if checkpoint:
        restore(agent, checkpoint, folder)
        for optimizer, state in zip(agent.optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
        buffer.load_state_dict(checkpoint["buffer"])
        step, updates, seconds, evaluations = (checkpoint[k] for k in ("step", "updates", "seconds", "evaluations"))
        set_random_state(checkpoint["random"])
    first_step, saved_step, start = step, step, time.time() - seconds
    line_step, line_time = step, time.time()
    metrics, last_return, last_evaluation = {}, math.nan, evaluations[-1][2] if evaluations else math.nan

    def check_metrics() -> dict[str, float]:
        values = {name: value.item() for name, value in metrics.items()}
        check_finite(step, **values)
        return values

    def save() -> None:
        check_metrics()
        check_finite(step, **{name: value.detach().cpu().numpy() for name, value in agent.named_parameters()})
        state = {
            "algorithm": agent_class.__name__,
            "args": dataclasses.asdict(args) | {"resume": None},
            "step": step,
            "updates": updates,
            "seconds": time.time() - start,
            "evaluations": evaluations,
            "agent": agent.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in agent.optimizers],
            "buffer": buffer.state_dict(),
            "random": random_state(),
        }
        write_whole(folder / "checkpoint.pt", lambda file: torch.save(state, file))

    @contextlib.contextmanager
    def saving_first():
        """An environment that raises ends the run, which can be resumed from here."""
        try:
            yield
        except Exception as error:
            save()
            hint = f"the run can be resumed with --resume {folder}"
            raise Failure(f"{args.env_id} failed at step {step}: {one_line(error)}; {hint}") from error

    def write_evaluations() -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [("step", "updates", "mean", "std", "min", "max", "seconds"), *evaluations]
        )
        write_whole(folder / "evaluations.csv", lambda file: file.write(text.getvalue().encode()))

    write_evaluations()  # a resumed run forgets what came after its checkpoint
    writer = SummaryWriter(folder, purge_step=step + 1 if checkpoint else None)
    writer.add_text(
        "hyperparameters", "\n".join(["|argument|value|", "|-|-|"] + [f"|{k}|{v}|" for k, v in vars(args).items()])
    )
    bar = tqdm(
        total=args.total_timesteps, initial=step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
    )
    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        observations, _ = envs.reset(seed=args.seed + step)
        check_finite(step, observation=observations)
        while True:
            evaluated_step, done = evaluations[-1][0] if evaluations else 0, step >= args.total_timesteps
            if step // args.eval_frequency > evaluated_step // args.eval_frequency or (done and step > evaluated_step):
                check_metrics()
                with saving_first():
                    returns = evaluate(act_evaluated, args, device, folder / "videos", f"step-{step}")
                if returns is not None:
                    check_finite(step, evaluation=returns)
                    last_evaluation = float(returns.mean())
                    numbers = [float(f(returns)) for f in (np.mean, np.std, np.min, np.max)]
                    evaluations.append([step, updates, *numbers, round(time.time() - start, 3)])
                    write_evaluations()
                    writer.add_scalar("eval/episodic_return", last_evaluation, step)
                    if bar.disable:
                        print(f"step {step:,}, {updates:,} updates: evaluation {last_evaluation:.1f}", flush=True)
            if done or SIGNALS or step // args.checkpoint_frequency > saved_step // args.checkpoint_frequency:
                save()
                saved_step = step
            if done or SIGNALS:
                break

            # Act
            if step < args.learning_starts:
                actions = 2 * torch.rand(args.num_envs, action_dim) - 1
            else:
                actions = act(torch.as_tensor(observations, device=device), True).cpu()
            actions = actions.numpy()

            # Learn, before the environments step, so that they step while a GPU learns
            for _ in range(args.updates_per_step if step >= args.learning_starts and len(buffer) else 0):
                metrics |= update(buffer.sample(args.batch_size, device), updates)
                updates += 1
                if updates % 100 == 0:
                    for name, value in check_metrics().items():
                        writer.add_scalar(f"losses/{name}", value, step)
                    writer.add_scalar("charts/SPS", int((step - first_step) / (time.time() - start - seconds)), step)

            # Step
            with saving_first():
                transition = envs.step(actions.reshape(envs.action_space.shape))
            next_observations, rewards, terminations, truncations, infos = transition

            # Remember
            true_next_observations = next_observations.copy()
            for i in np.flatnonzero(terminations | truncations):
                true_next_observations[i] = infos["final_obs"][i]
            check_finite(step, observation=[true_next_observations, next_observations], reward=rewards)
            buffer.add(observations, actions, true_next_observations, rewards, terminations)
            observations = next_observations
            step += args.num_envs

            # Report
            for i in np.flatnonzero(infos.get("_episode", ())):
                last_return = float(infos["episode"]["r"][i])
                writer.add_scalar("charts/episodic_return", last_return, step)
                writer.add_scalar("charts/episodic_length", infos["episode"]["l"][i], step)
            bar.set_postfix({"return": f"{last_return:.1f}", "eval": f"{last_evaluation:.1f}"}, refresh=False)
            bar.update(args.num_envs)
            if bar.disable and time.time() - line_time > 30:
                speed = (step - line_step) / (time.time() - line_time)
                line_step, line_time = step, time.time()
                left = tqdm.format_interval(max(args.total_timesteps - step, 0) / speed)
                print(
                    f"step {step:,} of {args.total_timesteps:,}, {speed:.0f} steps/s, return {last_return:.1f}, "
                    f"evaluation {last_evaluation:.1f}, {left} left",
                    flush=True,
                )
    finally:
        bar.close()
        writer.close()
        envs.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def on_signal(number: int, frame: object) -> None:
    """Let the step in progress end; a second signal of the kind acts at once."""
    SIGNALS.append(number)
    signal.signal(number, signal.SIG_DFL)


def run(agent_class: type) -> None:
    torch.set_flush_denormal(True)  # a CPU is slow with numbers below 1e-38; threads started from now on inherit this
    warnings.filterwarnings("ignore", module="gymnasium")  # out-of-date versions, precision of bounds
    warnings.filterwarnings("ignore", message=".*constructed with capturable=True")  # not every step is captured
    args = parse_arguments()
    check_arguments(args)
    checkpoint, source = None, args.resume or args.evaluate
    if source:
        checkpoint = load_checkpoint(source, agent_class.__name__)
        args = saved_arguments(checkpoint, source, bool(args.evaluate))
        check_arguments(args)
    check_environment(args.env_id, args.capture_video)
    if args.track:
        import wandb

        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
            raise Failure("--track: not logged in to W&B; run `wandb login`, or set WANDB_MODE=offline")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if args.compile and not compiler_works(args, device):
        args = dataclasses.replace(args, compile=False)

    if args.evaluate:
        envs = make_envs(args.env_id, 1)
        agent = agent_class(*sizes(envs), args).to(device)
        envs.close()
        restore(agent, checkpoint, Path(source))
        returns = evaluate(agent.act, args, device, Path(source) / "videos", "evaluate")
        for i, value in enumerate(returns):
            print(f"episode {i}: return {value:.2f}")
        print(f"mean {returns.mean():.2f}, standard deviation {returns.std():.2f} over {len(returns)} episodes")
        return

    if args.resume:
        folder = Path(args.resume)
    else:
        name = f"{re.sub('[/:]', '-', args.env_id)}__{args.exp_name}__{args.seed}"
        while True:
            folder = Path("runs") / f"{name}__{int(time.time())}"
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:  # another run of the same second
                time.sleep(0.1)
            except OSError as error:
                raise Failure(f"can't make the run folder {folder}: {one_line(error)}") from None
        write_whole(folder / "args.json", lambda file: file.write(json.dumps(vars(args), indent=2).encode()))
    if args.track:
        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            id=folder.resolve().name,
            name=folder.resolve().name,
            resume="allow",
            config=vars(args),
            sync_tensorboard=True,
            save_code=True,
        )
    print(f"{args.env_id} on {device}, run folder {folder}", flush=True)
    train(agent_class, args, folder, checkpoint, device)
    if args.track:
        wandb.finish()
    print(f"{'stopped; go on with --resume' if SIGNALS else 'done:'} {folder}")
    if SIGNALS:
        sys.exit(128 + SIGNALS[0])


def main(agent_class: type) -> None:
    try:
        run(agent_class)
    except Failure as failure:
        print(f"{Path(__file__).name}: error: {failure}", file=sys.stderr)
        sys.exit(2)


# ==== END OF HARNESS ===============================================================================


if __name__ == "__main__":
    main(SDAC)
