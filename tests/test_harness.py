"""The harness on scripted environments. It is the same text in all RL scripts (`test_files.py` compares it), so what
needs no command line is tested once, in this process and not compiled, mostly through sac.py."""

import contextlib
import copy
import importlib
import json
import math
import re
import sys

import numpy as np
import pytest
import scripted
import torch
import tyro
from conftest import RL_SCRIPTS, ROOT, SMALL, equal, evaluations, load, run_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sac
import td3

CPU = torch.device("cpu")
FLAGS = (
    "--device cpu --hidden-size 8 --batch-size 8 --buffer-size 200 --num-envs 3 --learning-starts 30"
    " --total-timesteps 90 --eval-frequency 30 --eval-episodes 2 --checkpoint-frequency 30"
).split()


@pytest.fixture(autouse=True)
def fresh_log():
    scripted.Scripted.log.clear()
    scripted.Scripted.seeds.clear()


@pytest.fixture
def train(inside, tmp_path):
    """A short run in a folder of its own, on Scripted-v0 unless told; returns its run folder."""

    def train(name, flags="", script="sac", env_id="Scripted-v0", agent=None, status=0):
        (tmp_path / name).mkdir()
        arguments = ["--env-id", env_id, *SMALL[script].split(), *FLAGS, *flags.split()]
        process = inside(script, *arguments, agent=agent, cwd=tmp_path / name)
        assert process.returncode == status, process.stderr
        train.stderr = process.stderr
        return run_folder(tmp_path / name)

    return train


# Environments and the replay buffer


