# SPDX-License-Identifier: MIT
"""Q-Score Matching (QSM): a diffusion policy whose score is trained to be the critic's action gradient.

Psenka, Escontrela, Abbeel, Ma: "Learning a Diffusion Model Policy from Rewards via Q-Score Matching", ICML 2024,
arXiv 2312.11752. Only the denoiser is differentiated, never the sampling chain.

    a_t = sqrt(abar_t) a + sqrt(1-abar_t) eps,   a from the replay buffer, eps ~ N(0, I)                    (1)
    y = r + gamma (1-done) min_j Qbar_j(s', a'),   a' = clip(DDPM sample + N(0, 0.1^2 I), -1, 1)   critics     (2)
    J_pi = E |eps_theta(s,a_t,t) + M_q ∇_a Q(s,a_t)|^2,   Q the mean of both critics            policy      (3)

The sign: a denoiser predicts the noise that was added, so its score is -eps_theta / sqrt(1-abar_t). The optimum of (3)
is eps_theta = -M_q ∇_a Q, hence the score is +M_q ∇_a Q / sqrt(1-abar_t), and denoising climbs Q.

M_q is the explore/exploit dial: a score c ∇Q belongs to the density exp(c Q), so M_q acts as an inverse temperature;
the larger, the greedier the policy.

The known weakness: (3) takes ∇_a Q at the *noised* action, and exp(Q) noised is another density than exp(Q) with its
score rescaled. For quadratic Q both scores are at least linear, with different slopes; else their shapes differ too,
little at the least noise and by more than half from moderate noise on (on a mixture, in tests/test_qsm.py).
Reverse sampling score matching (sdac.py) has no such bias and needs no gradient of Q.

Usage:
    python qsm.py --env-id HalfCheetah-v4
    python qsm.py --resume runs/RUN_FOLDER
    python qsm.py --evaluate runs/RUN_FOLDER --eval-episodes 10

Departures from the official code (JAX, Alescontrela/score_matching_rl): the state's share of the policy's first layer
is computed once per state instead of once per denoising step, which is the same function. The loss is averaged over
action dimensions, not summed, which Adam ignores. Its README prints (3) with
the opposite sign. Counting denoising steps from 0, time enters the network as the plain index t = 0..T-1.
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
    exp_name: str = "qsm"
    """name of the experiment, part of the run folder's name"""
    env_id: str = "HalfCheetah-v4"
    """id of a gymnasium environment with bounded continuous actions; `module:id` imports the module first"""
    seed: int = 1
    """seed of everything random"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the networks live; auto takes CUDA if there is one"""
    compile: bool = True
    """torch.compile what is slow, and on CUDA replay whole updates as graphs"""
    total_timesteps: int = 1_000_000
    """environment steps of the whole run, summed over the environments"""
    num_envs: int = 1
    """environments that step together"""
    updates_per_step: int = 1
    """updates after each such vector step"""
    learning_starts: int = 10_000
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
    """step size of the target critics' moving average"""
    q_lr: float = 3e-4
    """learning rate of the critics"""
    policy_lr: float = 3e-4
    """learning rate of the policy at first; a half cosine takes it to 0"""
    policy_lr_steps: int = 2_000_000
    """policy updates that this takes"""
    q_gradient_scale: float = 50.0
    """M_q, an inverse temperature: larger is greedier (the authors suggest 120 for humanoid and quadruped)"""
    exploration_noise: float = 0.1
    """standard deviation of the noise on actions played, and on the critics' target actions"""
    diffusion_steps: int = 5
    """denoising steps T"""
    hidden_size: int = 512
    """width of the two hidden layers of critics and policy"""


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
    "policy_lr_steps": (1, 10**12),
    "q_gradient_scale": (0.0, 1e6),
    "exploration_noise": (0.0, 10.0),
    "diffusion_steps": (2, 1000),
    "hidden_size": (1, 10_000),
}  # argument: smallest and largest value


# ALGO LOGIC: diffusion and the score's target -------------------------------------------------------


