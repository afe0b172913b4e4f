"""The harness against scripted environments. It is the same text in all RL scripts (`test_files.py` compares it), so
what needs no command line is tested once, through sdac.py."""

import csv
import dataclasses
import json
import math
import signal

import numpy as np
import pytest
import scripted
import torch

import sdac

CPU = torch.device("cpu")
TINY = dict(
    env_id="Scripted-v0", device="cpu", hidden_size=8, num_particles=2, num_reverse_samples=2, diffusion_steps=2,
    batch_size=8, buffer_size=200, num_envs=3, learning_starts=30, total_timesteps=90, eval_frequency=30,
    eval_episodes=2, checkpoint_frequency=30,
)  # fmt: skip


@pytest.fixture(autouse=True)
def clean():
    scripted.Scripted.log.clear()
    sdac.SIGNALS.clear()
    yield
    sdac.SIGNALS.clear()


def train(folder, checkpoint=None, agent=sdac.SDAC, **changes):
    """A run in `folder`; returns its last checkpoint."""
    args = sdac.Args(**{**TINY, **changes})
    folder.mkdir(exist_ok=True)
    (folder / "args.json").write_text(json.dumps(dataclasses.asdict(args)))
    sdac.train(agent, args, folder, checkpoint, CPU)
    return load(folder)


def load(folder):
    return sdac.load_checkpoint(str(folder), "SDAC")


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def rows(folder):
    with open(folder / "evaluations.csv") as file:
        return list(csv.DictReader(file))


def without_seconds(folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder)]


def test_buffer_holds_true_transitions_at_termination_and_truncation(tmp_path):
    checkpoint = train(tmp_path, learning_starts=1000, seed=8, total_timesteps=120, eval_frequency=10**6)
    observations, actions, next_observations, rewards, dones = (c.numpy() for c in checkpoint["buffer"]["columns"])
    assert len(observations) == checkpoint["buffer"]["added"] == 120
    ends = {"terminated": 0, "truncated": 0}
    for row in range(120):
        episode, index, t = observations[row]
        assert index == row % 3  # environments take turns
        steps = row // 3
        assert (episode, t) == divmod(steps, index + 3)  # no step lost, none doubled, none across episodes
        np.testing.assert_array_equal(next_observations[row], [episode, index, t + 1])
        assert rewards[row] == 100 * index + 10 * episode + t + 1
        last = t + 1 == index + 3
        assert dones[row] == (last and episode % 2 == 0)
        if last:
            ends["truncated" if episode % 2 else "terminated"] += 1
    assert min(ends.values()) > 5


def test_actions_are_stored_in_the_unit_box_and_played_in_the_environments(tmp_path):
    checkpoint = train(tmp_path, seed=8)
    played = {i: [a for index, _, _, a in scripted.Scripted.log if index == i] for i in range(3)}
    stored = checkpoint["buffer"]["columns"][1].numpy()
    assert np.abs(stored).max() <= 1 and np.abs(stored).max() > 0.8
    low, high = scripted.LOW, scripted.HIGH
    # evaluations play through the same class in between; every stored action must occur in order
    for index in range(3):
        remaining = iter(played[index])
        for action in stored[index::3]:
            expected = low + (action.reshape(2, 1) + 1) / 2 * (high - low)
            assert any(np.allclose(expected, actual, atol=1e-6) for actual in remaining)


def test_exploration_noise_is_stored_clipped(tmp_path):
    checkpoint = train(tmp_path, noise_scale=10.0)
    learned = checkpoint["buffer"]["columns"][1][30:]
    assert learned.abs().max() == 1 and (learned.abs() == 1).float().mean() > 0.5


def test_ring_buffer_forgets_the_oldest():
    buffer = sdac.ReplayBuffer(5, 1, 1)
    for i in range(4):
        pair = np.array([2 * i, 2 * i + 1.0])
        buffer.add(pair[:, None], pair[:, None], pair[:, None], pair, pair)
    assert len(buffer) == 5 and buffer.added == 8
    assert sorted(buffer.columns.rewards.tolist()) == [3, 4, 5, 6, 7]
    assert set(buffer.sample(500, CPU).rewards.tolist()) == {3, 4, 5, 6, 7}
    batch = buffer.sample(500, CPU)
    for column in (batch.observations[:, 0], batch.actions[:, 0], batch.next_observations[:, 0], batch.dones):
        assert torch.equal(column, batch.rewards)  # rows stay together


def test_ring_buffer_samples_only_what_is_filled_and_saves_no_more():
    buffer = sdac.ReplayBuffer(10**6, 3, 1)
    buffer.add(np.ones((4, 3)), np.ones((4, 1)), np.ones((4, 3)), np.arange(4), np.zeros(4))
    assert set(buffer.sample(300, CPU).rewards.tolist()) == {0, 1, 2, 3}
    columns = buffer.state_dict()["columns"]
    assert sum(c.untyped_storage().nbytes() for c in columns) == 4 * 4 * (3 + 1 + 3 + 1 + 1)


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_a_million_humanoid_transitions_fit_in_3_5_gb_and_are_committed_late():
    before = resident_bytes()
    buffer = sdac.ReplayBuffer(1_000_000, 376, 17)
    assert sum(c.numel() * c.element_size() for c in buffer.columns) < 3.5e9
    assert resident_bytes() - before < 50e6