def test_buffer_holds_the_true_transitions_at_termination_and_truncation(train):
    checkpoint = load(train("run", "--seed 8 --total-timesteps 120"))
    observations, _, next_observations, rewards, dones = (c.numpy() for c in checkpoint["buffer"]["columns"])
    assert len(observations) == checkpoint["buffer"]["added"] == 120
    ends = {"terminated": 0, "truncated": 0}
    for row in range(120):
        episode, index, t = observations[row]
        assert index == row % 3  # environments take turns
        assert (episode, t) == divmod(row // 3, index + 3)  # no step lost, none doubled, none across episodes
        np.testing.assert_array_equal(next_observations[row], [episode, index, t + 1])
        assert rewards[row] == 100 * index + 10 * episode + t + 1
        last = t + 1 == index + 3
        assert dones[row] == (last and episode % 2 == 0)
        if last:
            ends["truncated" if episode % 2 else "terminated"] += 1
    assert min(ends.values()) > 5


def test_actions_are_played_in_the_environments_box_and_stored_in_the_unit_box(train):
    """Exploration noise of ten times the box shows that they are clipped before both, and evaluations have none."""
    folder = train("run", "--seed 8 --eval-frequency 1000 --exploration-noise 10", script="td3")
    stored = load(folder)["buffer"]["columns"][1].numpy()
    random, learned = np.abs(stored[:30]), np.abs(stored[30:])
    assert 0.9 < random.max() < 1
    assert learned.max() == 1 and (learned == 1).mean() > 0.5
    actions = np.array([action for *_, action in scripted.Scripted.log])
    played = (2 * (actions - scripted.LOW) / (scripted.HIGH - scripted.LOW) - 1).reshape(-1, 2)
    np.testing.assert_allclose(played[:90], stored, atol=1e-5)
    assert len(played) > 90 and np.abs(played[90:]).max() < 0.99  # the evaluation


def add_two(buffer, i):
    """A row with i in all its columns, and one with i + 1."""
    pair = np.array([i, i + 1.0])
    buffer.add(pair[:, None], pair[:, None], pair[:, None], pair, pair)


def filled_buffer(size, rows):
    buffer = sac.ReplayBuffer(size, 1, 1)
    for i in range(0, rows, 2):
        add_two(buffer, i)
    return buffer


def sampled(buffer):
    batch = buffer.sample(500, CPU)
    for column in (batch.observations[:, 0], batch.actions[:, 0], batch.next_observations[:, 0], batch.dones):
        assert torch.equal(column, batch.rewards)  # rows stay together
    return set(batch.rewards.tolist())


def test_ring_buffer_forgets_the_oldest():
    assert sampled(filled_buffer(5, 4)) == {0, 1, 2, 3}  # and nothing from the row that is still empty
    assert sampled(filled_buffer(5, 8)) == {3, 4, 5, 6, 7}


@pytest.mark.parametrize("size", [4, 8, 12])
@pytest.mark.parametrize("rows", [0, 6, 8, 12])
def test_a_loaded_buffer_has_the_last_rows_and_goes_on_forgetting_the_oldest(size, rows):
    buffer = sac.ReplayBuffer(size, 1, 1)
    buffer.load_state_dict(filled_buffer(8, rows).state_dict())
    held = list(range(rows))[-min(size, 8) :]
    for i in range(rows, rows + 12, 2):
        assert len(buffer) == len(held) and (not held or sampled(buffer) == set(held))
        add_two(buffer, i)
        held = [*held, i, i + 1][-size:]


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_a_million_humanoid_transitions_fit_in_3_5_gb_and_are_committed_late():
    before = resident_bytes()
    buffer = sac.ReplayBuffer(1_000_000, 376, 17)
    assert sum(column.nbytes for column in buffer.columns) < 3.5e9
    buffer.add(np.ones((5, 376)), np.ones((5, 17)), np.ones((5, 376)), np.ones(5), np.ones(5))
    assert resident_bytes() - before < 50e6
    assert sum(column.untyped_storage().nbytes() for column in buffer.state_dict()["columns"]) < 20_000


@pytest.mark.parametrize(
    "flags, updates",
    [("--num-envs 5", 12), ("--num-envs 1", 60), ("--num-envs 5 --updates-per-step 3", 36)],
)
def test_updates_follow_each_vector_step_once_learning_starts(train, flags, updates):
    """(90 - 30) / num_envs * updates_per_step of them."""
    assert load(train("run", flags))["updates"] == updates


# Evaluation


def test_evaluation_plays_the_first_episode_of_each_of_its_environments(train):
    """Training has the seeds 1, 2 and 3, and each evaluation the same other ones. A vector step counts three steps."""
    folder = train("run", "--seed 1 --eval-episodes 4 --eval-frequency 25 --total-timesteps 100")
    seeds = scripted.Scripted.seeds
    assert seeds[:3] == [1, 2, 3] and seeds[3:] == 4 * seeds[3:7] and len(set(seeds)) == 7
    returns = [sum(100 * (seed % 8) + t for t in range(1, seed % 8 + 4)) for seed in seeds[3:7]]
    table = [row[:-1] for row in evaluations(folder)]
    statistics = [np.mean(returns), np.std(returns), min(returns), max(returns)]
    assert table == [[27, 0, *statistics], [51, 7, *statistics], [75, 15, *statistics], [102, 24, *statistics]]


@pytest.mark.parametrize("script", RL_SCRIPTS)
def test_evaluating_more_often_changes_nothing_in_the_training(train, script):
    rare, often = (
        load(train(name, f"--eval-frequency {frequency} --eval-episodes 1", script, "Pendulum-v1"))
        for name, frequency in (("rare", 90), ("often", 45))
    )
    assert len(rare.pop("evaluations")) == 1 and len(often.pop("evaluations")) == 2
    del rare["seconds"], often["seconds"]
    assert equal(rare, often)


def test_evaluation_leaves_the_generators_of_other_devices_alone(monkeypatch):
    forked = []

    @contextlib.contextmanager
    def fork_rng(devices):
        forked.append(devices)
        yield

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    args = sac.Args(env_id="Scripted-v0", eval_episodes=1)
    sac.evaluate(Still(3, 2, args), args, CPU, [], None, "")
    assert forked == [[]]


def test_what_follows_an_evaluated_episode_does_not_count():
    args = sac.Args(env_id="NanLater-v0", eval_episodes=3)
    assert np.isfinite(sac.evaluate(Still(3, 2, args), args, CPU, [], None, "")).all()
    episodes = [episode for _, episode, *_ in scripted.Scripted.log]
    assert max(episodes) > 0  # some went on while others were running


def test_same_seed_same_evaluations(train):
    first, second, other = (
        [row[:-1] for row in evaluations(train(name, flags, env_id="Pendulum-v1"))]
        for name, flags in (("first", ""), ("second", ""), ("other", "--seed 2"))
    )
    assert first == second != other


def test_episodes_without_an_end_are_cut_after_100_000_steps(train):
    folder = train("run", "--eval-frequency 1000 --eval-episodes 1", env_id="Endless-v0", agent=Still)
    assert evaluations(folder)[0][2] == 100_000


class Still(torch.nn.Module):
    """The least that the harness asks of an agent: it never moves, and learns nothing."""

    updates, optimizers, still = 0, [], torch.zeros(3, 2)

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()

    def act(self, observations, explore):
        return self.still[: len(observations)]

    def update(self, batch):
        return {}


def test_the_first_episode_of_each_evaluation_is_recorded(inside, train):
    folder = train("run", "--capture-video --total-timesteps 60", env_id="Filmed-v0")
    assert inside("sac", "--evaluate", folder).returncode == 0  # --capture-video is one of its arguments
    names = sorted(path.name for path in (folder / "videos").glob("*.mp4"))
    assert names == [f"{name}-episode-0.mp4" for name in ("evaluate", "step-30", "step-60")]


def test_an_id_with_a_namespace_makes_one_folder(train):
    folder = train("run", env_id="scripted:kin/Scripted-v0")
    assert folder.name.startswith("scripted-kin-Scripted-v0__sac__1__")


def test_an_environment_with_an_episode_key_of_its_own_trains(train):
    assert load(train("run", env_id="OwnEpisode-v0"))["step"] == 90


def test_tensorboard_has_the_usual_names(train):
    folder = train("run", "--updates-per-step 10")
    events = EventAccumulator(str(folder)).Reload()
    names = set(events.Tags()["scalars"])
    assert {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "eval/episodic_return"} <= names
    assert {"losses/qf1_loss", "losses/qf2_loss", "losses/actor_loss", "losses/qf1_values", "losses/alpha"} <= names
    lengths = {event.value for event in events.Scalars("charts/episodic_length")}
    assert lengths == {4, 5, 6}  # seed 1: environments 1, 2 and 3
    returns = {event.value for event in events.Scalars("charts/episodic_return")}
    assert 101 + 102 + 103 + 104 in returns


# Resuming


def test_a_resumed_run_starts_from_what_was_saved(inside, train):
    folder = train("run")
    saved, seen = load(folder), {}
    scripted.Scripted.seeds.clear()

    class Spy(sac.SAC):
        def act(self, observations, explore):
            if not seen:
                seen["agent"] = copy.deepcopy(self.state_dict())
                seen["optimizers"] = copy.deepcopy([optimizer.state_dict()["state"] for optimizer in self.optimizers])
                seen["updates"], seen["seed"] = self.updates, torch.initial_seed()
            return super().act(observations, explore)

    assert inside("sac", "--resume", folder, "--total-timesteps", 120, agent=Spy).returncode == 0
    further = load(folder)
    assert all(equal(seen[part], saved[part]) for part in ("agent", "optimizers", "updates"))
    assert seen["seed"] == 91 and scripted.Scripted.seeds[:3] == [91, 92, 93]  # other random numbers than the first run
    assert further["step"] == 120 and further["updates"] == 30
    for old, new in zip(saved["buffer"]["columns"], further["buffer"]["columns"]):
        assert torch.equal(new[:90], old)
    assert [row[0] for row in evaluations(folder)] == [30, 60, 90, 120]
    assert further["evaluations"][:3] == saved["evaluations"] and further["seconds"] > saved["seconds"]


@pytest.mark.parametrize("script", RL_SCRIPTS)
def test_two_resumes_of_a_checkpoint_give_the_same_numbers(inside, train, script):
    twins = [train(name, "--eval-frequency 60", script=script, env_id="Pendulum-v1") for name in ("first", "second")]
    for folder in twins:
        assert inside(script, "--resume", folder, "--total-timesteps", 120).returncode == 0
    first, second = map(load, twins)
    assert first["step"] == 120
    for part in ("agent", "optimizers", "buffer", "updates"):
        assert equal(first[part], second[part]), part
    assert [row[:-1] for row in first["evaluations"]] == [row[:-1] for row in second["evaluations"]]


def test_the_command_line_wins_over_the_resumed_run(inside, train):
    folder = train("run", "--q-lr 0.01 --gamma 0.9")
    seen = {}

    class Spy(sac.SAC):
        def update(self, batch):
            seen.update(q_lr=self.critic_optimizer.param_groups[0]["lr"], gamma=self.args.gamma)
            return super().update(batch)

    flags = "--q-lr 0.001 --total-timesteps 96 --buffer-size 50".split()
    assert inside("sac", "--resume", folder, *flags, agent=Spy).returncode == 0
    assert seen == {"q_lr": 0.001, "gamma": 0.9}
    arguments = json.loads((folder / "args.json").read_text())
    assert (arguments["q_lr"], arguments["gamma"], arguments["total_timesteps"]) == (0.001, 0.9, 96)
    assert load(folder)["step"] == 96 and len(load(folder)["buffer"]["columns"][0]) == 50


@pytest.mark.parametrize("flags", ["--hidden-size 9", "--env-id Pendulum-v1"])
def test_networks_of_another_shape_are_refused(inside, train, flags):
    folder = train("run", env_id="MountainCarContinuous-v0")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    process = inside("sac", "--resume", folder, *flags.split(), "--total-timesteps", 120)
    assert process.returncode == 2 and "size mismatch" in process.stderr
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_after_the_checkpoint_are_forgotten(inside, train):
    """A run that is killed after an evaluation and before the next checkpoint evaluates that step again."""
    folder = train("run", "--total-timesteps 60")
    with open(folder / "evaluations.csv", "a") as file:
        file.write("90,20,1.0,0.0,1.0,1.0,99.0\n12")  # one row too many, one cut short
    assert inside("sac", "--resume", folder, "--total-timesteps", 90).returncode == 0
    assert [row[0] for row in evaluations(folder)] == [30, 60, 90]


def blocks(language):
    """The code blocks of the README in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def test_the_five_lines_of_the_readme(train):
    """As they stand there, but for the folder's name; HalfCheetah-v4 has the dimensions in them."""
    folder = train("run", env_id="HalfCheetah-v4")
    (lines,) = [block for block in blocks("python") if "load_state_dict" in block]
    names = {}
    exec(lines.replace("runs/RUN_FOLDER", str(folder)), names)
    assert names["actions"].shape == (1, 6)
    assert equal(names["agent"].state_dict(), torch.load(folder / "policy.pt", weights_only=True))


def test_the_changed_agent_of_the_readme(monkeypatch, tmp_path):
    (lines,) = [block for block in blocks("python") if "class Cautious" in block]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["td3.py", "--no-compile", "--env-id", "Scripted-v0", *FLAGS])
    names = {}
    exec(lines, names)
    assert load(run_folder(tmp_path))["updates"] == 20


