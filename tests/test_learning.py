"""Each agent learns a small task well past a random policy, from a fixed seed, through its command line."""

import sys

import pytest
from conftest import TESTS, evaluations, run_folder

sys.path.insert(0, str(TESTS / "benchmarks"))
import campaign  # noqa: E402

# InvertedPendulum-v4 pays 1 for each step that the pole stands, at most 1000; random policies get 5 to 8, untrained
# ones up to 20. With seeds 1, 2 and 3 in tests/results/quick, the best of the last three evaluations up to these steps
# was 1000 for sdac.py, sac.py and td3.py, and 951, 583 and 846 for qsm.py, which forgets again after about 9,000.
STEPS = {"sdac": 10_000, "qsm": 9000, "sac": 8000, "td3": 15_000}


@pytest.mark.learning
@pytest.mark.parametrize("script", campaign.SCRIPTS)
def test_learns_to_balance_a_pole(run, tmp_path, script):
    flags = [*campaign.flags_of("quick", script), "--total-timesteps", STEPS[script]]
    process = run(script, "--env-id", "InvertedPendulum-v4", "--seed", 1, *flags, timeout=600)
    assert process.returncode == 0, process.stderr
    means = [mean for _, _, mean, *_ in evaluations(run_folder(tmp_path))]
    assert max(means[-3:]) > 200, means
