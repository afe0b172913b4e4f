"""A GIF of a trained policy: the first 3 to 5 seconds of an episode, seen by the task's own camera, which follows.

    MUJOCO_GL=osmesa python tests/benchmarks/film.py sdac campaign/locomotion/runs/HalfCheetah-v4__* cheetah.gif

`--evaluate RUN --capture-video` films whole episodes, with the camera that gymnasium chooses, which may stand still.
"""

import argparse
import importlib
import json
import math
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=["sdac", "qsm", "sac", "td3"])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()

    warnings.filterwarnings("ignore", module="gymnasium")
    torch.manual_seed(0)
    module = importlib.import_module(options.script)
    args = module.Args(**json.loads((options.run / "args.json").read_text()))
    env = gym.make(args.env_id, render_mode="rgb_array", camera_name="track", width=320, height=240)
    env = gym.wrappers.RescaleAction(env, -1, 1)
    agent = getattr(module, options.script.upper())(env.observation_space.shape[0], env.action_space.shape[0], args)
    agent.load_state_dict(torch.load(options.run / "policy.pt", weights_only=True))

    observation, _ = env.reset(seed=0)
    frames, steps = [], math.ceil(0.03 / env.unwrapped.dt)  # per frame: browsers slow down what is shorter than 20 ms
    for step in range(100 * steps):
        action = agent.act(torch.as_tensor(observation, dtype=torch.float32)[None], explore=False)[0].numpy()
        observation, _, terminated, truncated, _ = env.step(action)
        if step % steps == 0:
            frames.append(Image.fromarray(env.render()).quantize(64, dither=Image.Dither.NONE))
        if terminated or truncated:
            break
    duration = 1000 * env.unwrapped.dt * steps
    frames[0].save(options.output, save_all=True, append_images=frames[1:], duration=duration, loop=0)
    print(f"{len(frames)} frames of {duration:.0f} ms, {options.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
