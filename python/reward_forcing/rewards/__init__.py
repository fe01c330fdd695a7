"""Rewards of Re-DMD: what a clip is worth, one score per sample. No gradient runs through a reward."""

from .base import Reward, scores
from .dynamics import OpticalFlowDynamics

__all__ = ["OpticalFlowDynamics", "Reward", "scores"]
