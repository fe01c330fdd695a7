"""Calls without end keep nothing: the memory of the process stays flat over every op."""

import gc

import pytest
import torch

import rf_kernels as rf
from helpers.refusals import World

OPS = (
    "rope_append",
    "rope",
    "ema_evict",
    "sink_window_attention",
    "dmd_gradient",
    "dmd_loss",
    "reward_weight",
)
# Strings across PyTorch's stable ABI lost 116 bytes a call. Pages come in whole numbers, and allocators keep
# some for themselves.
PER_CALL = 16
SLACK = 256 * 1024


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def growth(call, calls: int) -> int:
    for _ in range(calls // 10):
        call()
    gc.collect()
    before = resident()
    for _ in range(calls):
        call()
    gc.collect()
    return resident() - before


def refused(op):
    """An error has a text, made in C++ and in Python."""
    call = getattr(World(), op)
    name = next(iter(call))
    call[name] = call[name][0]

    def run():
        with pytest.raises(rf.ArgumentError):
            getattr(rf, op)(**call)

    return run


def backward(op):
    call = getattr(World(), op)
    name = next(iter(call))
    leaf = call[name] = call[name].requires_grad_()
    return lambda: torch.autograd.grad(getattr(rf, op)(**call).sum(), leaf)


def plain(op):
    call = getattr(World(), op)
    return lambda: getattr(rf, op)(**call)


CALLS = {op: (plain, op) for op in OPS}
CALLS |= {f"{op} refused": (refused, op) for op in ("rope", "sink_window_attention", "dmd_loss")}
CALLS |= {f"{op} backward": (backward, op) for op in ("rope", "sink_window_attention", "dmd_loss")}
CALLS |= {name: (lambda name: getattr(rf, name), name) for name in ("last_dispatch", "build_info")}


@pytest.mark.parametrize("calls", [10_000, pytest.param(100_000, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("name", CALLS)
def test_calls_keep_no_memory(name, calls):
    if calls == 10_000 and ("refused" in name or "backward" in name):
        calls = 3_000
    make, op = CALLS[name]
    call = make(op)
    grown = [growth(call, calls)]
    # an allocator may settle late; a leak goes on
    while grown[-1] > SLACK + PER_CALL * calls and len(grown) < 3:
        grown.append(growth(call, calls))
    assert grown[-1] <= SLACK + PER_CALL * calls, f"{grown} bytes in {calls} calls"