def test_the_commands_of_the_readme_are_understood():
    text = "".join(block.replace("\\\n", "") for block in blocks(""))
    commands = [line.split() for line in text.splitlines() if re.match(r"python \w+\.py", line)]
    assert len(commands) >= 5
    for _, script, *flags in commands:
        tyro.cli(importlib.import_module(script.removesuffix(".py")).Args, args=flags)


@pytest.mark.parametrize("script", RL_SCRIPTS)
def test_the_policy_file_acts_as_the_trained_agent(train, script):
    module, trained = importlib.import_module(script), []

    class Spy(getattr(module, RL_SCRIPTS[script])):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            trained.append(self)

    folder = train("run", script=script, agent=Spy)
    assert (folder / "policy.pt").stat().st_size < (folder / "checkpoint.pt").stat().st_size

    Agent, args = getattr(module, RL_SCRIPTS[script]), module.Args(**json.loads((folder / "args.json").read_text()))
    agent = Agent(3, 2, args)
    agent.load_state_dict(torch.load(folder / "policy.pt", weights_only=True))
    observations = torch.tensor([[0.0, 1.0, 2.0], [3.0, 2.0, 1.0]])
    with torch.compiler.set_stance("force_eager"):
        torch.manual_seed(0)
        expected = trained[0].act(observations, explore=False)
        torch.manual_seed(0)
        assert torch.equal(agent.act(observations, explore=False), expected)
    assert not equal(agent.state_dict(), Agent(3, 2, args).state_dict())


