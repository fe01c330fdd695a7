"""``torchrun --nproc-per-node N -m reward_forcing.trainer CONFIG OUT``: what ``reward-forcing train`` does,
on every rank.
"""

import argparse
import sys
from pathlib import Path

from ..cli import SET, train

parser = argparse.ArgumentParser(prog="python -m reward_forcing.trainer", description=__doc__)
parser.add_argument("config", type=Path, help="YAML file of the run")
parser.add_argument(
    "out", type=Path, help="folder of its log, checkpoints and weights; an interrupted run goes on there"
)
parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=SET)
arguments = parser.parse_args()
sys.exit(train(arguments.config, arguments.out, arguments.set))
