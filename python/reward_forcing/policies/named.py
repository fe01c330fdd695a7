"""Policies as text: ``name`` or ``name:argument=value,argument=value``, as command lines take them."""

from __future__ import annotations

import dataclasses

import rf_kernels as rf

from .._check import expect
from .cyclic import CyclicSink
from .important import ImportantTokens
from .linear import LinearState
from .merged import MergedTokens
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

#: The class of each name, and the arguments that it begins with.
NAMES: dict[str, tuple[type[rf.SinkPolicy], dict]] = {
    "none": (rf.NoSink, {}),
    "static": (rf.StaticSink, {"rephase": True}),
    "ema": (rf.EMASink, {}),
    "steady": (rf.EMASink, {"alpha": 0.99, "held": (0,)}),
    "two-rates": (TwoRateMemory, {}),
    "strided": (StridedMemory, {}),
    "cyclic": (CyclicSink, {}),
    "important": (ImportantTokens, {}),
    "linear": (LinearState, {}),
    "merged": (MergedTokens, {}),
    "recall": (RecalledFrames, {}),
    "routed": (RoutedFrames, {}),
    "ahead": (PlacedSink, {"ahead": 1.0}),
    "identity": (PlacedSink, {"at": 0.0}),
    "shots": (PinnedShots, {}),
    "rope-cut": (RopeCut, {}),
    "log-bias": (LogBias, {"rephase": True}),
    "random": (RandomHistory, {"rephase": True}),
    "rolling": (RollingAnchor, {}),
    "short": (ShortWindow, {"rephase": True}),
    "patches": (ChangingPatches, {"rephase": True}),
    "state": (StateSlot, {}),
}


def parse(text: str, *, who: str = "policies.parse", **defaults) -> rf.SinkPolicy:
    """The policy that a text names. Values are numbers, true, false, none, words, or several of them with
    ``/`` between. ``defaults`` take the place of those of the policy, where it has such arguments;
    ``who`` is named in errors.

    Raises:
        rf_kernels.ArgumentError: there is no such policy or argument.
    """
    name, colon, rest = text.partition(":")
    expect(name in NAMES, who, "sink_policy", f"one of {', '.join(NAMES)}", repr(name))
    cls, begun = NAMES[name]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    given = {key: value for key, value in defaults.items() if key in fields} | begun
    if name == "ema" and colon and "=" not in rest:
        rest = f"alpha={rest}"
    for part in rest.split(",") if colon else ():
        key, equals, value = part.partition("=")
        known = key in fields and equals and value
        expected = f"ARGUMENT=VALUE with one of {', '.join(fields) or 'no arguments'}"
        expect(known, who, "sink_policy", f"{name}:{expected}", repr(part))
        several = "/" in value or str(fields[key].type).startswith("tuple")
        values = [_value(who, f"{name}:{key}", word) for word in value.split("/")]
        given[key] = tuple(values) if several else values[0]
    return cls(**given)


def _value(who: str, what: str, word: str):
    words = {"true": True, "false": False, "none": None}
    if word.lower() in words:
        return words[word.lower()]
    for read in (int, float):
        try:
            return read(word)
        except ValueError:
            pass
    expected = f"{what}=VALUE with a number, true, false, none or a word"
    expect(word.isidentifier(), who, "sink_policy", expected, repr(word))
    return word
