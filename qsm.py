# SPDX-License-Identifier: MIT
"""Q-Score Matching (QSM): a diffusion policy whose score is trained to be the critic's action gradient.

Psenka, Escontrela, Abbeel, Ma: "Learning a Diffusion Model Policy from Rewards via Q-Score Matching", ICML 2024,
arXiv 2312.11752. Nothing is differentiated through the sampling chain.

    a_t = sqrt(abar_t) a + sqrt(1-abar_t) eps,   a from the replay buffer, eps ~ N(0, I)                    (1)
    y = r + gamma (1-done) min_j Qbar_j(s', a'),   a' = clip(sample of (5) + N(0, 0.1^2 I), -1, 1)          (2)
    J_Q = sum_j E (Q_j(s,a) - y)^2                                                              critics     (3)
    J_pi = E |eps_theta(s,a_t,t) + M_q ∇_a Q(s,a_t)|^2,   Q the mean of both critics            policy      (4)
    a_{t-1} = (a_t - beta_t eps_theta(s,a_t,t) / sqrt(1-abar_t)) / sqrt(1-beta_t) + sqrt(beta_t) z          (5)

with target critics Qbar, done = 1 where s' is terminal, and t = 0..T-1, so that a_0 is noised too. Sampling starts from
N(0, I) at t = T-1; every step (5) has z ~ N(0, I) and is clipped to [-1, 1], but at t = 0 z is 0, and the result is the
action. The sign: a denoiser predicts the noise that was added, so its score is -eps_theta / sqrt(1-abar_t). The optimum
of (4) is eps_theta = -M_q ∇_a Q, hence the score is +M_q ∇_a Q / sqrt(1-abar_t), which points uphill. (The authors'
README has a minus in (4), their code has not.)

M_q trades off exploration and exploitation: a score c ∇Q belongs to the density exp(c Q), so M_q / sqrt(1-abar_t)
acts as an inverse temperature. But every step scales a_t up and adds a multiple of M_q ∇_a Q; for T = 5 the last one,
without noise, is 1.12 a_0 + 0.49 M_q ∇_a Q: a large M_q leads beyond the maximum of Q, to the walls of [-1, 1]^d.

The algorithm:
     1  repeat
     2      act: a as a' in (2), at first uniformly random and without lines 4 to 7; the environment returns r, s', done
     3      store (s, a, s', r, done) in the replay buffer, and draw a batch from it
     4      next actions: a' by (2), sampled by (5)
     5      critics: one step of Adam on J_Q, with y by (2)
     6      target critics: Qbar <- (1-tau) Qbar + tau Q
     7      policy: t uniform, a_t by (1), one step of Adam on J_pi, the gradient of Q held fixed

The known weakness: (4) takes ∇_a Q at the *noised* action, which may lie outside the box, where Q is not trained; and
the score of exp(Q), noised by (1), is in general no multiple of that gradient. For a concave quadratic Q that score is
affine in a_t, as M_q ∇_a Q / sqrt(1-abar_t) is, but their slopes depend on t in different ways, and their zeros
differ unless Q is largest at 0. Reverse sampling score matching (sdac.py) has no such bias and needs no gradient of Q.

Usage:
    python qsm.py --env-id HalfCheetah-v4 --q-gradient-scale 5
    python qsm.py --resume runs/RUN_FOLDER
    python qsm.py --evaluate runs/RUN_FOLDER --eval-episodes 10

Departure from the official code (JAX, Alescontrela/score_matching_rl): the state's share of the policy's first layer is
computed once per state instead of once per denoising step, which is the same function.
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
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(config={"extra": "forbid"})
class Args:
    exp_name: Annotated[str, Field(pattern="^[^/]+$")] = "qsm"  # name of the experiment, part of the run folder's name
    env_id: str = "HalfCheetah-v4"  # gymnasium id; `module:id` imports the module first
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1  # seed of PyTorch and of the environments
    device: Literal["auto", "cpu", "cuda"] = "auto"  # device of the networks; auto uses CUDA if available
    compile: bool = True  # use torch.compile, which needs a C++ compiler, or Triton on CUDA
    total_timesteps: Count = 1_000_000  # environment steps of the whole run, summed over the environments
    num_envs: Count = 1  # parallel environments
    updates_per_step: Count = 1  # updates after each step of all environments together
    learning_starts: Annotated[int, Field(ge=0)] = 10_000  # environment steps of random actions before the first update
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
    tau: Fraction = 0.005  # step size of the target critics' moving average
    q_lr: Fraction = 3e-4  # learning rate of the critics
    policy_lr: Fraction = 3e-4  # initial learning rate of the policy; half-cosine decay to 0
    policy_lr_steps: Count = 2_000_000  # policy updates until policy_lr is 0, about twice those of the default run
    q_gradient_scale: NotNegative = 50.0  # M_q; the authors' 50; 5 learned faster on HalfCheetah-v4
    exploration_noise: NotNegative = 0.1  # standard deviation of the noise on actions, in acting and in targets
    diffusion_steps: Annotated[int, Field(ge=2, le=1000)] = 5  # denoising steps T
    hidden_size: Count = 512  # width of the two hidden layers of critics and policy


# ALGO LOGIC: diffusion ----------------------------------------------------------------------------------------------


class Schedule(nn.Module):
    """Variance-preserving noise schedule; the paper's steps 1..T are t = 0..T-1 here.

    alpha_t = exp(-b_min/T - (b_max - b_min) (2t+1) / (2 T^2)) with b_min = 0.1, b_max = 10, beta_t = 1 - alpha_t, and
    abar_t is the product of all alpha up to t. The tables (T,) are computed in float64.
    """

    def __init__(self, steps: int, b_min: float = 0.1, b_max: float = 10.0):
        super().__init__()
        t = torch.arange(steps, dtype=torch.float64)
        log_alpha = -b_min / steps - (b_max - b_min) * (2 * t + 1) / (2 * steps**2)
        log_abar = torch.cumsum(log_alpha, dim=0)
        beta, one_minus_abar = -torch.expm1(log_alpha), -torch.expm1(log_abar)
        tables = {
            "sqrt_abar": (log_abar / 2).exp(),
            "sqrt_1m_abar": one_minus_abar.sqrt(),
            "eps_factor": beta / one_minus_abar.sqrt(),
            "scale": (-log_alpha / 2).exp(),
            "std": beta.sqrt() * (t > 0),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.to(torch.get_default_dtype()), persistent=False)

    def noised(self, actions: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """a_t, equation (1), for actions and eps (B, d) and t (B,)."""
        return self.sqrt_abar[t, None] * actions + self.sqrt_1m_abar[t, None] * eps


# SPEED: "1.6 times" means 1.6 times as many updates per second, at Humanoid-v4's sizes, on one core of a Xeon ---------


class Mish(nn.Module):
    """x tanh(log(1 + e^x)) = x n/(n+2) = x - x/(n/2+1) with n = e^x (e^x + 2): 1.2 times nn.Mish's updates/s."""

    def forward(self, x: Tensor) -> Tensor:
        # Where exp overflows, the fraction is rightly 0 but its gradient NaN; above 20 it is lost in rounding anyway.
        e = (x.clamp(max=20) if torch.is_grad_enabled() else x).exp()
        return x - x / (e * (e / 2 + 1) + 1)


