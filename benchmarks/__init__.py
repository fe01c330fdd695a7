"""Benchmarks: ours beside the published formulation and beside the best that plain PyTorch does, interleaved
in one process.

    python -m benchmarks --quick      a line a case, geometric means, then the aims: met or missed
    python -m benchmarks --op dmd_gradient --json dmd.json --plot plots --repro

What is timed is defined once, in the module of its op here.
"""

from .case import Case, agree
from .facts import environment
from .timing import Timing, line, measure, roof, row

__all__ = ["Case", "Timing", "agree", "environment", "groups", "line", "measure", "roof", "row"]


def groups() -> dict[str, list[Case]]:
    """All cases, by what they time: the four ops, and one layer of a stream."""
    from . import dmd_gradient, ema_evict, layer, rope_append, sink_window_attention

    modules = (rope_append, ema_evict, sink_window_attention, dmd_gradient, layer)
    return {module.__name__.rpartition(".")[2]: module.cases() for module in modules}