# Promises to agents


def test_every_parameter_group_of_an_optimizer_is_trained():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=0.1)
    with torch.compiler.set_stance("force_eager"):
        sac.minimize(optimizer, lambda: ((a + 2 * b).sum(), {}))
    assert a.tolist() == pytest.approx([0.9, 0.9]) and b.tolist() == [0, 0]


def test_metrics_may_have_any_name(train):
    class Counting(sac.SAC):
        def update(self, batch):
            return super().update(batch) | {"step": torch.tensor(1.0), "when": torch.tensor(2.0)}

    train("run", "--updates-per-step 10", agent=Counting)


# Checkpoints and the bar


def test_each_checkpoint_is_written_once(train, monkeypatch):
    steps = []

    def write(path, content, write=sac.write):
        steps.extend([content["step"]] if path.name == "checkpoint.pt" else [])
        write(path, content)

    monkeypatch.setattr(sac, "write", write)
    train("run", "--checkpoint-frequency 25")
    assert steps == [27, 51, 75, 90]  # the first step of the three environments at or after each multiple, and the end


def test_a_resumed_run_does_not_keep_the_old_checkpoint_mapped(inside, train):
    folder, mapped = train("run"), []

    class Spy(sac.SAC):
        def update(self, batch):
            with open("/proc/self/maps") as file:
                mapped.extend(line for line in file if "checkpoint.pt" in line)
            return super().update(batch)

    assert inside("sac", "--resume", folder, "--total-timesteps", 120, agent=Spy).returncode == 0
    assert not mapped