# ALGO LOGIC: networks -----------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """x W + b, (..., i) to (..., j). As in the official code, b = 0 at first and W is Xavier uniform; fan_in is i, or
    the whole layer's for a part (see `Policy`). twins=True: two layers as one product, (2, B, i) to (2, B, j)."""

    def __init__(self, in_features: int, out_features: int, fan_in: int | None = None, bias=True, twins=False):
        super().__init__()
        bound, twice = math.sqrt(6 / ((fan_in or in_features) + out_features)), (2,) if twins else ()
        self.weight = nn.Parameter(torch.empty(*twice, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(*twice, 1, out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else x @ self.weight + self.bias


class Critics(nn.Module):
    """Q1 and Q2: observations (B, o) and actions (B, d) give (2, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int):
        super().__init__()
        first, second = Linear(obs_dim + action_dim, hidden, twins=True), Linear(hidden, hidden, twins=True)
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), Linear(hidden, 1, twins=True))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat([observations, actions], dim=1).expand(2, -1, -1)).squeeze(2)


class Policy(nn.Module):
    """Noise prediction eps_theta(s, a_t, t): observations (B, o), a_t (B, d), t (B,) in 0..T-1 give (B, d). The first
    layer is split by input, [a, s, c] W = a W_a + s W_s + c W_c, with c made from t; `time_layers` end with W_c."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, steps: int, time_dim: int = 64, cond_dim: int = 128):
        super().__init__()
        self.steps, fan_in = steps, action_dim + obs_dim + cond_dim
        self.frequencies = nn.Parameter(0.2 * torch.randn(time_dim // 2))  # learned Fourier features of t
        self.time_layers = nn.Sequential(
            Linear(time_dim, cond_dim), Mish(), Linear(cond_dim, cond_dim), Linear(cond_dim, hidden, fan_in, bias=False)
        )
        self.state_layer = Linear(obs_dim, hidden, fan_in)
        self.action_layer = Linear(action_dim, hidden, fan_in, bias=False)
        self.trunk = nn.Sequential(Mish(), Linear(hidden, hidden), Mish(), Linear(hidden, action_dim))

    def time_share(self, t: Tensor) -> Tensor:
        """The share of t (n,) in the first layer, (n, hidden)."""
        angles = 2 * math.pi * t[:, None] * self.frequencies
        return self.time_layers(torch.cat([angles.cos(), angles.sin()], dim=1))

    def forward(self, observations: Tensor, a_t: Tensor, t: Tensor) -> Tensor:
        # T rows instead of B through the time layers; a product, since the gradient of indexing is slow to accumulate
        time = F.one_hot(t, self.steps).to(a_t.dtype) @ self.time_share(torch.arange(self.steps, device=t.device))
        return self.trunk(self.state_layer(observations) + self.action_layer(a_t) + time)


@torch.compile(dynamic=False, mode="reduce-overhead")
def denoise(policy: Policy, schedule: Schedule, observations: Tensor, a_t: Tensor, z: Tensor) -> Tensor:
    """Actions (B, d) by (5) from a_t (B, d) for observations (B, o), with z (T, B, d) ~ N(0, I)."""
    state, times = policy.state_layer(observations), policy.time_share(torch.arange(len(z), device=z.device))
    for t in reversed(range(len(z))):
        predicted_eps = policy.trunk(state + policy.action_layer(a_t) + times[t])
        a_t = schedule.scale[t] * (a_t - schedule.eps_factor[t] * predicted_eps) + schedule.std[t] * z[t]
        a_t = a_t.clamp(-1, 1)
    return a_t


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


class QSM(nn.Module):
    """The agent. Actions are clipped to [-1, 1]^d, at each denoising step too; a_t in (4) is not."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args, self.action_dim, self.updates = args, action_dim, 0
        self.schedule = Schedule(args.diffusion_steps)
        self.policy = Policy(obs_dim, action_dim, args.hidden_size, args.diffusion_steps)
        self.critics = Critics(obs_dim, action_dim, args.hidden_size)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), args.policy_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), args.q_lr, fused=True)
        self.optimizers = [self.policy_optimizer, self.critic_optimizer]

    @torch.no_grad()
    def act(self, observations: Tensor, explore: bool) -> Tensor:
        """Actions (B, d) for observations (B, o): DDPM samples, with exploration noise or without."""
        shape, device = (len(observations), self.action_dim), observations.device
        start, z = torch.randn(shape, device=device), torch.randn(self.args.diffusion_steps, *shape, device=device)
        actions = denoise(self.policy, self.schedule, observations, start, z).clone()  # CUDA graphs reuse their memory
        if explore:
            actions = (actions + self.args.exploration_noise * torch.randn_like(actions)).clamp(-1, 1)
        return actions

    def critic_loss(self, batch: Batch, next_actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation (3): squared errors against the target values, equation (2), for the next actions a' (B, d)."""
        with torch.no_grad():
            next_q = self.target_critics(batch.next_observations, next_actions).amin(0)
            y = batch.rewards + self.args.gamma * (1 - batch.dones) * next_q
        q = self.critics(batch.observations, batch.actions)
        (qf1_loss, qf2_loss), (q1, q2) = (q - y).square().mean(1), q.mean(1)
        metrics = {"qf1_loss": qf1_loss, "qf2_loss": qf2_loss, "qf1_values": q1, "qf2_values": q2}
        return qf1_loss + qf2_loss, metrics

    def policy_loss(self, batch: Batch, t: Tensor, eps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation (4), averaged over action dimensions too, for t (B,) and eps (B, d)."""
        a_t = self.schedule.noised(batch.actions, t, eps).requires_grad_()
        (q_gradient,) = torch.autograd.grad(self.critics(batch.observations, a_t).mean(0).sum(), a_t)
        target = -self.args.q_gradient_scale * q_gradient
        loss = F.mse_loss(self.policy(batch.observations, a_t.detach(), t), target)
        return loss, {"actor_loss": loss, "q_gradient": q_gradient.norm(dim=1).mean()}

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Lines 4 to 7 of the algorithm, numbered here too. Returns what to log."""
        next_actions = self.act(batch.next_observations, explore=True)  # 4
        metrics = minimize(self.critic_optimizer, self.critic_loss, batch, next_actions)  # 5
        move_average(self.target_critics, self.critics, self.args.tau)  # 6
        t = torch.randint(self.args.diffusion_steps, batch.rewards.shape, device=batch.rewards.device)  # 7
        progress = min(self.updates / self.args.policy_lr_steps, 1)
        self.policy_optimizer.param_groups[0]["lr"] = self.args.policy_lr * (1 + math.cos(math.pi * progress)) / 2
        metrics |= minimize(self.policy_optimizer, self.policy_loss, batch, t, torch.randn_like(batch.actions))
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
    main(QSM)
