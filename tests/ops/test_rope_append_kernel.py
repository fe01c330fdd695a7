"""The body of rope_append's CUDA kernel (csrc/rope_append/kernel.h), run lane by lane on the host: the code
that launch.cu compiles for the GPU, against the CPU backend and the float64 oracle. What only a GPU can show
is not shown here."""

import ctypes
from dataclasses import dataclass

import pytest
import torch

import rf_kernels as rf
from benchmarks import traffic
from helpers import host_lanes
from helpers.host_lanes import DTYPES, integers, pointers
from rf_kernels.reference import rope_append as ref
from rf_kernels.testing import assert_equal_bits, assert_within_eager


@pytest.fixture(scope="session")
def lanes(tmp_path_factory):
    return host_lanes.build("rope_append_lanes", tmp_path_factory.mktemp("lanes"))


def run_lanes(lanes, call, *, threads=0, reverse=False):
    """rope_append by the kernel's body. Returns q_out and the elements per access, times ten where tokens are
    held and times a hundred on the straight way; the caches of ``call`` are written."""
    q, k, v, k_cache, v_cache = call.data
    q_out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    slots, n = call.slots, q.shape[1] // call.slots.shape[-1]
    weights = (call.kwargs["q_weight"], call.kwargs["k_weight"])
    angles = call.kwargs["angles"]
    sizes = [
        DTYPES.index(q.dtype),
        {None: 0, "model": 1, "head": 2}[call.kwargs["norm"]],
        q.shape[3],
        q.shape[1],
    ]
    sizes += [q.shape[0], q.shape[2], k.shape[2], *(w is not None and w.dtype != q.dtype for w in weights)]
    sizes += [slots.stride(0) if slots.ndim == 2 else 0, slots.stride(-1), n, k_cache.shape[1]]
    sizes += [0 if angles is None or angles.shape[0] == 1 else angles.stride(0)]
    sizes += [ref.LAYOUTS.index(call.kwargs["layout"]), len(call.kwargs["axes"]) // 3, *call.kwargs["axes"]]
    rows = (q, q_out, k, k_cache, v, v_cache)
    strides = [s for t in rows for s in ((0, 0, 0) if t is None else t.stride()[:3])]
    tensors = (q, q_out, k, k_cache, v, v_cache, slots, angles, *weights)
    eps = ctypes.c_double(call.kwargs["eps"])
    vector = lanes(integers(sizes), integers(strides), pointers(tensors), eps, threads, int(reverse))
    assert vector > 0, "a lane wrote beyond its shared memory"
    return q_out, vector


@dataclass
class Call:
    data: tuple
    slots: torch.Tensor
    kwargs: dict

    def clone(self, dtype=None):
        def copy(t):
            if t is None or not t.is_floating_point():
                return t
            return t.to(dtype) if dtype else t.clone(memory_format=torch.preserve_format)

        q, k, v, k_cache, v_cache = self.data
        data = (
            (*(copy(t) for t in (q, k, v)), copy(k_cache), copy(v_cache))
            if dtype
            else (q, k, v, k_cache.clone(), v_cache.clone())
        )
        kwargs = {
            name: copy(x) if isinstance(x, torch.Tensor) and dtype else x for name, x in self.kwargs.items()
        }
        return Call(data, self.slots, kwargs)

    def run(self, path, **more):
        return path(*self.data, slots=self.slots, **self.kwargs, **more)


def make(
    dtype,
    *,
    pairs=(6, 5, 5),
    dim=32,
    heads=(4, 2),
    layout="adjacent",
    norm="model",
    batch=2,
    frames=2,
    grid=(2, 3),
    offset=0,
    per_sample=False,
    float_weight=False,
    seed=0,
):
    """A call with inputs that are views of one projection, shifted by ``offset`` elements; NaN in the
    caches."""
    generator = torch.Generator().manual_seed(seed)
    q_heads, kv_heads = heads
    n = grid[0] * grid[1]
    tokens, cache_tokens = frames * n, (frames + 2) * n
    width = (q_heads + 2 * kv_heads) * dim
    pool = torch.randn(batch * tokens * width + offset, generator=generator, dtype=torch.float64).to(dtype)
    qkv = pool[offset:].view(batch, tokens, q_heads + 2 * kv_heads, dim)
    q, k, v = qkv.split((q_heads, kv_heads, kv_heads), dim=2)
    caches = [torch.full((batch, cache_tokens, kv_heads, dim), float("nan"), dtype=dtype) for _ in range(2)]
    angles, axes = None, []
    if pairs is not None:
        rope = rf.RoPE(pairs=pairs, bases=(1e4,) * len(pairs), layout=layout)
        start = (
            [[5 + f for f in range(frames)]]
            if not per_sample
            else [[5 + 7 * b + f for f in range(frames)] for b in range(batch)]
        )
        sizes = {1: (), 2: (n,), 3: grid}[len(pairs)]
        if len(pairs) == 1:
            start = [list(range(3, 3 + tokens))]
        angles, axes = rope.table([start, *(range(s) for s in sizes)], dtype=dtype)
    weights = [None, None]
    if norm is not None:
        widths = [h * dim if norm == "model" else dim for h in heads]
        weights = [torch.randn(w, generator=generator, dtype=torch.float64) for w in widths]
        weights = [w.float() if float_weight else w.to(dtype) for w in weights]
    slots = torch.randperm(frames + 2, generator=generator)[:frames].to(torch.int32)
    if per_sample:
        slots = torch.stack([slots.roll(b) for b in range(batch)])
    kwargs = dict(
        angles=angles, axes=axes, layout=layout, q_weight=weights[0], k_weight=weights[1], norm=norm, eps=1e-6
    )
    return Call((q, k, v, *caches), slots, kwargs)


CASES = {
    "wan": dict(pairs=(22, 21, 21), dim=128, heads=(3, 3)),
    "wan, more tokens than a block": dict(pairs=(22, 21, 21), dim=128, heads=(2, 2), grid=(4, 5), batch=1),
    "wan, an odd number of tokens": dict(pairs=(22, 21, 21), dim=128, heads=(2, 2), grid=(3, 3), batch=1),
    "wan, one head": dict(pairs=(22, 21, 21), dim=128, heads=(1, 1)),
    "head norm": dict(norm="head"),
    "no norm": dict(norm=None),
    "no rotation": dict(pairs=None),
    "neither": dict(pairs=None, norm=None),
    "half": dict(layout="half"),
    "axis_half, whole packs": dict(layout="axis_half", pairs=(8, 8), dim=48),
    "axis_half, odd axes": dict(layout="axis_half", pairs=(6, 5, 5)),
    "tail of one pack": dict(pairs=(16,), dim=40, layout="half"),
    "tail of three packs": dict(pairs=(8,), dim=40),
    "odd head dim": dict(pairs=(3, 2, 2), dim=17),
    "pairs that fill no pack": dict(pairs=(5,), dim=16),
    "an axis without pairs": dict(pairs=(0, 8, 8), layout="axis_half", dim=32),
    "one token": dict(grid=(1, 1), frames=1, batch=1),
    "per sample": dict(per_sample=True, batch=3),
    "float32 weights": dict(float_weight=True, norm="head"),
    "shifted by one element": dict(offset=1),
    "more q heads": dict(heads=(8, 1), dim=64, pairs=(16, 16)),
    "more kv heads": dict(heads=(1, 3)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_body(lanes, name, dtype):
    call = make(dtype, **CASES[name])
    ours, backend, eager = call.clone(), call.clone(), call.clone()
    exact = call.clone(torch.float64)
    exact.kwargs["angles"] = make(torch.float64, **CASES[name]).kwargs["angles"]
    q_out, _ = run_lanes(lanes, ours)
    q_cpu, q_eager, q_exact = (
        backend.run(rf.rope_append),
        eager.run(ref.rope_append),
        exact.run(ref.rope_append),
    )

    assert_equal_bits(ours.data[4], backend.data[4])
    assert_within_eager(q_out, q_exact, q_eager)
    assert_within_eager(ours.data[3], exact.data[3], eager.data[3])
    if call.kwargs["norm"] is None:
        # Without a norm there is no sum whose order could differ: the two backends agree to the last bit.
        assert_equal_bits(q_out, q_cpu)
        assert_equal_bits(ours.data[3], backend.data[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["latent", "wan", "odd head dim", "shifted by one element"])
def test_keys_alone(lanes, name, dtype):
    """The bits that keys have beside values; tokens are held as ever, but on no straight way."""
    cases = CASES | {"latent": dict(pairs=(6, 5, 5), dim=224, heads=(12, 1))}
    call = make(dtype, **cases[name])
    both, alone = call.clone(), call.clone()
    q, k, _, k_cache, _ = alone.data
    alone.data = (q, k, None, k_cache, None)
    (q_both, width), (q_alone, width_alone) = (run_lanes(lanes, c) for c in (both, alone))
    assert_equal_bits(q_alone, q_both)
    assert_equal_bits(k_cache, both.data[3])
    assert width_alone == (width // 10 if width >= 100 else width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lanes_in_any_number_and_order(lanes, dtype):
    """Within a phase no lane may read what another writes; several passes over a wide row are the same
    arithmetic."""
    call = make(dtype, pairs=(16, 8, 8), dim=72, heads=(5, 2))
    results = []
    for threads, reverse in ((0, False), (0, True), (32, False), (7, True), (1, False)):
        one = call.clone()
        q_out, _ = run_lanes(lanes, one, threads=threads, reverse=reverse)
        results.append((q_out, one.data[3], one.data[4]))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_equal_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_access_width(lanes, dtype):
    """16 bytes where rows allow it, else elements; which calls have their tokens held, and which of these go
    the straight way."""
    wide = 16 // dtype.itemsize
    for name in ("wan", "wan, one head", "wan, more tokens than a block"):
        assert run_lanes(lanes, make(dtype, **CASES[name]).clone())[1] == 100 * wide, name
    for name in (
        "wan, an odd number of tokens",
        "head norm",
        "half",
        "more q heads",
        "no norm",
        "per sample",
    ):
        assert run_lanes(lanes, make(dtype, **CASES[name]).clone())[1] == 10 * wide, name
    for name in ("axis_half, whole packs", "tail of one pack"):
        assert run_lanes(lanes, make(dtype, **CASES[name]).clone())[1] in (wide, 10 * wide), name
    for name in ("shifted by one element", "odd head dim"):
        assert run_lanes(lanes, make(dtype, **CASES[name]).clone())[1] == 1, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["wan", "no norm", "odd head dim", "more q heads"])
def test_bytes_moved_are_those_predicted(lanes, name, dtype):
    """Every row once; the weights once a token, or once a block of six where tokens are held (which the
    caches of the GPU serve)."""
    call = make(dtype, **CASES[name])
    (batch, tokens, q_heads, dim), kv_heads = call.data[0].shape, call.data[1].shape[2]
    shape = dict(
        batch=batch, tokens=tokens, frames=2, q_heads=q_heads, kv_heads=kv_heads, head_dim=dim, dtype=dtype
    )
    weights = 0 if call.kwargs["norm"] is None else (q_heads + kv_heads) * dim * dtype.itemsize
    lanes.moved_bytes()
    width = run_lanes(lanes, call)[1]
    reads = batch * tokens if width <= 16 // dtype.itemsize else batch * 2 * -(-tokens // 2 // 6)
    assert lanes.moved_bytes() == traffic.rope_append(**shape, angles=0)["rows"] + reads * weights


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_half_precision_without_instructions_for_it(lanes, dtype):
    """The host build has no F16C: every bit pattern through float32 and back; every kind of float32 rounded
    to nearest even."""
    call = make(dtype, pairs=None, norm=None, dim=64, heads=(1024, 1), frames=1, grid=(1, 1), batch=1)
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, 1024, 64)
    call.data = (patterns, *call.data[1:])
    found, nan = run_lanes(lanes, call)[0], patterns.isnan()
    assert_equal_bits(found.isnan(), nan)
    assert_equal_bits(found[~nan], patterns[~nan])

    # A row of ones has norm 1: what is rounded are the weights.
    lower = torch.tensor([1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001], dtype=torch.int64)
    weight = (
        ((torch.arange(1 << 16).unsqueeze(1) << 16) + lower).to(torch.int32).view(torch.float32).flatten()
    )
    for part in weight.split(1 << 16):
        call.data = (torch.ones_like(patterns), *call.data[1:])
        call.kwargs |= dict(norm="model", q_weight=part.contiguous(), eps=0.0)
        found, nan = run_lanes(lanes, call)[0].flatten(), part.isnan()
        assert bool(found[nan].isnan().all())
        assert_equal_bits(found[~nan], part[~nan].to(dtype))


def test_slots_without_a_place_are_not_written(lanes):
    call = make(torch.float32, frames=3)
    call.slots = torch.tensor([1, -1, 5], dtype=torch.int32)  # the cache has frame slots 0 ... 4
    n = call.data[0].shape[1] // 3
    run_lanes(lanes, call)
    for cache in call.data[3:]:
        written = cache.isfinite().all(dim=(0, 2, 3))
        assert written.tolist() == [n <= t < 2 * n for t in range(cache.shape[1])]


def shifted(t):
    """The same values and strides, one element off a 16-byte boundary."""
    pool = torch.empty(t.numel() + 1, dtype=t.dtype)
    return pool[1:].view(t.shape).copy_(t)


def stretched(t, dim):
    """The same values, with a stride in ``dim`` that is no multiple of 16 bytes."""
    order = [dim, *(d for d in range(t.ndim - 1) if d != dim)]
    flat = t.permute(*order, t.ndim - 1).reshape(t.shape[dim], -1)
    pool = torch.empty(t.shape[dim], flat.shape[1] + 1, dtype=t.dtype)
    pool[:, :-1] = flat
    return (
        pool[:, :-1]
        .unflatten(1, [t.shape[d] for d in (*order[1:], t.ndim - 1)])
        .permute(*(order.index(d) for d in range(t.ndim - 1)), t.ndim - 1)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_tensor_is_asked_for_its_alignment(lanes, dtype):
    """One tensor off, by its address or by one stride, is enough for single elements; the results stay
    right."""
    base = make(dtype)
    base.data = (*(t.contiguous() for t in base.data[:3]), *base.data[3:])
    eager, exact = base.clone(), base.clone(torch.float64)
    exact.kwargs["angles"] = make(torch.float64).kwargs["angles"]
    q_eager, q_exact = eager.run(ref.rope_append), exact.run(ref.rope_append)
    assert run_lanes(lanes, base.clone())[1] >= 16 // dtype.itemsize

    changes = [
        (i, change)
        for i in range(5)
        for change in (shifted, *(lambda t, d=d: stretched(t, d) for d in range(3)))
    ]
    for place, change in [*changes, ("q_weight", shifted), ("k_weight", shifted)]:
        call = base.clone()
        if isinstance(place, int):
            call.data = tuple(change(t) if i == place else t for i, t in enumerate(call.data))
            assert torch.equal(call.data[place].nan_to_num(), base.data[place].nan_to_num())
        else:
            call.kwargs[place] = change(call.kwargs[place])
        q_out, vector = run_lanes(lanes, call)
        assert vector == 1, place
        assert_within_eager(q_out, q_exact, q_eager)
        assert_within_eager(call.data[3], exact.data[3], eager.data[3])


# ---- on a GPU: the same calls through the op ---------------------------------------------------------------


def on_gpu(call):
    def move(t):
        return t.cuda() if isinstance(t, torch.Tensor) else t

    return Call(
        tuple(map(move, call.data)), call.slots.cuda(), {name: move(x) for name, x in call.kwargs.items()}
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gpu(name, dtype):
    """The kernel against the oracle; against the CPU backend to the last bit where no sum is involved."""
    call = make(dtype, **CASES[name])
    gpu, backend, eager, exact = on_gpu(call), call.clone(), call.clone(), call.clone(torch.float64)
    exact.kwargs["angles"] = make(torch.float64, **CASES[name]).kwargs["angles"]
    q_out = gpu.run(rf.rope_append).cpu()
    assert rf.last_dispatch()[:3] == ("rope_append", "cuda", False)
    q_cpu, q_eager, q_exact = (
        backend.run(rf.rope_append),
        eager.run(ref.rope_append),
        exact.run(ref.rope_append),
    )
    assert_equal_bits(gpu.data[4].cpu(), backend.data[4])
    assert_within_eager(q_out, q_exact, q_eager)
    assert_within_eager(gpu.data[3].cpu(), exact.data[3], eager.data[3])
    if call.kwargs["norm"] is None:
        assert_equal_bits(q_out, q_cpu)
        assert_equal_bits(gpu.data[3].cpu(), backend.data[3])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_graph_replays_with_new_slots():
    """Slots and angles are read by the kernel: a captured call follows them without being captured again."""
    call = on_gpu(make(torch.bfloat16))
    call.run(rf.rope_append)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q_out = call.run(rf.rope_append)
    for slots in ([3, 1], [0, -1]):  # the second leaves a frame out
        call.slots.copy_(torch.tensor(slots, dtype=torch.int32))
        for cache in call.data[3:]:
            cache.fill_(float("nan"))
        graph.replay()
        expected = make(torch.bfloat16)
        n = expected.data[0].shape[1] // 2
        expected.slots = torch.tensor([s if s >= 0 else 2 for s in slots], dtype=torch.int32)
        direct = on_gpu(expected)
        assert_equal_bits(q_out, direct.run(rf.rope_append))
        for cache, other in zip(call.data[3:], direct.data[3:], strict=True):
            if -1 in slots:
                other[:, 2 * n : 3 * n] = float("nan")
            assert torch.equal(cache.isnan(), other.isnan())
            assert torch.equal(cache.nan_to_num(), other.nan_to_num())
