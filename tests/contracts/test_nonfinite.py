"""A NaN does not live for ever: what is not finite leaves no trace in a cache once it has left the window,
and never reaches another sample of a batch."""

import random

import pytest
import torch

import rf_kernels as rf
from helpers.promise_tools import DTYPES, assert_all_equal_bits, draw, everything_of, make_cache, seen_of
from rf_kernels.testing import assert_equal_bits, fingerprint

BAD = (float("nan"), float("inf"), -float("inf"))
STATES = ("compensated", "float32", "published")


def run(cache, injections=(), *, chunks=9, frames=2, leave_out=(), repeat=False):
    """A stream. ``injections``: (chunk, layer, which of k and v, index, value). ``leave_out``: frames that
    the sink shall not absorb (a plan with a count of 0). ``repeat``: the caller runs a bad chunk again with
    finite tensors before it commits."""
    for chunk in range(chunks):
        with cache.chunk(frames) as opened:
            for e in set(opened.plan.leaving) & set(leave_out):
                opened.plan.schedule[(e - cache.spec.sink_frames) % cache.spec.sink_frames, 1] = 0
            for forward in range(2):
                for layer in range(cache.spec.layers):
                    inputs = draw(cache, frames, 100 * chunk + layer)
                    for at, in_layer, which, index, value in injections:
                        if (at, in_layer) == (chunk, layer) and not (repeat and forward):
                            inputs[which][index] = value
                    opened.append(layer, *inputs)
    return cache


