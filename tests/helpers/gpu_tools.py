"""What the tests of the CUDA backends share: an op of another device behind CPU tensors, graph capture,
poisoned memory, a busy stream. On the CPU each of them is its plainest equivalent, so that the tests that use
them run there too."""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F

from helpers.attention_case import visible

SERVED = (torch.bfloat16, torch.float16, torch.float32)  # what every op serves on CUDA


def moved(value, device):
    """A copy of a tensor in new memory of ``device``, strides kept (other values pass); differentiable."""
    if not isinstance(value, torch.Tensor):
        return value
    if 0 in value.stride():  # expanded: elements share memory
        return value.to(device, copy=True)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)


def on(device, function):
    """``function`` on ``device`` for tensors on the CPU: arguments go there, results and what was written
    come back."""

    def to_cpu(result):
        if isinstance(result, torch.Tensor):
            return result.cpu()
        if isinstance(result, tuple):
            parts = [to_cpu(part) for part in result]
            return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
        return result

    def call(*args, **keywords):
        given = [*args, *keywords.values()]
        there = [moved(value, device) for value in given]
        result = function(*there[: len(args)], **dict(zip(keywords, there[len(args) :], strict=True)))
        for mine, remote in zip(given, there, strict=True):
            if isinstance(mine, torch.Tensor) and not mine.requires_grad and 0 not in mine.stride():
                mine.copy_(remote)
        return to_cpu(result)

    return call


def plain_attention(q, k, v, **options):
    """What a user would write in PyTorch: SDPA with the mask of what a chunk sees. The yardstick of
    tolerances."""
    mask = visible(q.shape[1], k.shape[1], **options).to(q.device) if options else None
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


class Captured:
    """A call captured in a CUDA graph. ``replay`` runs the recorded kernels and no Python; its result is
    always the same tensor. On the CPU, which has no graphs, ``replay`` calls the function again."""

    def __init__(self, function, device):
        self.function, self.graph = function, None
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = function()

    def replay(self):
        if self.graph is None:
            self.result = self.function()
        else:
            self.graph.replay()
        return self.result


@contextmanager
def deterministic_algorithms(fill=False):
    """PyTorch's switch, which the ops follow; ``fill``: new tensors hold NaN."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


@contextmanager
def poisoned_memory(device):
    """Under deterministic algorithms: new tensors hold NaN, and on CUDA the allocator's free blocks are
    filled with it too."""
    with deterministic_algorithms(fill=True):
        if torch.device(device).type == "cuda":
            sizes = [2**power for power in range(9, 27)]  # bytes, both pools of the allocator
            blocks = [
                torch.full((size // 4,), float("nan"), device=device) for size in sizes for _ in range(4)
            ]
            torch.cuda.synchronize()
            del blocks
        assert bool(torch.empty(1000, device=device).isnan().all())
        yield


def busy(device, seconds=0.2):
    """Keep the current stream busy for about so long (nothing on the CPU)."""
    if torch.device(device).type == "cuda":
        torch.cuda._sleep(int(seconds * 1.5e9))  # clock cycles, at 1.5 GHz


def new_stream(device):
    """A context in which work goes to a stream of its own."""
    return torch.cuda.stream(torch.cuda.Stream()) if torch.device(device).type == "cuda" else nullcontext()


@contextmanager
def no_synchronisation(device):
    """Whatever makes the host wait for the device raises."""
    if torch.device(device).type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