def test_evaluation_plays_whole_first_episodes(tmp_path):
    args = sdac.Args(**TINY | {"seed": 9, "eval_episodes": 4})
    agent = sdac.SDAC(3, 2, args)
    returns = sdac.evaluate(agent.act, args, CPU, tmp_path, "x")
    expected = [sum(100 * i + t for t in range(1, i + 4)) for i in (1, 2, 3, 4)]  # episode 0 of environments 1 to 4
    np.testing.assert_array_equal(returns, expected)


def test_evaluating_more_often_changes_nothing(tmp_path):
    rare = train(tmp_path / "rare", eval_frequency=90, env_id="Pendulum-v1")
    often = train(tmp_path / "often", eval_frequency=6, eval_episodes=1, env_id="Pendulum-v1", total_timesteps=90)
    assert len(often["evaluations"]) == 15
    for part in ("agent", "optimizers", "buffer", "random"):
        assert equal(rare[part], often[part])


def test_same_seed_same_evaluations(tmp_path):
    train(tmp_path / "a", env_id="Pendulum-v1")
    train(tmp_path / "b", env_id="Pendulum-v1")
    train(tmp_path / "c", env_id="Pendulum-v1", seed=2)
    assert [row["step"] for row in rows(tmp_path / "a")] == ["30", "60", "90"]
    assert without_seconds(tmp_path / "a") == without_seconds(tmp_path / "b")
    assert without_seconds(tmp_path / "a") != without_seconds(tmp_path / "c")


def test_evaluations_file(tmp_path):
    train(tmp_path, total_timesteps=100, seed=8)  # 102 steps in vector steps of 3
    text = (tmp_path / "evaluations.csv").read_text().splitlines()
    assert text[0] == "step,updates,mean,std,min,max,seconds"
    table = [[float(x) for x in line.split(",")] for line in text[1:]]
    assert [row[0] for row in table] == [30, 60, 90, 102]
    assert [row[1] for row in table] == [0, 10, 20, 24]
    returns = [1 + 2 + 3, 101 + 102 + 103 + 104]
    for row in table:
        assert row[2:6] == [np.mean(returns), np.std(returns), min(returns), max(returns)]


@pytest.mark.parametrize("updates_per_step, updates", [(1, 20), (3, 60)])
def test_updates_follow_vector_steps_once_learning_starts(tmp_path, updates_per_step, updates):
    assert train(tmp_path, updates_per_step=updates_per_step)["updates"] == updates


def test_tensorboard_has_the_usual_names(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, updates_per_step=10)
    events = EventAccumulator(str(tmp_path)).Reload()
    names = set(events.Tags()["scalars"])
    assert {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "eval/episodic_return"} <= names
    assert {"losses/qf1_loss", "losses/qf2_loss", "losses/actor_loss", "losses/qf1_values"} <= names
    lengths = {event.value for event in events.Scalars("charts/episodic_length")}
    assert lengths == {4, 5, 6}  # seed 1: environments 1, 2 and 3


# Resuming


def test_a_resumed_run_starts_from_exactly_what_was_saved(tmp_path):
    saved = train(tmp_path)
    seen = {}

    class Spy(sdac.SDAC):
        def act(self, observations, explore):
            if not seen:
                seen["agent"] = {k: v.clone() for k, v in self.state_dict().items()}
                seen["optimizers"] = [o.state_dict() for o in self.optimizers]
                seen["random"] = torch.get_rng_state()
            return super().act(observations, explore)

    Spy.__name__ = "SDAC"
    further = train(tmp_path, load(tmp_path), Spy, total_timesteps=120)
    assert equal(seen["agent"], saved["agent"]) and equal(seen["random"], saved["random"]["torch"])
    assert seen["optimizers"][0]["state"].keys() == saved["optimizers"][0]["state"].keys()
    assert further["step"] == 120 and further["updates"] == 30
    for old, new in zip(saved["buffer"]["columns"], further["buffer"]["columns"]):
        assert torch.equal(new[:90], old)
    assert [row[0] for row in further["evaluations"]] == [30, 60, 90, 120]
    assert further["evaluations"][:3] == saved["evaluations"]


def test_two_resumes_of_a_checkpoint_are_equal(tmp_path):
    train(tmp_path, env_id="Pendulum-v1")
    saved = load(tmp_path)
    results = []
    for _ in range(2):
        (tmp_path / "again").mkdir(exist_ok=True)
        results.append(train(tmp_path / "again", load(tmp_path), total_timesteps=150, env_id="Pendulum-v1"))
    for part in ("agent", "optimizers", "buffer", "random", "step", "updates"):
        assert equal(results[0][part], results[1][part]), part
    assert not equal(results[0]["agent"], saved["agent"])


