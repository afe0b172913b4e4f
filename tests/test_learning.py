"""Each agent learns a small task well past a random policy, from a fixed seed, through its command line."""

import csv

import pytest

# InvertedPendulum-v4 pays 1 for each step that the pole stands, at most 1000; random policies get 5 to 8. The agents
# were seen to exceed 60 here; five times a random policy leaves room for the rounding of other machines.
THRESHOLD = 40
COMMANDS = {
    "sdac": "--total-timesteps 4000 --learning-starts 500 --hidden-size 64 --num-particles 8 --num-reverse-samples 16"
    " --diffusion-steps 8 --batch-size 128",
    "sac": "--total-timesteps 5000 --learning-starts 1000 --batch-size 128",
    "td3": "--total-timesteps 5000 --learning-starts 1000 --batch-size 128 --learning-rate 1e-3",
    "qsm": "--total-timesteps 5000 --learning-starts 1000 --batch-size 128 --hidden-size 128 --q-gradient-scale 5",
}


@pytest.mark.learning
@pytest.mark.parametrize("script", COMMANDS)
def test_learns_to_balance_a_pole(run, tmp_path, script):
    common = "--env-id InvertedPendulum-v4 --num-envs 1 --seed 1 --eval-frequency 1000 --eval-episodes 10 --device cpu"
    process = run(script, *common.split(), *COMMANDS[script].split(), timeout=600)
    assert process.returncode == 0, process.stderr
    (table,) = (tmp_path / "runs").glob("*/evaluations.csv")
    with open(table) as file:
        returns = [float(row["mean"]) for row in csv.DictReader(file)]
    assert max(returns) > THRESHOLD, returns
