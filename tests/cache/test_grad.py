"""``Chunk.attend`` under grad: its values, its gradients against finite differences and the float64
reference, and that neither backward nor a recomputation reads a cache that has gone on."""

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import rf_kernels as rf
from helpers.cache_case import make, state_of, tensors
from rf_kernels.reference.streaming import StreamingReference, rms_norm
from rf_kernels.testing import assert_equal_bits, fingerprint, relative_l2

#: S, W, policy, the reference's policy.
STREAMS = {
    "none": (0, 3, rf.NoSink(), "none"),
    "static": (1, 3, rf.StaticSink(rephase=True), "static"),
    "ema": (2, 3, rf.EMASink(0.6), "ema"),
}
LENGTHS = (2, 1, 2, 2, 1, 2)
EPS = 1e-3


def new_cache(kind, **more):
    frames_sink, frames_window, policy, _ = STREAMS[kind]
    return make(frames_sink, frames_window, policy=policy, grid=(1, 2), head_dim=8, **more)


def weights(norm):
    """Weights of the norms of q and k, leaves, or nothing."""
    size = {"model": 16, "head": 8, None: 0}[norm]
    return [
        torch.rand(size, generator=torch.Generator().manual_seed(i)).double().add(0.5).requires_grad_()
        for i in (1, 2)
    ][: 2 if size else 0]


def leaves(cache, frames, seed):
    return [t.requires_grad_() for t in tensors(cache, frames, seed)]


def attend(chunk, q, k, v, *w):
    norms = dict(zip(("q_norm", "k_norm"), w, strict=True)) if w else {}
    return chunk.attend(0, q, k, v, **norms, eps=EPS)


def fill(chunk, seed):
    """A forward without grad in all layers."""
    with torch.no_grad():
        for layer in range(chunk.cache.spec.layers):
            chunk.attend(layer, *tensors(chunk.cache, chunk.frames, seed))


def go_on(cache, chunks=4):
    """Later chunks take every slot of the window and rewrite the plan's buffers."""
    for number in range(chunks):
        with cache.chunk(2) as chunk:
            fill(chunk, 900 + number)


# ---- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["model", "head", None])
@pytest.mark.parametrize("kind", STREAMS)
def test_gradients_are_those_of_the_reference(kind, norm):
    """Chunk by chunk, with and without evictions: two forwards that both count, backward after all chunks,
    against autograd through the plain recomputation."""
    cache, w = new_cache(kind), weights(norm)
    frames_sink, frames_window, policy, rule = STREAMS[kind]
    reference = StreamingReference(
        grid=(1, 2),
        sink_frames=frames_sink,
        window_frames=frames_window,
        policy=rule,
        alpha=getattr(policy, "alpha", 1.0),
    )

    def normed(x, weight):
        return rms_norm(x.flatten(2) if norm == "model" else x, weight, EPS).view_as(x)

    waiting, evicted = [], 0
    for number, frames in enumerate(LENGTHS):
        total, total_reference, inputs = 0, 0, []
        reference.begin(frames)
        with cache.chunk(frames) as chunk:
            evicted += len(chunk.plan.leaving)
            for forward in range(2):
                q, k, v = leaves(cache, frames, 10 * number + forward)
                factor = tensors(cache, frames, 500 + number)[0]
                y = attend(chunk, q, k, v, *w)
                plain = (
                    reference.attend(*(normed(x, weight) for x, weight in zip((q, k), w, strict=True)), v)
                    if w
                    else reference.attend(q, k, v)
                )
                assert relative_l2(y.detach(), plain.detach()) < 1e-12
                total, total_reference, inputs = (
                    total + (y * factor).sum(),
                    total_reference + (plain * factor).sum(),
                    [*inputs, q, k, v],
                )
            assert not any(t.requires_grad for t in state_of(cache))
        expected = torch.autograd.grad(total_reference, [*inputs, *w])
        waiting.append((total, [*inputs, *w], expected))
    assert evicted >= 3
    for total, inputs, expected in reversed(waiting):
        for ours, theirs in zip(torch.autograd.grad(total, inputs), expected, strict=True):
            assert relative_l2(ours, theirs) < 1e-11


