"""``torchrun --nproc-per-node N -m reward_forcing.trainer CONFIG OUT``: what ``reward-forcing train`` does,
on every rank.
"""

import argparse

from .config import load
from .loop import run

parser = argparse.ArgumentParser(prog="python -m reward_forcing.trainer", description=__doc__)
parser.add_argument("config", help="YAML file of the run")
parser.add_argument(
    "out", help="folder of its log, checkpoints and weights; an interrupted run goes on there"
)
arguments = parser.parse_args()
run(load(arguments.config), arguments.out)
