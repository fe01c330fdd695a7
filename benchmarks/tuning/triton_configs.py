"""`make tuning TRITON=1`: times tile sizes of the Triton kernels on this GPU, at the shapes of the 1.3B
model, and writes the faster ones to build/tuning/triton.json.

The library never does this by itself, and uses the file where it is told to: RF_TRITON_CONFIG=FILE. The file
says which architecture and which Triton it is for, because a tile size decides bits as well as speed;
anywhere else it is refused. dmd_gradient has no choice: its tile is part of its error bound.
"""

import argparse
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from rf_kernels._backend import triton_problem

from ..gpu_suite.jobs import disagreement, reason
from ..timing import measure

ROOT = Path(__file__).resolve().parents[2]
GAIN = 0.98  # of the fixed config's time: what is less than that is noise


class Problem(NamedTuple):
    """A kernel with inputs: ``call()`` returns the tensors it wrote."""

    kernel: str
    fixed: tuple
    candidates: list[tuple]
    call: Callable[[], list[torch.Tensor]]


def kernels(op: str):
    return importlib.import_module(f"rf_kernels.triton.{op}")


def around(fixed) -> list:
    """Half and twice every tile size, other numbers of warps and stages; powers of two, `tl.dot` needs 16."""
    if hasattr(fixed, "each"):
        sizes = itertools.product((2048, 4096, 8192), (4, 8, 16, 32))
    else:
        near = [sorted({max(16, n // 2), n, 2 * n}) for n in (fixed.queries, fixed.keys)]
        sizes = itertools.product(*near, (4, 8), (1, 2, 3))
    return [type(fixed)(*values) for values in sizes]


def attention(dtype, head_dim, device, tokens, heads) -> Iterator[Problem]:
    op = kernels("sink_window_attention")
    q, out, grad_out, grad_q = (
        torch.randn(1, tokens, heads, head_dim, device=device).to(dtype) for _ in "1234"
    )
    k, v, grad_k, grad_v = (
        torch.randn(1, 3 * tokens, heads, head_dim, device=device).to(dtype) for _ in "1234"
    )
    lse = torch.empty(1, heads, tokens, device=device)
    options = (3 * tokens, head_dim**-0.5, None, 0, None, None, None)

    def forward():
        op.sink_window_attention(q, k, v, *options, out, lse)
        return [out]

    def backward():
        grads = (grad_q, grad_k, grad_v)
        op.sink_window_attention_backward(grad_out, q, k, v, out, lse, *options, *grads)
        return list(grads)

    for call, is_backward in ((forward, False), (backward, True)):
        fixed = op.config(head_dim, dtype, is_backward)
        forward()  # the backward reads its results
        yield Problem(op.kernel_name(head_dim, dtype, is_backward), fixed, around(fixed), call)


def rope_append(dtype, head_dim, device, tokens, heads) -> Iterator[Problem]:
    import rf_kernels as rf

    op, grid = kernels("rope_append"), (3, tokens // 3)
    angles, axes = rf.RoPE3D.wan(head_dim).table([*map(range, grid), range(1)], dtype=dtype, device=device)
    q, k, v = (torch.randn(1, grid[0] * grid[1], heads, head_dim, device=device).to(dtype) for _ in range(3))
    caches = [torch.zeros_like(k) for _ in range(2)]
    weight = torch.ones(heads * head_dim, dtype=dtype, device=device)
    slots, out = torch.arange(3, dtype=torch.int32, device=device), torch.empty_like(q)

    def call():
        op.rope_append(q, k, v, *caches, slots, angles, axes, 0, weight, weight, 1, 1e-6, out)
        return [out, *caches]

    yield Problem(op.kernel_name(heads, head_dim, dtype), op.TILE, around(op.TILE), call)


def ema_evict(dtype, head_dim, device, tokens, heads) -> Iterator[Problem]:
    op, n = kernels("ema_evict"), tokens // 3
    source = [torch.randn(1, 6 * n, heads, head_dim, device=device).to(dtype) for _ in range(2)]
    caches = [torch.empty_like(t) for t in source]
    state = torch.zeros(1, 3 * n, heads, head_dim, device=device)
    states = [torch.empty_like(state) for _ in range(2)]
    schedule = torch.tensor([[0, 1, j + 3] for j in range(3)], dtype=torch.int32, device=device)
    turns = torch.zeros(3, 2, 22 if head_dim == 128 else 1, 2, device=device)
    alpha = torch.tensor(0.999, dtype=torch.float64, device=device)
    code = op.FLOAT32.value

    def call():
        # The same work every time: the inputs are put back, which costs all candidates alike.
        for target, values in zip((*caches, *states), (*source, state, state), strict=True):
            target.copy_(values)
        op.ema_evict(
            *caches, states[0], None, states[1], schedule, turns, alpha, n, [0, 1, 2], code, True, None
        )
        return [*caches, *states]

    yield Problem(op.kernel_name(heads, head_dim, dtype), op.TILE, around(op.TILE), call)


def choose(problem: Problem, device: str, seconds: float) -> tuple | None:
    """The fastest config, or None where the fixed one is as fast; a line for each. A candidate that does not
    compile, or whose results are not those of the fixed config, is named and not timed."""
    from rf_kernels.triton.common import tuned

    expected = [t.double() for t in problem.call()]

    def running(candidate):
        def call():
            tuned()[problem.kernel] = candidate._asdict()
            try:
                return problem.call()
            finally:
                del tuned()[problem.kernel]

        return call

    calls = {}
    for candidate in {problem.fixed: None, **dict.fromkeys(problem.candidates)}:
        name = "fixed" if candidate == problem.fixed else str(tuple(candidate))
        try:
            found = running(candidate)()
        except Exception as error:  # too much shared memory, or a tile that Triton does not take
            print(f"  {name:24s} left out: {reason(error)[:70]}")
            continue
        wrong = [disagreement(name, f, e, 4) for f, e in zip(found, expected, strict=True)]
        if any(wrong):
            print(f"  {name:24s} left out: its results differ from the fixed config's")
        else:
            calls[name] = (candidate, running(candidate))
    timings = measure({name: call for name, (_, call) in calls.items()}, device=device, seconds=seconds)
    for name in sorted(timings, key=lambda name: timings[name].p50):
        print(f"  {name:24s} {timings[name].p50 * 1e6:9.1f} us")
    best = min(timings, key=lambda name: timings[name].p50)
    return None if timings[best].p50 > GAIN * timings["fixed"].p50 else calls[best][0]


def tune(cases, device: str, out: Path, seconds: float) -> None:
    """Write what is found for ``cases``: (a function of Problems, its arguments)."""
    from rf_kernels.triton.common import tuned_for

    configs = {}
    for build, *arguments in cases:
        for problem in build(*arguments):
            print(f"{problem.kernel}: fixed is {problem.fixed}", flush=True)
            best = choose(problem, device, seconds)
            if best is not None:
                configs[problem.kernel] = best._asdict()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"for": tuned_for(), "configs": configs}, indent=2) + "\n")
    print(f"{len(configs)} configs in {out}: RF_TRITON_CONFIG={out}")


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "tuning" / "triton.json")
    parser.add_argument("--seconds", type=float, default=0.1, help="of timing, per candidate")
    options = parser.parse_args(arguments)
    if problem := triton_problem():
        sys.exit(f"tuning: {problem}")
    if not torch.cuda.is_available():
        sys.exit("tuning: no GPU: Triton's tile sizes are timed on the GPU that they are for")
    cases = [
        (build, dtype, head_dim, "cuda", 4680, 12)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for build, head_dims in ((attention, (64, 128)), (rope_append, (128,)), (ema_evict, (128,)))
        for head_dim in head_dims
    ]
    tune(cases, "cuda", options.out, options.seconds)


if __name__ == "__main__":
    main()