@pytest.mark.parametrize("norm", ["model", None])
@pytest.mark.parametrize("kind", STREAMS)
def test_gradcheck(kind, norm):
    """In the first chunk, and in one that evicts; queries in two groups."""
    cache, w = new_cache(kind), weights(norm)
    for number in range(4):
        with cache.chunk(2) as chunk:
            if number in (0, 3):
                inputs = leaves(cache, 2, number)
                assert torch.autograd.gradcheck(lambda *x, chunk=chunk: attend(chunk, *x), (*inputs, *w))
            fill(chunk, number)


def test_gradients_of_grouped_heads():
    cache = make(1, 3, grid=(1, 2), head_dim=8, heads=1)
    q, k, v = (t.requires_grad_() for t in tensors(cache, 2, 0, q_heads=2))
    with cache.chunk(2) as chunk:
        assert torch.autograd.gradcheck(lambda *x: chunk.attend(0, *x), (q, k, v))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", STREAMS)
def test_values_and_slots_are_those_without_grad(kind, dtype):
    plain, graphed = (new_cache(kind, dtype=dtype) for _ in range(2))
    w = [x.detach().to(dtype) for x in weights("model")]
    for number, frames in enumerate(LENGTHS):
        with plain.chunk(frames) as one, graphed.chunk(frames) as other:
            inputs = tensors(plain, frames, number)
            expected = attend(one, *inputs, *w)
            found = attend(other, *(t.clone().requires_grad_() for t in (*inputs, *w)))
            assert found.requires_grad and not expected.requires_grad
            assert_equal_bits(found, expected)
        assert fingerprint(*state_of(plain)) == fingerprint(*state_of(graphed))


def test_only_what_needs_a_gradient_gets_one():
    cache = new_cache("ema")
    with cache.chunk(2) as chunk:
        for number in range(5):
            inputs = [*tensors(cache, 2, 0), *(x.detach() for x in weights("model"))]
            inputs[number].requires_grad_()
            (found,) = torch.autograd.grad(attend(chunk, *inputs).sum(), inputs[number])
            whole = [t.detach().requires_grad_() for t in inputs]
            assert_equal_bits(found, torch.autograd.grad(attend(chunk, *whole).sum(), whole)[number])


