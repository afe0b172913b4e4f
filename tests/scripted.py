"""Environments whose every transition is known, registered on import: `scripted:Scripted-v0` and its faulty kin."""

import os
import signal

import gymnasium as gym
import numpy as np

LOW, HIGH = np.array([[-0.4], [-2.0]], np.float32), np.array([[0.4], [1.0]], np.float32)


class Scripted(gym.Env):
    """Environment `index` (its first seed modulo 8) counts: observations are {episode, [index, t]}.

    Its episodes have index + 3 steps; those with an even number terminate, the odd ones are truncated. The reward is
    100 * index + 10 * episode + t, with t after the step. Actions are a column of two with the bounds above.
    """

    observation_space = gym.spaces.Dict(
        {"episode": gym.spaces.Box(0, 1e6, (1,)), "where": gym.spaces.Box(0, 1e6, (2,), np.float64)}
    )
    action_space = gym.spaces.Box(LOW, HIGH)
    log = []  # (index, episode, t, action) of every step in this process
    seeds = []  # of every reset with one
    made = open = 0

    def __init__(self, render_mode=None):
        type(self).made += 1
        Scripted.open += 1
        self.index, self.episode, self.steps = 0, -1, 0

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.seeds.append(seed)
            self.index, self.episode = seed % 8, -1
        self.episode, self.t = self.episode + 1, 0
        return self.observation(), {}

    def observation(self):
        where = np.array([self.index, self.t], np.float64)
        return {"episode": np.array([self.episode], np.float32), "where": where}

    def step(self, action):
        assert action.shape == (2, 1) and self.action_space.contains(action.astype(np.float32)), action
        self.log.append((self.index, self.episode, self.t, np.array(action)))
        self.t, self.steps = self.t + 1, self.steps + 1
        reward = 100.0 * self.index + 10 * self.episode + self.t
        end = self.t == self.index + 3
        return self.observation(), reward, end and self.episode % 2 == 0, end and self.episode % 2 == 1, {}

    def close(self):
        Scripted.open -= 1


class Faulty(Scripted):
    """Something goes wrong at the 60th step of an environment, whatever its episode."""

    def step(self, action):
        transition = super().step(action)
        return self.fault(*transition) if self.steps == 60 else transition


class Raising(Faulty):
    def fault(self, *transition):
        raise ValueError("the simulator exploded")


class NanReward(Faulty):
    def fault(self, observation, reward, *rest):
        return observation, float("nan"), *rest


class NanLater(Scripted):
    """Only the first episode has rewards."""

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, float("nan") if self.episode else reward, *rest


class NanReturn(Scripted):
    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, float("nan"), *rest


class HugeReward(Faulty):
    """Finite as float64, infinite as float32."""

    def fault(self, observation, reward, *rest):
        return observation, 1e39, *rest


class InfiniteObservation(Faulty):
    def fault(self, observation, *rest):
        return observation | {"where": np.array([self.index, np.inf])}, *rest


class RaisingReset(Scripted):
    def reset(self, seed=None, options=None):
        raise ValueError("no such track")


class InterruptedReset(Scripted):
    """Ctrl-C while it starts."""

    def reset(self, seed=None, options=None):
        signal.raise_signal(signal.SIGINT)
        return super().reset(seed, options)


class Wandering(Scripted):
    """Changes the working directory."""

    def step(self, action):
        os.chdir("/")
        return super().step(action)


class NoRenderMode(Scripted):
    """Can't be rendered, and does not know the argument."""

    def __init__(self):
        super().__init__()


class Filmed(Scripted):
    """Draws itself, without OpenGL."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.render_mode = render_mode

    def render(self):
        return np.full((64, 64, 3), 20 * self.t, np.uint8)


class Integers(Scripted):
    action_space = gym.spaces.Box(-3, 3, (2,), np.int64)


class NoSeed(Scripted):
    """`reset` as in the old gym."""

    def reset(self):
        return super().reset()


class OnlyTwo(Scripted):
    """A third instance can't be made: robots on cables."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        if self.made > 2:
            raise ConnectionError("the cable is in use")


class Endless(Scripted):
    """Episodes without an end; pays 1 a step. Says when it starts."""

    def reset(self, seed=None, options=None):
        print("start", flush=True)
        return super().reset(seed, options)

    def step(self, action):
        self.t += 1
        return self.observation(), 1.0, False, False, {}


class OwnEpisode(Scripted):
    """Its info has the key that gymnasium's statistics use."""

    def step(self, action):
        *transition, info = super().step(action)
        return *transition, info | {"episode": self.episode}


class Unbounded(Scripted):
    action_space = gym.spaces.Box(-np.inf, np.inf, (2,))


class Pinned(Scripted):
    """One of the actions can't move."""

    action_space = gym.spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 0.0], np.float32))


class Wide(Scripted):
    """Observations of 5,002 numbers, so that a checkpoint takes a while to write."""

    observation_space = gym.spaces.Box(0, 1e6, (5002,), np.float32)

    def observation(self):
        return np.concatenate([np.full(5000, self.episode), [self.index, self.t]]).astype(np.float32)


KIN = [
    Scripted, Raising, NanReward, NanLater, NanReturn, HugeReward, InfiniteObservation, RaisingReset, InterruptedReset,
    Wandering, NoRenderMode, Filmed, Integers, NoSeed, OnlyTwo, Endless, OwnEpisode, Unbounded, Pinned, Wide,
]  # fmt: skip
for kin in KIN:
    gym.register(f"{kin.__name__}-v0", kin)
gym.register("kin/Scripted-v0", Scripted)