def test_rows_after_the_checkpoint_are_forgotten(tmp_path):
    """A run that is killed after an evaluation and before the next checkpoint evaluates that step again."""
    train(tmp_path, total_timesteps=60, checkpoint_frequency=30)
    saved = load(tmp_path)
    with open(tmp_path / "evaluations.csv", "a") as file:
        file.write("90,20,1.0,0.0,1.0,1.0,99.0\n12")  # one row too many, one cut short
    train(tmp_path, saved, total_timesteps=90)
    assert [row["step"] for row in rows(tmp_path)] == ["30", "60", "90"]


def test_a_signal_during_an_evaluation_leaves_its_row_to_the_resumed_run(tmp_path):
    class Interrupted(sdac.SDAC):
        def act(self, observations, explore):
            if not explore and len(sdac.SIGNALS) == 0 and self.calls > 5:
                signal.raise_signal(signal.SIGTERM)
            self.calls += not explore
            return super().act(observations, explore)

        calls = 0

    Interrupted.__name__ = "SDAC"
    checkpoint = train(tmp_path, agent=Interrupted)
    assert checkpoint["step"] == 60 and rows(tmp_path)[-1]["step"] == "30"
    sdac.SIGNALS.clear()
    train(tmp_path, load(tmp_path))
    assert [row["step"] for row in rows(tmp_path)] == ["30", "60", "90"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file):
        file.write(b"ne")
        raise OSError("No space left on device")

    with pytest.raises(sdac.Failure, match="No space left"):
        sdac.write_whole(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_random_state_covers_all_streams():
    import random

    draw = lambda: (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: E731
    state = sdac.random_state()
    first = draw()
    sdac.set_random_state(state)
    assert draw() == first


# Faults while training


@pytest.mark.parametrize("env_id, quantity", [("NanReward-v0", "reward"), ("InfiniteObservation-v0", "observation")])
def test_nan_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, env_id, quantity):
    with pytest.raises(sdac.Failure, match=rf"{quantity} is NaN or infinite at step 177"):
        train(tmp_path, env_id=env_id, total_timesteps=300, eval_frequency=10**6)
    checkpoint = load(tmp_path)
    assert checkpoint["step"] == 150
    assert all(torch.isfinite(c).all() for c in checkpoint["buffer"]["columns"])


def test_nan_in_a_loss_stops_the_run(tmp_path):
    class Diverging(sdac.SDAC):
        def update(self, batch, step):
            metrics = super().update(batch, step)
            return metrics | {"qf1_loss": torch.tensor(math.nan)} if step >= 12 else metrics

    Diverging.__name__ = "SDAC"
    with pytest.raises(sdac.Failure, match="qf1_loss is NaN or infinite at step 90"):
        train(tmp_path, agent=Diverging)
    assert load(tmp_path)["step"] == 60


def test_nan_in_a_parameter_never_reaches_a_checkpoint(tmp_path):
    """A finite loss may have a gradient that is not: the parameters are looked at before they are saved."""

    class Broken(sdac.SDAC):
        def update(self, batch, step):
            metrics = super().update(batch, step)
            if step == 18:
                with torch.no_grad():
                    self.log_lambda.fill_(math.nan)
            return {name: value.nan_to_num() for name, value in metrics.items()}

        def act(self, observations, explore):
            return super().act(observations, explore).nan_to_num()

    Broken.__name__ = "SDAC"
    with pytest.raises(sdac.Failure, match="log_lambda is NaN or infinite at step 90"):
        train(tmp_path, agent=Broken)
    assert load(tmp_path)["step"] == 60


def test_an_environment_that_raises_while_it_is_evaluated(tmp_path):
    """RaisingSoon fails at its tenth step, which comes first in the evaluation after nine vector steps."""
    with pytest.raises(sdac.Failure, match="RaisingSoon-v0 failed at step 27: the simulator exploded; .*--resume"):
        train(tmp_path, env_id="RaisingSoon-v0", seed=15, eval_episodes=1, eval_frequency=27, learning_starts=1000)
    assert load(tmp_path)["step"] == 27 and rows(tmp_path) == []


def test_an_environment_that_raises_is_reported_and_the_run_can_be_resumed(tmp_path):
    with pytest.raises(sdac.Failure, match="Raising-v0 failed at step 177: the simulator exploded; .*--resume"):
        train(tmp_path, env_id="Raising-v0", total_timesteps=300, eval_frequency=10**6)
    checkpoint = load(tmp_path)
    assert checkpoint["step"] == 177
    further = train(tmp_path, checkpoint, env_id="Raising-v0", total_timesteps=210, eval_frequency=10**6)
    assert further["step"] == 210