def test_a_second_derivative_raises():
    cache = new_cache("ema")
    with cache.chunk(2) as chunk:
        q, k, v = leaves(cache, 2, 0)
        (first,) = torch.autograd.grad(chunk.attend(0, q, k, v).square().sum(), q, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable|twice"):
            first.sum().backward()


# ---- recomputation -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("when", ["in the chunk", "after it", "after later chunks"])
def test_a_checkpointed_forward_is_recomputed_to_the_bit_and_writes_nothing(kind, when):
    cache, w = new_cache(kind), weights("model")
    go_on(cache, 3)
    for _ in range(2):  # a chunk that has evicted, and the next
        inputs, values = [*leaves(cache, 2, 5), *w], []

        def block(*x, values=values):
            values.append(attend(chunk, *x))  # noqa: B023
            return values[-1].square()

        with cache.chunk(2) as chunk:
            expected = torch.autograd.grad(block(*inputs).sum(), inputs)
            loss = checkpoint(block, *inputs, use_reentrant=False).sum()
            other = checkpoint(
                block, *[t.detach() * 2 for t in inputs[:3]], *w, use_reentrant=False
            ).sum()  # a second exit
            fill(chunk, 77)
            if when == "in the chunk":
                found = torch.autograd.grad(loss, inputs)
        if when == "after later chunks":
            go_on(cache)
        before = fingerprint(*state_of(cache), cache._buffers.ints, cache._buffers.floats)
        if when != "in the chunk":
            found = torch.autograd.grad(loss, inputs)
        assert fingerprint(*state_of(cache), cache._buffers.ints, cache._buffers.floats) == before
        for ours, theirs in zip(found, expected, strict=True):
            assert_equal_bits(ours, theirs)
        assert_equal_bits(values[0], values[1])
        assert_equal_bits(values[3], values[0])
        other.backward()


def test_a_recomputed_forward_that_needs_no_gradient_itself():
    """Frozen attention in a checkpointed block, with something to train behind it."""
    cache, gain = new_cache("ema"), torch.ones((), dtype=torch.float64, requires_grad=True)
    go_on(cache)
    inputs = tensors(cache, 2, 5)
    with cache.chunk(2) as chunk:
        y = chunk.attend(0, *inputs)
        loss = checkpoint(lambda: chunk.attend(0, *inputs) * gain, use_reentrant=False).sum()
    go_on(cache)
    before = fingerprint(*state_of(cache))
    (found,) = torch.autograd.grad(loss, gain)
    assert_equal_bits(found, y.sum())
    assert fingerprint(*state_of(cache)) == before


def test_a_reentrant_checkpoint_is_refused():
    """Its forward runs without grad, so nothing of what it saw was kept."""
    cache = new_cache("ema")
    go_on(cache)
    with cache.chunk(2) as chunk:
        y = checkpoint(lambda *x: chunk.attend(0, *x), *leaves(cache, 2, 0), use_reentrant=True)
    go_on(cache)
    before = fingerprint(*state_of(cache))
    with pytest.raises(rf.ArgumentError, match="use_reentrant=False"):
        y.sum().backward()
    assert fingerprint(*state_of(cache)) == before


def test_an_append_cannot_be_recomputed():
    cache = new_cache("ema")
    inputs, gain = tensors(cache, 2, 0), torch.ones((), dtype=torch.float64, requires_grad=True)
    with cache.chunk(2) as chunk:
        y = checkpoint(lambda: chunk.append(0, *inputs) * gain, use_reentrant=False)
        with pytest.raises(rf.ArgumentError, match="Chunk.append"):
            y.sum().backward()


def test_a_stream_inside_of_a_backward_is_no_recomputation():
    """A hook that streams: its chunks are opened in that backward, and are written as any others are."""
    cache, twin = new_cache("ema"), new_cache("ema")
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: go_on(cache))
    (x * 2).sum().backward()
    go_on(twin)
    assert fingerprint(*state_of(cache)) == fingerprint(*state_of(twin))


# ---- memory --------------------------------------------------------------------------------------


def test_the_past_is_copied_once_per_layer_and_freed_with_its_chunk():
    cache = new_cache("ema", layers=2)
    go_on(cache)
    with cache.chunk(2) as chunk:
        fill(chunk, 0)
        assert not chunk._pasts, "nothing is kept without grad"
        losses = [
            chunk.attend(layer, *leaves(cache, 2, forward)).sum()
            for forward in range(3)
            for layer in range(2)
        ]
        pasts = list(chunk._pasts.values())
        assert len(pasts) == 2 and pasts[0].angles is pasts[1].angles
        held = {t.untyped_storage().data_ptr() for past in pasts for t in (past.k, past.v)}
        saved = {
            t.untyped_storage().data_ptr()
            for loss in losses
            for t in loss.grad_fn.next_functions[0][0].saved_tensors
            if t is not None
        }
        assert held <= saved
        tokens = chunk.kv_tokens - 2 * cache.spec.frame_tokens
        assert all(past.k.shape[1] == past.v.shape[1] == tokens for past in pasts)
    watched = [weakref.ref(pasts[0]), weakref.ref(pasts[0].k)]
    del chunk, pasts
    gc.collect()
    assert watched[0]() is None and watched[1]() is not None, "the graph still needs the tensors"
    for loss in losses:
        loss.backward()
    gc.collect()
    assert watched[1]() is None, "and frees them"


def test_an_angle_table_that_was_rewritten_is_noticed():
    """Someone who saved a chunk's own angles for backward, instead of calling ``attend``, is told."""
    cache = new_cache("ema")
    (q, *_), plan = leaves(cache, 2, 0), cache.open(2).plan
    y = rf.rope(q, angles=plan.angles, axes=plan.axes)
    cache.reset()
    cache.open(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