def test_the_time_left_is_counted_without_the_random_steps(train, monkeypatch):
    bars = []

    class Bar(sac.tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            bars.append(self)

    monkeypatch.setattr(sac, "tqdm", Bar)
    train("run")
    assert bars[0].initial == 27 and bars[0].n == 90


# Numbers that are not finite


@pytest.mark.parametrize(
    "env_id, quantity",
    [("NanReward", "reward"), ("HugeReward", "reward"), ("InfiniteObservation", "next_observation")],
)
def test_an_environment_that_is_not_finite_stops_the_run(inside, train, env_id, quantity):
    """Its 60th step is step 180 of three environments."""
    flags = "--total-timesteps 300 --eval-frequency 1000 --checkpoint-frequency 150"
    folder = train("run", flags, env_id=f"{env_id}-v0", status=2)
    assert f"{quantity} is NaN or infinite at step 180" in train.stderr
    checkpoint = load(folder)
    assert all(column.isfinite().all() for column in checkpoint["buffer"]["columns"])
    assert len(checkpoint["buffer"]["columns"][0]) == 177
    assert inside("sac", "--resume", folder, "--total-timesteps", checkpoint["step"] + 30).returncode == 0


def test_an_evaluation_that_is_not_finite_is_refused(inside, train):
    folder = train("run", "--total-timesteps 30")
    process = inside("sac", "--evaluate", folder, "--env-id", "NanReturn-v0")
    assert process.returncode == 2 and "return is NaN or infinite at evaluation evaluate" in process.stderr


def test_a_nan_loss_stops_the_run(inside, train):
    """Losses are looked at every 100 updates; the run has made 200 at step 90."""

    class Diverging(sac.SAC):
        def update(self, batch):
            metrics = super().update(batch)
            return metrics | {"qf1_loss": torch.tensor(math.nan)} if self.updates > 150 else metrics

    folder = train("run", "--updates-per-step 10", agent=Diverging, status=2)
    assert "qf1_loss is NaN or infinite at step 90" in train.stderr
    assert inside("sac", "--resume", folder).returncode == 0


def test_a_nan_parameter_never_reaches_a_file(train):
    """A finite loss may have a gradient that is not: parameters are looked at before they are saved."""

    class Broken(sac.SAC):
        def update(self, batch):
            metrics = super().update(batch)
            if self.updates == 20:
                self.policy.net[0].bias.data[0] = math.nan
            return {name: value.nan_to_num() for name, value in metrics.items()}

        def act(self, observations, explore):
            return super().act(observations, explore).nan_to_num()

    folder = train("run", agent=Broken, status=2)
    assert "policy.net.0.bias is NaN or infinite at step 90" in train.stderr
    assert load(folder)["step"] == 60
    for weights in (load(folder)["agent"], torch.load(folder / "policy.pt", weights_only=True)):
        assert all(values.isfinite().all() for values in weights.values())


def test_td3_policy_updates_are_counted_on_after_a_resume(inside, train):
    """Every second update trains the policy; 21 updates before the resume, so the first one after it does not."""
    folder = train("run", "--total-timesteps 93", script="td3")
    trained = []

    class Spy(td3.TD3):
        def update(self, batch):
            metrics = super().update(batch)
            trained.append("actor_loss" in metrics)
            return metrics

    assert inside("td3", "--resume", folder, "--total-timesteps", 102, agent=Spy).returncode == 0
    assert trained == [False, True, False]
