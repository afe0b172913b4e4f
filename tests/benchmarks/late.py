"""A late pilot: the end of a finished run of `sdac.py`, once more, with one thing changed.

    python tests/benchmarks/late.py campaign/screening/runs/RUN_FOLDER NEW_FOLDER 5 -- --target-particles 8

Copies the run folder, multiplies --temperature and lambda in its checkpoint by a factor, here 5 (the exploration noise
stays as it was), and resumes it for 100,000 steps with the flags after `--`.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import torch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path)
parser.add_argument("new", type=Path)
parser.add_argument("factor", type=float, nargs="?", default=1.0)
parser.add_argument("flags", nargs="*")
options = parser.parse_args()

shutil.copytree(options.run, options.new)
args = json.loads((options.new / "args.json").read_text())
args |= {"temperature": args["temperature"] * options.factor, "total_timesteps": args["total_timesteps"] + 100_000}
(options.new / "args.json").write_text(json.dumps(args, indent=2))
checkpoint = torch.load(options.new / "checkpoint.pt")
checkpoint["agent"]["log_lambda"] += math.log(options.factor)
torch.save(checkpoint, options.new / "checkpoint.pt")
script = Path(__file__).resolve().parents[2] / "sdac.py"
sys.exit(subprocess.call([sys.executable, script, "--resume", options.new, *options.flags]))