def injection(cache, choose, chunks, frames):
    """One bad element in a frame that is no sink frame and has left by the end."""
    n = cache.spec.frame_tokens
    last = chunks * frames - cache.spec.window_frames - 1
    frame = choose.randint(cache.spec.sink_frames, last)
    token = choose.randrange(n)
    index = (
        choose.randrange(cache.spec.batch),
        (frame % frames) * n + token,
        choose.randrange(2),
        choose.randrange(16),
    )
    which, layer = choose.choice((1, 2)), choose.randrange(cache.spec.layers)
    return frame, token, (frame // frames, layer, which, index, choose.choice(BAD))


def check_skip(dtype, state, seed, alpha=0.9):
    choose = random.Random(seed)
    settings = {"dtype": dtype, "batch": 2, "window_frames": choose.choice((3, 4))}

    def cache():
        return make_cache(rf.EMASink(alpha, state=state), **settings)

    chunks, frames = 9, 2
    frame, token, bad = injection(cache(), choose, chunks, frames)
    layer, sample = bad[1], bad[3][0]
    clean, found, without = run(cache()), run(cache(), [bad]), run(cache(), leave_out=[frame])
    # the sink token that would have absorbed the bad one
    absorbing = (frame - 2) % 2 * clean.spec.frame_tokens + token
    for ours, theirs, absent in zip(seen_of(found), seen_of(clean), seen_of(without), strict=True):
        assert bool(ours.isfinite().all())
        expected = theirs.clone()
        expected[layer, sample, absorbing] = absent[layer, sample, absorbing]
        assert_equal_bits(ours, expected)
    assert found.skipped_tokens.tolist() == [int(i == layer) for i in range(2)]
    assert not bool(clean.skipped_tokens.any())


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_element_leaves_no_trace_but_its_own_absence(dtype, state):
    check_skip(dtype, state, seed=STATES.index(state))


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_500_injections(dtype):
    for seed in range(125):
        check_skip(dtype, STATES[seed % 3], seed=1000 + seed)


@pytest.mark.parametrize("state", STATES)
def test_a_whole_chunk_of_nan_and_its_absence(state):
    """Every element of a chunk: the sink is that of a stream whose frames were never absorbed."""
    policy = rf.EMASink(0.9, state=state)
    chunk, frames = 3, 2
    everything = [(chunk, layer, which, ..., float("nan")) for layer in range(2) for which in (1, 2)]
    found = run(make_cache(policy, dtype=torch.bfloat16), everything)
    without = run(make_cache(policy, dtype=torch.bfloat16), leave_out=[2 * chunk, 2 * chunk + 1])
    assert_all_equal_bits(seen_of(found), seen_of(without))
    assert found.skipped_tokens.tolist() == [frames * found.spec.frame_tokens] * 2


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("on_nonfinite", ["skip", "propagate", "raise"])
def test_a_chunk_that_is_run_again_leaves_nothing_at_all(on_nonfinite, state):
    """A chunk's forwards write the same slots again: also a sink frame can be mended so, before the
    commit."""
    policy = rf.EMASink(0.9, state=state, on_nonfinite=on_nonfinite)
    for chunk in (0, 1, 4):
        bad = [(chunk, layer, which, ..., float("nan")) for layer in range(2) for which in (0, 1, 2)]
        clean, found = (run(make_cache(policy), injections, repeat=True) for injections in ((), bad))
        assert_all_equal_bits(seen_of(found), seen_of(clean))
        assert not bool(found.skipped_tokens.any())


def test_propagate_is_seen_in_the_same_elements_and_no_others():
    cache = make_cache(rf.EMASink(0.9, on_nonfinite="propagate"), batch=2)
    at = (1, 2, 1, 7)  # frame 6 = sink frame 0; sample 1, token 2, head 1, dim 7
    found, clean = run(cache, [(3, 0, 2, at, float("nan"))]), run(make_cache(rf.EMASink(0.9), batch=2))
    assert found.v[0][at].isnan() and int(found.v.isnan().sum()) == 1
    expected = clean.v.clone()
    expected[0][at] = float("nan")
    assert torch.equal(found.v.nan_to_num(nan=9e9), expected.nan_to_num(nan=9e9))
    assert_equal_bits(found.k, clean.k)
    assert not bool(found.skipped_tokens.any())


def nonfinite_stream(**more):
    """A cache of which two tokens of the frames 2 and 3 are not finite, and leave with the next chunk; and a
    chunk's forward."""
    cache = make_cache(rf.EMASink(0.9, on_nonfinite="raise"), **more)

    def write(chunk, number, bad=False):
        for layer in range(2):
            q, k, v = draw(cache, 2, number)
            k[0, 1, 0, 0] = float("nan") if bad else 0.0
            chunk.append(layer, q, k, v)

    for number in range(3):
        with cache.chunk(2) as chunk:
            write(chunk, number, bad=number == 1)
    return cache, write


def test_raise_names_the_frames_and_takes_the_chunk_back():
    cache, write = nonfinite_stream(undo_frames=2)
    before, host = fingerprint(*seen_of(cache)), everything_of(cache)[1]
    for attempt in range(3):
        with (
            pytest.raises(rf.NonFiniteError, match=r"2 tokens of the frames \[2, 3\]"),
            cache.chunk(2, undo=True) as chunk,
        ):
            write(chunk, 10 + attempt)
        assert fingerprint(*seen_of(cache)) == before and everything_of(cache)[1] == host
        assert cache.next_frame == 6 and cache.skipped_tokens.tolist() == [0, 0]


def test_raise_without_undo_closes_the_stream_until_it_is_reset():
    cache, write = nonfinite_stream()
    chunk = cache.open(2)
    write(chunk, 10)
    with pytest.raises(rf.NonFiniteError):
        chunk.commit()
    with pytest.raises(rf.StreamClosedError, match="closed by a failed commit in the frames 6..8"):
        cache.open(1)
    cache.reset()
    with cache.chunk(2) as chunk:
        write(chunk, 0)


# ---- no sample of a batch is touched by another's ----------------------------------------------------------


def inject(tensors, sample, value):
    """Copies with one bad element in the middle of that sample, one tensor at a time."""
    for i in range(len(tensors)):
        bad = [x.clone() for x in tensors]
        flat = bad[i][sample].view(-1)
        flat[flat.numel() // 2] = value
        yield bad


def batch_rope_append(q, k, v):
    cache_k, cache_v = torch.zeros(3, 9, 2, 16, dtype=k.dtype), torch.zeros(3, 9, 2, 16, dtype=k.dtype)
    angles, axes = rf.RoPE3D.wan(16).table([[5, 6], [0], [0, 1, 2]], dtype=k.dtype)
    weight = torch.ones(32, dtype=k.dtype)
    slots = torch.tensor([2, 0], dtype=torch.int32)
    out = rf.rope_append(
        q, k, v, cache_k, cache_v, slots=slots, angles=angles, axes=axes, q_weight=weight, k_weight=weight
    )
    return out, cache_k, cache_v


def batch_attention(q, k, v):
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = rf.sink_window_attention(
        *leaves, chunk_ends=[2, 4, 6], num_sink_tokens=1, num_window_tokens=2, return_lse=True
    )
    return (out.detach(), lse, *torch.autograd.grad(out.sum(), leaves))


def batch_rope(q, k, v):
    angles, axes = rf.RoPE3D.wan(16).table([[5, 6], [0], [0, 1, 2]], dtype=k.dtype)
    leaf = q.clone().requires_grad_()
    out = rf.rope(leaf, angles=angles, axes=axes, weight=torch.ones(32, dtype=q.dtype))
    return out.detach(), torch.autograd.grad((out * k).sum(), leaf)[0]


def batch_ema_evict(q, k, v):
    cache_k, cache_v, state = k.clone(), v.clone(), q[:, :2].clone().contiguous()
    low = (
        [torch.zeros_like(state) for _ in range(2)]
        if k.dtype in (torch.bfloat16, torch.float16)
        else [None, None]
    )
    schedule = torch.tensor([[0, 2, 1, 2]], dtype=torch.int32)
    turns = torch.from_numpy(rf.RoPE3D.wan(16).temporal_table([3, 2, 5])).to(
        torch.float64 if k.dtype == torch.float64 else torch.float32
    )[None]
    rf.ema_evict(cache_k, cache_v, state, *low, schedule=schedule, turns=turns, alpha=0.5, frame_tokens=2)
    return [t for t in (cache_k, cache_v, state, *low) if t is not None]


def batch_dmd(nan):
    def call(q, k, v):
        options = rf.DMDOptions(reduction="none", nan=nan)
        gradient, aux = rf.dmd_gradient(q, fake=k, real=v, options=options, return_aux=True)
        return gradient, aux.gradient_norm, aux.normalizer, aux.per_sample_loss

    return call


BATCHED = {
    "rope_append": batch_rope_append,
    "rope": batch_rope,
    "ema_evict": batch_ema_evict,
    "sink_window_attention": batch_attention,
    "dmd_gradient sample": batch_dmd("sample"),
    "dmd_gradient published": batch_dmd("published"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", BATCHED)
def test_no_sample_is_touched_by_another(op, dtype):
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 6, 2, 16, generator=g).to(dtype) for _ in range(3)]
    clean = BATCHED[op](*inputs)
    touched = 0
    for sample in range(3):
        others = [b for b in range(3) if b != sample]
        for value in (*BAD, 0.9 * torch.finfo(dtype).max):
            for bad in inject(inputs, sample, value):
                found = BATCHED[op](*bad)
                assert_all_equal_bits([t[others] for t in found], [t[others] for t in clean])
                touched += not all(
                    torch.equal(a[sample], b[sample]) for a, b in zip(found, clean, strict=True)
                )
    assert touched > 12  # the injections do reach results
