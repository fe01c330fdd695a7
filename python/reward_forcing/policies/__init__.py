"""Sink policies of published systems, by name (docs/policies.md)."""

from .cyclic import CyclicSink
from .important import ImportantTokens
from .linear import LinearState
from .memory import MemoryState
from .merged import MergedTokens
from .named import NAMES, parse
from .patches import ChangingPatches
from .placed import PlacedSink
from .recall import RecalledFrames
from .rolling import RollingAnchor
from .routed import RoutedFrames
from .short import ShortWindow
from .shots import PinnedShots, RopeCut
from .state_slot import StateSlot
from .strided import StridedMemory
from .two_rates import TwoRateMemory
from .weighted import LogBias, RandomHistory

__all__ = [
    "NAMES",
    "ChangingPatches",
    "CyclicSink",
    "ImportantTokens",
    "LinearState",
    "LogBias",
    "MemoryState",
    "MergedTokens",
    "PinnedShots",
    "PlacedSink",
    "RandomHistory",
    "RecalledFrames",
    "RollingAnchor",
    "RopeCut",
    "RoutedFrames",
    "ShortWindow",
    "StateSlot",
    "StridedMemory",
    "TwoRateMemory",
    "parse",
]
