"""Training: flow matching of a bidirectional teacher, and its distillation into a streaming student."""

from .config import DistillConfig, OptimizerConfig, TrainConfig, load
from .loop import run, train
from .rollout import Rollout, Tape

__all__ = ["DistillConfig", "OptimizerConfig", "Rollout", "Tape", "TrainConfig", "load", "run", "train"]
