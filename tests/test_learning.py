"""Each agent learns a small task well past a random policy, from a fixed seed, through its command line."""

import csv
import sys

import pytest
from conftest import TESTS

sys.path.insert(0, str(TESTS / "benchmarks"))
import campaign  # noqa: E402

# InvertedPendulum-v4 pays 1 for each step that the pole stands, at most 1000; random policies get 5 to 8, untrained
# ones up to 20. With the flags of the campaign's profile `quick`, the best of the evaluations after 1,000, 2,000 and 3,000
# updates is at least 52 in all twelve runs of tests/results/quick, and 59 with seed 1.
THRESHOLD = 40


@pytest.mark.learning
@pytest.mark.parametrize("script", campaign.SCRIPTS)
def test_learns_to_balance_a_pole(run, tmp_path, script):
    flags = [*campaign.flags_of("quick", script), "--total-timesteps", 4000]
    process = run(script, "--env-id", "InvertedPendulum-v4", "--seed", 1, *flags, timeout=600)
    assert process.returncode == 0, process.stderr
    (table,) = (tmp_path / "runs").glob("*/evaluations.csv")
    with open(table) as file:
        returns = [float(row["mean"]) for row in csv.DictReader(file)]
    assert max(returns[1:]) > THRESHOLD, returns
