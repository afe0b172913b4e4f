# SPDX-License-Identifier: MIT
"""Soft Actor-Critic (SAC): maximum-entropy reinforcement learning with a tanh-Gaussian policy.

Haarnoja et al.: "Soft Actor-Critic Algorithms and Applications", 2018, arXiv 1812.05905. The policy maximises return
plus alpha times its entropy, two critics Q_1, Q_2 learn the soft value of its actions, which counts the later entropy
too, and the temperature alpha is tuned so that the entropy stays at its target Hbar = -d, for d action dimensions.
Qbar_j is a moving average of Q_j; done is 1 where s' is terminal, else 0.

    a = tanh(u),  u = mu(s) + sigma(s) eps,  eps ~ N(0, I)                                      policy      (1)
    log pi(a|s) = log N(u; mu, diag(sigma^2)) - sum_i log(1 - tanh(u_i)^2)                                  (2)
    log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)),  stable for large |u|                               (3)
    y = r + gamma (1-done) [min_j Qbar_j(s', a') - alpha log pi(a'|s')],  a' ~ pi(.|s')                     (4)
    J_Q = sum_j E (Q_j(s,a) - y)^2                                                              critics     (5)
    J_pi = E [alpha log pi(a|s) - min_j Q_j(s,a)],  a ~ pi(.|s)                                 policy      (6)
    J_alpha = -alpha E [log pi(a|s) + Hbar],  Hbar = -d                                         temperature (7)

The algorithm:
     1  repeat
     2      act: a ~ pi(.|s), at first uniformly random and without lines 4 to 7; the environment returns r, s' and done
     3      store (s, a, s', r, done) in the replay buffer, and draw a batch from it
     4      critics: one step of Adam on J_Q, with y by (4)
     5      policy: one step of Adam on J_pi, the critics held fixed
     6      temperature: one step of Adam on J_alpha, with the log pi of line 5
     7      target critics: Qbar <- (1-tau) Qbar + tau Q

Usage:
    python sac.py --env-id HalfCheetah-v4
    python sac.py --resume runs/RUN_FOLDER
    python sac.py --evaluate runs/RUN_FOLDER --eval-episodes 10

Departure from the paper: no factor 1/2 in (5), to which Adam is nearly invariant. Where the paper is silent: log sigma
is clamped to [-20, 2], alpha starts at 1, Adam updates log alpha, and the first 5,000 actions are random.
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


@dataclass(config={"extra": "forbid"})
class Args:
    exp_name: Annotated[str, Field(pattern="^[^/]+$")] = "sac"  # name of the experiment, part of the run folder's name
    env_id: str = "HalfCheetah-v4"  # gymnasium id; `module:id` imports the module first
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1  # seed of PyTorch and of the environments
    device: Literal["auto", "cpu", "cuda"] = "auto"  # device of the networks; auto uses CUDA if available
    compile: bool = True  # use torch.compile, which needs a C++ compiler, or Triton on CUDA
    total_timesteps: Count = 1_000_000  # environment steps of the whole run, summed over the environments
    num_envs: Count = 1  # parallel environments
    updates_per_step: Count = 1  # updates after each step of all environments together
    learning_starts: Annotated[int, Field(ge=0)] = 5_000  # environment steps of random actions before the first update
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
    policy_lr: Fraction = 3e-4  # learning rate of the policy
    alpha_lr: Fraction = 3e-4  # learning rate of log alpha
    hidden_size: Count = 256  # width of the two hidden layers of critics and policy


# ALGO LOGIC: networks -----------------------------------------------------------------------------------------------


class TwinLinear(nn.Module):
    """A linear layer for each of two critics, (2, B, i) to (2, B, j): one batched product is faster than two."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        bound = in_features**-0.5  # as in nn.Linear
        self.weight = nn.Parameter(torch.empty(2, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(2, 1, out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Critics(nn.Module):
    """Q1 and Q2: observations (B, o) and actions (B, d) give (2, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int):
        super().__init__()
        first, second = TwinLinear(obs_dim + action_dim, hidden), TwinLinear(hidden, hidden)
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), TwinLinear(hidden, 1))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return self.net(torch.cat([observations, actions], dim=1).expand(2, -1, -1)).squeeze(2)


class Policy(nn.Module):
    """Mean and log standard deviation of u, (B, d) each, for observations (B, o)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int):
        super().__init__()
        first, second, last = nn.Linear(obs_dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 2 * action_dim)
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.net(observations).chunk(2, dim=1)
        return mean, log_std.clamp(-20, 2)

    def sample(self, observations: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (B, d) and their log-densities (B,), equations (1) to (3), from eps (B, d) ~ N(0, I)."""
        mean, log_std = self(observations)
        u = mean + log_std.exp() * eps
        log_normal = -0.5 * eps**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_slope = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))
        return torch.tanh(u), (log_normal - log_slope).sum(1)


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


class SAC(nn.Module):
    """The agent. Actions are in [-1, 1]^d throughout."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args, self.action_dim, self.updates = args, action_dim, 0
        self.policy = Policy(obs_dim, action_dim, args.hidden_size)
        self.critics = Critics(obs_dim, action_dim, args.hidden_size)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(0.0))
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), args.policy_lr, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), args.q_lr, fused=True)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], args.alpha_lr, fused=True)
        self.optimizers = [self.policy_optimizer, self.critic_optimizer, self.alpha_optimizer]

    @torch.no_grad()
    def act(self, observations: Tensor, explore: bool) -> Tensor:
        """Actions (B, d) for observations (B, o): a sample of the policy, or tanh of its mean."""
        mean, log_std = self.policy(observations)
        return torch.tanh(mean + log_std.exp() * torch.randn_like(mean) if explore else mean)

    def critic_loss(self, batch: Batch, eps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation (5): squared errors against the target values, equation (4), with eps (B, d) ~ N(0, I)."""
        with torch.no_grad():
            next_actions, next_log_prob = self.policy.sample(batch.next_observations, eps)
            next_q = self.target_critics(batch.next_observations, next_actions).amin(0)
            next_value = next_q - self.log_alpha.exp() * next_log_prob
            y = batch.rewards + self.args.gamma * (1 - batch.dones) * next_value
        q = self.critics(batch.observations, batch.actions)
        (qf1_loss, qf2_loss), (q1, q2) = (q - y).square().mean(1), q.mean(1)
        metrics = {"qf1_loss": qf1_loss, "qf2_loss": qf2_loss, "qf1_values": q1, "qf2_values": q2}
        return qf1_loss + qf2_loss, metrics

    def policy_loss(self, batch: Batch, eps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation (6): minus the value of the policy's own actions and alpha times their entropy."""
        actions, log_prob = self.policy.sample(batch.observations, eps)
        q = self.critics(batch.observations, actions).amin(0)
        loss = (self.log_alpha.exp() * log_prob - q).mean()
        return loss, {"actor_loss": loss, "entropy": -log_prob.mean()}

    def alpha_loss(self, entropy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation (7): alpha rises while the entropy, -E log pi, is below -d."""
        alpha = self.log_alpha.exp()
        loss = alpha * (entropy + self.action_dim)  # the target entropy is -d
        return loss, {"alpha": alpha, "alpha_loss": loss}

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Lines 4 to 7 of the algorithm, numbered here too. Returns what to log."""
        metrics = minimize(self.critic_optimizer, self.critic_loss, batch, torch.randn_like(batch.actions))  # 4
        metrics |= minimize(self.policy_optimizer, self.policy_loss, batch, torch.randn_like(batch.actions))  # 5
        metrics |= minimize(self.alpha_optimizer, self.alpha_loss, metrics["entropy"])  # 6
        move_average(self.target_critics, self.critics, self.args.tau)  # 7
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
    main(SAC)
