"""Stage: ``sink_window_attention`` beside what is importable. ``python -m benchmarks.gpu_suite.attention
--device cuda --rows FILE``

All candidates get the same memory: q ``[1, Nq, H, D]`` and a layer's view of a cache, strided as the cache
is, without a copy where they can take it so. Every candidate's output is compared with float64 on 64 rows
before it is timed.
"""

import importlib
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from rf_kernels.ops.sink_window_attention import sink_window_attention
from rf_kernels.reference.sink_window_attention import sink_window_attention as oracle

from .. import floors
from ..case import on_triton
from ..sink_window_attention import ULPS, Shape
from .jobs import Job, Options, disagreement, measured_roof, reason, run_jobs

ROWS = 64
SPLITS = (0, 2, 3, 4, 6)  # of FlashAttention-3; 0 lets it choose
OURS = "sink_window_attention"


def sdpa(backend):
    def make(q, k, v, split):
        heads_first = [t.transpose(1, 2) for t in (q, k, v)]

        def call():
            if backend is None:
                return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

        return call

    return make


def concatenated(q, k, v, split):
    """The published path once its keys are rotated: sink and window concatenated, then SDPA."""

    def call():
        keys, values = (torch.cat([t[:, :split], t[:, split:]], dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, keys, values))).transpose(1, 2)

    return call


def flex(q, k, v, split):
    from torch.nn.attention.flex_attention import flex_attention

    backend = "inductor" if q.is_cuda else "eager"
    compiled = torch.compile(flex_attention, dynamic=False, backend=backend)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    return lambda: compiled(*heads_first).transpose(1, 2)


def flash_attention_3():
    """Its function ``flash_attn_func``, wherever it is installed."""
    for name in ("flash_attn_interface", "flash_attn_3.flash_attn_interface"):
        try:
            return importlib.import_module(name).flash_attn_func
        except ImportError:
            continue
    raise ImportError("neither flash_attn_interface nor flash_attn_3 is installed")


def fa3(q, k, v, split, num_splits=None):
    function = flash_attention_3()
    options = {} if num_splits is None else {"num_splits": num_splits}

    def call():
        out = function(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out

    return call


def deterministic(q, k, v, split):
    """Ours, without cuts of tiles over several multiprocessors."""
    return lambda: sink_window_attention(q, k, v, kv_tokens=k.shape[1], deterministic=True)


def triton(q, k, v, split):
    """Ours, in Triton."""
    return on_triton(lambda: sink_window_attention(q, k, v, kv_tokens=k.shape[1]))


#: name -> make(q, k, v, tokens of the sink) -> call
PEERS = {
    "cudnn_sdpa": sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash_sdpa": sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa": sdpa(None),
    "concatenated": concatenated,
    "flex_attention": flex,
    "flash_attention_3": fa3,
    "triton": triton,
    f"{OURS}, deterministic": deterministic,
    **{f"flash_attention_3, {n or 'its own'} splits": partial(fa3, num_splits=n) for n in SPLITS},
}


def build(shape: Shape, dtype: torch.dtype, peers: dict, device: str):
    q = torch.randn(1, shape.queries, shape.heads, shape.head_dim, device=device).to(dtype)
    slots = shape.kv_tokens + shape.frame_tokens
    cache = torch.randn(2, 2, slots, shape.heads, shape.head_dim, device=device).to(dtype)  # layer, (k, v)
    k, v = cache[1, :1], cache[1, 1:]
    valid = shape.kv_tokens
    keys, values = k[:, :valid], v[:, :valid]
    rows = torch.randperm(shape.queries)[:ROWS].to(device)
    truth = oracle(q[:, rows].double(), keys.double(), values.double())

    ours = partial(sink_window_attention, q, k, v, kv_tokens=valid)
    wrong = disagreement(OURS, ours()[:, rows], truth, ULPS)
    if wrong:
        raise AssertionError(wrong)
    calls, left_out = {OURS: ours}, {}
    for name, make in peers.items():
        try:
            call = make(q, keys, values, shape.sink_frames * shape.frame_tokens)
            wrong = disagreement(name, call()[:, rows], truth, ULPS)
        except Exception as error:
            left_out[name] = reason(error)
            continue
        if wrong:
            left_out[name] = wrong
        else:
            calls[name] = call
    return calls, left_out


def job(
    shape: Shape, dtype: torch.dtype = torch.bfloat16, full: bool = False, peers: dict | None = None
) -> Job:
    """``peers`` as in PEERS; else all of those (``full``), or those that neither compile nor have to be
    tuned."""
    if peers is None:
        costly = (
            []
            if full
            else [name for name in PEERS if name in ("flex_attention", "concatenated") or "," in name]
        )
        peers = {name: make for name, make in PEERS.items() if name not in costly}
    label = f"{shape.name} [1, {shape.queries} x {shape.kv_tokens}, {shape.heads}, {shape.head_dim}]"
    cost = floors.sink_window_attention(
        1, shape.queries, shape.heads, shape.head_dim, kv_tokens=shape.kv_tokens, element_size=dtype.itemsize
    )
    return Job(OURS, label, dtype, partial(build, shape, dtype, peers), cost)


def jobs(tiny: bool = False, quick: bool = False) -> list[Job]:
    """Wan's streaming shapes, the three of the design first: a chunk of 3 frames, of 1, and a quarter of the
    heads."""
    if tiny:
        return [job(Shape("tiny chunk", grid=(2, 3), heads=2, head_dim=32), full=True)]
    names = {3: "chunk", 1: "frame"}
    found = [job(Shape("1.3B chunk"), full=True), job(Shape("1.3B frame", frames=1), full=True)]
    found.append(job(Shape("1.3B chunk, 3 heads", heads=3), full=True))
    if quick:
        return found
    for frames, name in names.items():
        for length in (6, 12, 21):
            found.append(job(Shape(f"1.3B {name}, L {length}", frames=frames, window_frames=length - 3)))
        found.append(job(Shape(f"14B {name}", frames=frames, heads=40)))
        found.append(job(Shape(f"1.3B {name}, 720p", grid=(45, 80), frames=frames)))
        found.append(job(Shape(f"1.3B {name}, 6 heads", frames=frames, heads=6)))
    found.append(job(Shape("1.3B frame, 3 heads", frames=1, heads=3)))
    found.append(job(Shape("1.3B first chunk", sink_frames=3, window_frames=0)))
    found.append(job(Shape("1.3B chunk"), torch.float16))
    found.append(job(Shape("head dim 64, chunk", head_dim=64)))
    found.append(job(Shape("14B chunk, 720p", grid=(45, 80), heads=40)))
    return found


def main(arguments=None) -> None:
    options = Options.parse(arguments)
    run_jobs(jobs(options.tiny, options.quick), options, measured_roof(options))


if __name__ == "__main__":
    main()
