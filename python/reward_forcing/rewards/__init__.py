"""Rewards of Re-DMD: what a clip is worth, one score per sample. No gradient runs through a reward to the
student; Stream-R1 takes its gradient on the pixels as a weight."""

from .base import Reward, scores
from .dynamics import FrameDifference, OpticalFlowDynamics

__all__ = ["FrameDifference", "OpticalFlowDynamics", "Reward", "scores"]
