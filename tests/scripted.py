"""Environments whose every transition is known, registered on import: `scripted:Scripted-v0` and its faulty kin."""

import collections

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
    fault_step, fault = None, None
    log = []  # (index, episode, t, action) of every step in this process

    def __init__(self, render_mode=None):
        self.index, self.episode, self.steps = 0, -1, 0

    def reset(self, seed=None, options=None):
        if seed is not None:
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
        observation, reward = self.observation(), 100.0 * self.index + 10 * self.episode + self.t
        if self.steps == self.fault_step:
            if self.fault == "raise":
                raise ValueError("the simulator\nexploded")
            if self.fault == "reward":
                reward = float("nan")
            if self.fault == "observation":
                observation["where"][1] = np.inf
        end = self.t == self.index + 3
        return observation, reward, end and self.episode % 2 == 0, end and self.episode % 2 == 1, {}


def faulty(name, fault, step=60):
    cls = type(name, (Scripted,), {"fault": fault, "fault_step": step})
    gym.register(f"{name}-v0", lambda **kwargs: cls(**kwargs))


gym.register("Scripted-v0", lambda **kwargs: Scripted(**kwargs))
faulty("Raising", "raise")
faulty("RaisingSoon", "raise", step=10)
faulty("NanReward", "reward")
faulty("InfiniteObservation", "observation")


class Unbounded(Scripted):
    action_space = gym.spaces.Box(-np.inf, np.inf, (2,))


gym.register("Unbounded-v0", lambda **kwargs: Unbounded(**kwargs))


class Wide(Scripted):
    """Observations of 5,002 numbers, so that a checkpoint takes a while to write."""

    observation_space = gym.spaces.Box(0, 1e6, (5002,), np.float32)

    def observation(self):
        return np.concatenate([np.full(5000, self.episode), [self.index, self.t]]).astype(np.float32)


gym.register("Wide-v0", lambda **kwargs: Wide(**kwargs))


class Quiet(Scripted):
    """Remembers nothing, so that memory can be measured."""

    log = collections.deque(maxlen=0)


gym.register("Quiet-v0", lambda **kwargs: Quiet(**kwargs))