class Schedule(nn.Module):
    """Variance-preserving noise schedule; the paper's steps 1..T are t = 0..T-1 here.

    alpha_t = exp(-b_min/T - (b_max - b_min) (2t+1) / (2 T^2)) with b_min = 0.1, b_max = 10, so that
    log abar_t = -b_min (t+1)/T - (b_max - b_min) (t+1)^2 / (2 T^2). Worked out in float64. Tables of shape (T,):
    `signal` = sqrt(abar_t), `noise` = sqrt(1 - abar_t). Rows of `denoising`, (T, 3), hold what a step of the sampler
    needs: shrink = (1-alpha_t) / sqrt(1-abar_t), grow = 1 / sqrt(alpha_t), std = sqrt(1 - alpha_t), 0 at t = 0.
    """

    def __init__(self, steps: int, b_min: float = 0.1, b_max: float = 10.0):
        super().__init__()
        t = torch.arange(steps, dtype=torch.float64)
        log_alpha = -b_min / steps - (b_max - b_min) * (2 * t + 1) / (2 * steps**2)
        beta, log_abar = -torch.expm1(log_alpha), torch.cumsum(log_alpha, dim=0)
        one_minus_abar = -torch.expm1(log_abar)
        shrink, grow, std = beta / one_minus_abar.sqrt(), (-log_alpha / 2).exp(), beta.sqrt() * (t > 0)
        denoising = torch.stack([shrink, grow, std], dim=1)
        tables = {"signal": (log_abar / 2).exp(), "noise": one_minus_abar.sqrt(), "denoising": denoising}
        for name, table in tables.items():
            self.register_buffer(name, table.to(torch.get_default_dtype()), persistent=False)


