"""A cache on memory that the caller has allocated, and a sink that the caller writes."""

import copy
import re

import pytest
import torch

import rf_kernels as rf
from helpers.cache_case import make, step, tensors
from rf_kernels.reference.streaming import StreamingReference
from rf_kernels.testing import assert_equal_bits, relative_l2


def memory(cache, kind):
    """k and v for a cache like this one, in the ways in which pipelines allocate them."""
    layers, (batch, tokens, heads, dim) = cache.spec.layers, cache.k.shape[1:]
    new = {"dtype": cache.spec.dtype}
    if kind == "whole":
        return torch.full(cache.k.shape, torch.nan, **new), torch.full(cache.k.shape, torch.nan, **new)
    if kind == "dictionaries":
        return [
            [torch.full((batch, tokens, heads, dim), torch.nan, **new) for _ in range(layers)] for _ in "kv"
        ]
    if kind == "larger":
        both = torch.full((2, layers, batch, tokens + 5, heads + 1, dim + 3), torch.nan, **new)
        return [list(x[:, :, 2 : tokens + 2, 1:, :dim]) for x in both]
    both = torch.full((2, batch, tokens, layers, heads, dim), torch.nan, **new)
    return [[x[:, :, layer] for layer in range(layers)] for x in both]


@pytest.mark.parametrize("kind", ["whole", "dictionaries", "larger", "woven"])
@pytest.mark.parametrize(
    "geometry",
    [{"grid": (2, 3), "dtype": torch.bfloat16}, {"grid": (1, 2), "batch": 2, "dtype": torch.float32}],
)
def test_a_cache_on_the_callers_memory_is_the_same_cache(kind, geometry, tmp_path):
    """Evictions, a seek, rollback, save and load, reset and a copy; and the caller sees what is written."""
    plain = make(2, 3, policy=rf.EMASink(0.9), layers=2, undo_frames=3, **geometry)
    k, v = memory(plain, kind)
    cache = rf.SinkWindowCache(plain.spec, sink=plain.sink, k=k, v=v)
    assert cache.nbytes == plain.nbytes
    for number in range(6):
        for each in (cache, plain):
            chunk = each.open(2, undo=True)
            chunk.attend(0, *tensors(each, 2, 5))
            chunk.rollback()
        for a, b in zip(step(cache, 2, number), step(plain, 2, number), strict=True):
            assert_equal_bits(a, b)
    for layer in range(2):
        assert_equal_bits(k[layer], plain.k[layer])
        assert_equal_bits(v[layer], plain.v[layer])
    cache.save(tmp_path / "ours")
    plain.load(tmp_path / "ours")
    state = plain.state_dict()
    cache.reset()
    assert not any(bool(x.any()) for x in (*k, *v))
    cache.load_state_dict(state)
    outputs, copied = [], copy.deepcopy(cache)
    for each in (cache, plain, copied):
        with each.chunk(1, start=10) as chunk:
            results = [chunk.attend(i, *tensors(each, 1, 80 + i)) for i in range(2)]
        outputs.append(torch.stack(results))
        assert_equal_bits(outputs[-1], outputs[0])
    if kind == "whole":
        with pytest.raises(rf.ArgumentError, match="memory apart from the cache"):
            state["meta"] |= {"next_frame": 11}
            cache.load_state_dict({"meta": state["meta"], "tensors": state["tensors"] | {"k": cache.k}})


