"""A NaN does not live for ever: what is not finite leaves no trace in a cache once it has left the window, and never reaches another
sample of a batch."""

import random

import pytest
import torch
from helpers.promise_tools import DTYPES, assert_all_equal_bits, draw, everything_of, make_cache, seen_of

import rf_kernels as rf
from rf_kernels.testing import assert_equal_bits

BAD = (float("nan"), float("inf"), -float("inf"))
STATES = ("compensated", "float32", "published")


def run(cache, injections=(), *, chunks=9, frames=2, leave_out=(), repeat=False):
    """A stream. ``injections``: (chunk, layer, which of k and v, index, value). ``leave_out``: frames that the sink shall not absorb
    (a plan with a count of 0). ``repeat``: the caller runs a bad chunk again with finite tensors before it commits."""
    for chunk in range(chunks):
        plan = cache.begin(frames)
        for e in set(plan.leaving) & set(leave_out):
            plan.schedule[cache.ring.absorber(e), 1] = 0
        for forward in range(2):
            for layer in range(len(cache)):
                inputs = draw(cache, frames, 100 * chunk + layer)
                for at, in_layer, which, index, value in injections:
                    if (at, in_layer) == (chunk, layer) and not (repeat and forward):
                        inputs[which][index] = value
                cache[layer].append(*inputs, plan)
        try:
            cache.commit(plan)
        except rf.NonFiniteError:
            cache.commit(plan)
    return cache


def injection(cache, choose, chunks, frames):
    """One bad element in a frame that is no sink frame and has left by the end."""
    n = cache.frame_tokens
    last = chunks * frames - cache.window_frames - 1
    frame = choose.randint(cache.sink_frames, last)
    token = choose.randrange(n)
    index = (choose.randrange(cache.batch), (frame % frames) * n + token, choose.randrange(2), choose.randrange(16))
    which, layer = choose.choice((1, 2)), choose.randrange(len(cache))
    return frame, token, (frame // frames, layer, which, index, choose.choice(BAD))


def check_skip(dtype, state, seed, on_nonfinite="skip", alpha=0.9):
    choose = random.Random(seed)
    settings = {"dtype": dtype, "batch": 2, "window_frames": choose.choice((3, 4))}

    def cache(mode=on_nonfinite):
        return make_cache(rf.EMASink(alpha, state=state, on_nonfinite=mode), **settings)

    chunks, frames = 9, 2
    frame, token, bad = injection(cache(), choose, chunks, frames)
    layer, sample = bad[1], bad[3][0]
    clean, found, without = run(cache()), run(cache(), [bad]), run(cache(), leave_out=[frame])
    absorbing = (frame - 2) % 2 * clean.frame_tokens + token  # the sink token that would have absorbed the bad one
    for ours, theirs, absent in zip(seen_of(found), seen_of(clean), seen_of(without), strict=True):
        assert bool(ours.isfinite().all())
        expected = theirs.clone()
        expected[layer, sample, absorbing] = absent[layer, sample, absorbing]
        assert_equal_bits(ours, expected)
    assert found.skipped_tokens.tolist() == [int(i == layer) for i in range(2)]
    assert not bool(clean.skipped_tokens.any())


@pytest.mark.parametrize("mode", ["skip", "raise"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_element_leaves_no_trace_but_its_own_absence(dtype, state, mode):
    check_skip(dtype, state, seed=STATES.index(state), on_nonfinite=mode)


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
    assert found.skipped_tokens.tolist() == [frames * found.frame_tokens] * 2


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("on_nonfinite", ["skip", "propagate", "raise"])
def test_a_chunk_that_is_run_again_leaves_nothing_at_all(on_nonfinite, state):
    """The plan of a chunk writes the same slots again: also a sink frame can be mended so, before the commit."""
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


def test_raise_names_the_frames_and_raises_again_after_a_rollback():
    cache = make_cache(rf.EMASink(0.9, on_nonfinite="raise"), undo_frames=2)

    def chunk(number, bad=False):
        plan = cache.begin(2, undo=True)
        for layer in range(2):
            q, k, v = draw(cache, 2, number)
            k[0, 1, 0, 0] = float("nan") if bad else 0.0
            cache[layer].append(q, k, v, plan)
        return plan

    for number in range(3):
        cache.commit(chunk(number, bad=number == 1))
    before = everything_of(cache)
    for attempt in range(3):
        plan = chunk(10 + attempt)
        with pytest.raises(rf.NonFiniteError, match=r"2 tokens of the frames \[2, 3\]"):
            cache.commit(plan)
        assert cache.next_frame == 6 and cache._plan is plan
        cache.rollback(plan)
        after = everything_of(cache)
        # The save area and the plan's buffers were used; everything that a stream consists of is as before.
        assert after[1] == before[1] and cache.skipped_tokens.tolist() == [0, 0]
    plan = chunk(20)
    with pytest.raises(rf.NonFiniteError):
        cache.commit(plan)
    cache.commit(plan)  # accepted
    cache.commit(chunk(21))


# ---- no sample of a batch is touched by another's ------------------------------------------------------------------------------------


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
    low = [torch.zeros_like(state) for _ in range(2)] if k.dtype in (torch.bfloat16, torch.float16) else [None, None]
    schedule = torch.tensor([[0, 2, 1, 2]], dtype=torch.int32)
    turns = torch.from_numpy(rf.RoPE3D.wan(16).temporal_table([3, 2, 5])).to(
        torch.float64 if k.dtype == torch.float64 else torch.float32
    )[None]
    rf.ema_evict(cache_k, cache_v, state, *low, schedule=schedule, turns=turns, alpha=0.5, frame_tokens=2)
    return [t for t in (cache_k, cache_v, state, *low) if t is not None]


def batch_dmd(nan):
    def call(q, k, v):
        gradient, aux = rf.dmd_gradient(q, fake=k, real=v, reduction="none", nan=nan, return_aux=True)
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
                touched += not all(torch.equal(a[sample], b[sample]) for a, b in zip(found, clean, strict=True))
    assert touched > 12  # the injections do reach results