def forward_sample(schedule: Schedule, actions: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Noise actions, equation (1): actions and eps (B, d), t (B,)."""
    return schedule.signal[t, None] * actions + schedule.noise[t, None] * eps


def denoising_step(coefficients: Tensor, a_t: Tensor, predicted_eps: Tensor, eps: Tensor) -> Tensor:
    """One DDPM step a_t -> a_{t-1}, all (B, d), clipped to the box. `coefficients` is row t of `Schedule.denoising`;
    at t = 0 its std is 0, so that no noise is added."""
    shrink, grow, std = coefficients
    return (grow * (a_t - shrink * predicted_eps) + std * eps).clamp(-1, 1)


def qsm_target(critics: Callable, observations: Tensor, a_t: Tensor, q_gradient_scale: float) -> Tensor:
    """Regression target of equation (3): -M_q ∇_a Q(s, a_t), (B, d), of the mean of the critics, held fixed."""
    with torch.enable_grad():
        a_t = a_t.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(critics(observations, a_t).mean(0).sum(), a_t)
    return -q_gradient_scale * gradient


# ALGO LOGIC: networks -------------------------------------------------------------------------------


class Linear(nn.Module):
    """x W + b, (..., i) to (..., j), initialised like the official code's: W Xavier uniform, b = 0. With twins=True a
    layer for each critic, in one batched product: (2, B, i) to (2, B, j).

    The bias is a sum of its own, for torch.compile to fuse with what follows.
    """

    def __init__(
        self, in_features: int, out_features: int, fan_in: int | None = None, bias: bool = True, twins: bool = False
    ):
        super().__init__()
        bound = math.sqrt(6 / ((fan_in or in_features) + out_features))
        shape = (2, in_features, out_features) if twins else (in_features, out_features)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(*shape[:-2], 1, out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else x @ self.weight + self.bias


class Mish(nn.Module):
    """x tanh(log(1 + e^x)) = x n/(n+2) = x - x/(n/2+1) with n = e^x (e^x + 2), which takes one exponential."""

    def forward(self, x: Tensor) -> Tensor:
        # Above 20 the fraction is lost in rounding; where exp overflows it is 0, as it should be, but its gradient NaN.
        e = (x.clamp(max=20) if torch.is_grad_enabled() else x).exp()
        return x - x / (e * (e / 2 + 1) + 1)


class Critics(nn.Module):
    """Q1 and Q2: observations (B, o) and actions (B, d) give (2, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(
            Linear(obs_dim + action_dim, hidden, twins=True),
            nn.ReLU(),
            Linear(hidden, hidden, twins=True),
            nn.ReLU(),
            Linear(hidden, 1, twins=True),
        )

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat([observations, actions], dim=1).expand(2, -1, -1)).squeeze(2)


class DiffusionPolicy(nn.Module):
    """Noise prediction eps_theta(s, a_t, t): observations (B, o), a_t (B, d), t (B,) in 0..T-1 give (B, d).

    The first layer is split by input, W [a; s; c] = W_a a + W_s s + W_c c, so that a sampler computes the state's
    share once, and those of all times c together.
    """

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, steps: int, time_dim: int = 64, cond_dim: int = 128):
        super().__init__()
        self.steps = steps
        self.frequencies = nn.Parameter(0.2 * torch.randn(time_dim // 2))
        fan_in = action_dim + obs_dim + cond_dim
        self.time = nn.Sequential(
            Linear(time_dim, cond_dim),
            Mish(),
            Linear(cond_dim, cond_dim),
            Linear(cond_dim, hidden, fan_in, bias=False),
        )
        self.state = Linear(obs_dim, hidden, fan_in)
        self.action = Linear(action_dim, hidden, fan_in, bias=False)
        self.trunk = nn.Sequential(Mish(), Linear(hidden, hidden), Mish(), Linear(hidden, action_dim))

    def times(self) -> Tensor:
        """The first layer's share of every time step, (T, hidden), from learned Fourier features."""
        angles = 2 * math.pi * torch.arange(self.steps, device=self.frequencies.device)[:, None] * self.frequencies
        return self.time(torch.cat([angles.cos(), angles.sin()], dim=1))

    def forward(self, observations: Tensor, a_t: Tensor, t: Tensor) -> Tensor:
        times = self.times()
        # A product, as the compiled gradient of a look-up adds up in the order in which threads happen to come.
        time = F.one_hot(t, len(times)).to(times.dtype) @ times
        return self.trunk(self.action(a_t) + self.state(observations) + time)


def denoising_steps(
    policy: DiffusionPolicy, state: Tensor, time: Tensor, coefficients: Tensor, a_t: Tensor, eps: Tensor
) -> Tensor:
    """k steps of the sampler on a_t (B, d), from the last of k rows to the first: state (B, hidden) and time
    (k, hidden) are their shares of the first layer, coefficients (k, 3) rows of `Schedule.denoising`, eps (k, B, d)."""
    for i in reversed(range(len(time))):
        predicted_eps = policy.trunk(policy.action(a_t) + (state + time[i]))
        a_t = denoising_step(coefficients[i], a_t, predicted_eps, eps[i])
    return a_t


# ALGO LOGIC: the agent ------------------------------------------------------------------------------


class ActionNoise(NamedTuple):
    """Standard normal numbers for one `QSM.sample_action`: B states, T steps, d dimensions."""

    start: Tensor  # (B, d)
    steps: Tensor  # (T, B, d)
    exploration: Tensor  # (B, d)


class UpdateNoise(NamedTuple):
    """Random numbers for one `QSM.update`."""

    next_action: ActionNoise
    t: Tensor  # (B,) in 0..T-1
    forward: Tensor  # (B, d), standard normal


def critic_target(rewards: Tensor, dones: Tensor, next_q: Tensor, gamma: float) -> Tensor:
    """Equation (2), all of shape (B,)."""
    return rewards + gamma * (1 - dones) * next_q


class QSM(nn.Module):
    """The agent. Actions are in [-1, 1]^d everywhere inside."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args, self.action_dim = args, action_dim
        self.schedule = Schedule(args.diffusion_steps)
        self.policy = DiffusionPolicy(obs_dim, action_dim, args.hidden_size, args.diffusion_steps)
        self.critics = Critics(obs_dim, action_dim, args.hidden_size)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        adam = partial(torch.optim.Adam, fused=True, capturable=True)  # one kernel, which a CUDA graph may capture
        self.policy_optimizer = adam(self.policy.parameters(), args.policy_lr)
        self.critic_optimizer = adam(self.critics.parameters(), args.q_lr)
        self.optimizers = [self.policy_optimizer, self.critic_optimizer]
        self.register_buffer("policy_steps", torch.tensor(0))
        self.denoising_steps = compiled(denoising_steps, args)
        self.critic_gradients, self.policy_gradients = compiled(gradients, args), compiled(gradients, args)

    @torch.no_grad()
    def sample_action(self, observations: Tensor, noise: ActionNoise) -> Tensor:
        """DDPM sample plus exploration noise, clipped: (B, d) for observations (B, o)."""
        state, time, a_t = self.policy.state(observations), self.policy.times(), noise.start
        for end in range(self.args.diffusion_steps, 0, -5):  # five at once: fewer calls, little to compile
            t = slice(max(end - 5, 0), end)
            coefficients, eps = self.schedule.denoising[t], noise.steps[t]
            a_t = self.denoising_steps(self.policy, state, time[t], coefficients, a_t, eps)
        return (a_t + self.args.exploration_noise * noise.exploration).clamp(-1, 1)

    def act(self, observations: Tensor, explore: bool) -> Tensor:
        """Actions (B, d) for observations (B, o)."""
        noise = self.draw_action_noise(len(observations), observations.device)
        if not explore:
            noise = noise._replace(exploration=torch.zeros_like(noise.exploration))
        return self.sample_action(observations, noise)

    def draw_action_noise(self, batch: int, device: torch.device) -> ActionNoise:
        noise = torch.randn(self.args.diffusion_steps + 2, batch, self.action_dim, device=device)
        return ActionNoise(noise[0], noise[2:], noise[1])

    def draw_update_noise(self, batch: int, device: torch.device) -> UpdateNoise:
        t = torch.randint(self.args.diffusion_steps, (batch,), device=device)
        forward = torch.randn(batch, self.action_dim, device=device)
        return UpdateNoise(self.draw_action_noise(batch, device), t, forward)

    def parts(self, step: int) -> None:
        """Every update does the same."""

    def critic_loss(self, batch: Batch, next_actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Squared errors against the value of the policy's next actions (B, d)."""
        with torch.no_grad():
            next_q = self.target_critics(batch.next_observations, next_actions).amin(0)
            y = critic_target(batch.rewards, batch.dones, next_q, self.args.gamma)
        q = self.critics(batch.observations, batch.actions)
        losses, means = (q - y).square().mean(1), q.mean(1)
        names = ("qf1_loss", "qf2_loss", "qf1_values", "qf2_values")
        return losses.sum(), dict(zip(names, (*losses, *means)))

    def policy_loss(self, batch: Batch, t: Tensor, eps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation (3): the action gradient of the critics at noised actions, for t (B,) and eps (B, d)."""
        a_t = forward_sample(self.schedule, batch.actions, t, eps)
        target = qsm_target(self.critics, batch.observations, a_t, self.args.q_gradient_scale)
        loss = F.mse_loss(self.policy(batch.observations, a_t, t), target)
        q_gradient = target.norm(dim=1).mean() / max(self.args.q_gradient_scale, 1e-12)
        return loss, {"actor_loss": loss, "q_gradient": q_gradient}

    def update(self, batch: Batch, step: int, noise: UpdateNoise | None = None) -> dict[str, Tensor]:
        """One iteration of the paper's Algorithm 1; `step` counts updates from 0. Returns what to log."""
        noise = noise or self.draw_update_noise(len(batch.rewards), batch.rewards.device)

        # Critics, with their moving averages
        next_actions = self.sample_action(batch.next_observations, noise.next_action)
        grads, metrics = self.critic_gradients(self.critic_loss, self.critics, batch, next_actions)
        descend(self.critic_optimizer, grads)
        move_average(self.target_critics, self.critics, self.args.tau)

        # Policy: match the score with the action gradient of the critics after their step
        grads, policy_metrics = self.policy_gradients(self.policy_loss, self.policy, batch, noise.t, noise.forward)
        self.policy_optimizer.param_groups[0]["lr"] = self.decayed_policy_lr()
        descend(self.policy_optimizer, grads)
        return metrics | policy_metrics

    def decayed_policy_lr(self) -> Tensor:
        """Cosine decay to 0 over the policy's own steps, which it counts."""
        progress = (self.policy_steps / self.args.policy_lr_steps).clamp(max=1)
        self.policy_steps += 1
        return self.args.policy_lr * (1 + (math.pi * progress).cos()) / 2


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
    main(QSM)