def test_memory_that_does_not_fit_is_refused():
    spec = make(2, 3, layers=2).spec
    shape = (1, 30, 2, 32)

    def new(*size, **more):
        return torch.zeros(*size, **({"dtype": torch.float64} | more))

    good = [new(*shape) for _ in range(2)]
    fused = new(1, 31, 2, 33)
    cases = [
        (None, "k", "a tensor, or a sequence of one per layer, found NoneType"),
        ([good[0]], "k", "2 layers, found 1"),
        (new(3, *shape), "k", "2 layers, found"),
        (new(2, 1, 29, 2, 32), "k", r"\[1, 30, 2, 32\] in a layer, found \[1, 29, 2, 32\]"),
        ([good[0], None], "k[1]", "a tensor, found NoneType"),
        ([good[0], new(1, 30, 3, 32)], "k[1]", r"in a layer, found \[1, 30, 3, 32\]"),
        ([good[0], new(*shape, dtype=torch.float32)], "k[1]", "torch.float64, found torch.float32"),
        ([good[0], new(*shape, device="meta")], "k[1]", "a tensor on cpu, found meta"),
        ([good[0], new(*shape, requires_grad=True)], "k[1]", "does not require grad"),
        ([good[0], new(1, 30, 32, 2).transpose(2, 3)], "k[1]", "a contiguous last dimension"),
        ([good[0], new(1, 1, 2, 32).expand(*shape)], "k[1]", "elements apart in memory"),
        ([good[0], good[0]], "k[1]", r"memory apart from k\[0\]"),
        ([fused[:, 1:, :, 1:], fused[:, :30, :, :32]], "k[1]", r"memory apart from k\[0\]"),
    ]
    for k, name, message in cases:
        with pytest.raises(
            rf.ArgumentError, match=f"SinkWindowCache: argument `{re.escape(name)}`: .*{message}"
        ):
            rf.SinkWindowCache(spec, sink=rf.EMASink(), k=k, v=[new(*shape) for _ in range(2)])
    woven = new(2, 1, 30, 2, 2, 32).unbind(3)
    for k, v in ((good, good), woven):
        with pytest.raises(rf.ArgumentError, match=r"argument `v(\[0\])?`: .*memory apart from k\[0\]"):
            rf.SinkWindowCache(spec, sink=rf.EMASink(), k=k, v=v)


POLICIES = [rf.EMASink(0.9), rf.EMASink(0.9, rephase=False), rf.StaticSink(rephase=True), rf.StaticSink()]


@pytest.mark.parametrize("geometry", [{"grid": (2, 3)}, {"grid": (3, 1), "head_dim": 16, "heads": 3}])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{type(p).__name__}-{p.rephase}")
@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_a_sink_that_the_caller_writes(chunks, policy, geometry):
    """Zeroed at a scene cut, or one frame copied over the other; then on, against the plain recomputation.
    Before and after the first frame has left."""
    cache = make(2, 3, policy=policy, **geometry)
    kind = "ema" if isinstance(policy, rf.EMASink) else "static"
    reference = StreamingReference(
        grid=geometry["grid"], sink_frames=2, window_frames=3, policy=kind, alpha=0.9, rephase=policy.rephase
    )

    def go(number):
        data = tensors(cache, 2, number)
        reference.begin(2)
        with cache.chunk(2) as chunk:
            assert relative_l2(chunk.attend(0, *data), reference.attend(*data)) < 1e-12

    for number in range(chunks):
        go(number)
    n = cache.spec.frame_tokens
    for slots in (cache.k, cache.v):
        slots[0, :, n : 2 * n].zero_()
    before = cache.k.clone()
    cache.reset_sink()
    assert_equal_bits(cache.k, before)
    reference.sink_kv[1] = tuple(torch.zeros_like(x) for x in reference.sink_kv[1])
    go(50)
    go(51)
    with cache.chunk(1) as chunk, pytest.raises(rf.ArgumentError, match="reset_sink: argument `self`"):
        try:
            cache.reset_sink()
        finally:
            reference.begin(1)
            chunk.attend(0, *(data := tensors(cache, 1, 60)))
            reference.attend(*data)
    for _ in range(2):  # what the slots say is what the state says
        cache.reset_sink()
    go(61)


@pytest.mark.parametrize("state", ["compensated", "float32", "published"])
def test_a_sink_in_half_precision_is_taken_from_its_slots(state):
    cache = make(2, 3, policy=rf.EMASink(0.9, state=state), dtype=torch.bfloat16)
    for number in range(6):
        step(cache, 2, number)
    n = 2 * cache.spec.frame_tokens
    noise = torch.randn(cache.v[0, :, :n].shape).bfloat16()
    cache.v[0, :, :n] = noise
    stale = cache.sink_state(0)[1]
    cache.reset_sink()
    assert_equal_bits(cache.sink_state(0)[1], noise.float())
    assert state != "float32" or relative_l2(stale, noise) > 0.1
