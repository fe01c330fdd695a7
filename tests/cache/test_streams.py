"""What a stream attends, and with which positions: against the float64 recomputation of the rule, and in the
precisions of the state."""

import math
import random

import numpy as np
import pytest
import torch

import rf_kernels as rf
from helpers.cache_case import HALF, make, step, tensors
from rf_kernels.reference.streaming import StreamingReference
from rf_kernels.testing import assert_equal_bits, relative_l2


@pytest.mark.parametrize("seed", range(12))
def test_streams_match_the_plain_recomputation(seed):
    """Random S, W, chunk lengths, grids, heads and policies, several forwards a chunk, in float64; and the
    two halves of ``attend``."""
    choose = random.Random(seed)
    sink_frames, window_frames = choose.randint(0, 4), choose.randint(1, 7)
    policy = choose.choice(["ema", "static"]) if sink_frames else "none"
    alpha = choose.choice([0.5, 0.9, 0.999])
    policies = {"ema": rf.EMASink(alpha), "static": rf.StaticSink(rephase=True), "none": rf.NoSink()}
    grid, batch, heads = (
        (choose.randint(1, 3), choose.randint(1, 3)),
        choose.randint(1, 2),
        choose.randint(1, 3),
    )
    cache = make(sink_frames, window_frames, policy=policies[policy], grid=grid, batch=batch, heads=heads)
    reference = StreamingReference(
        grid=grid, sink_frames=sink_frames, window_frames=window_frames, policy=policy, alpha=alpha
    )
    evicted = 0
    for number in range(14):
        frames = choose.randint(1, window_frames + max(0, sink_frames - cache.next_frame))
        with cache.chunk(frames) as chunk:
            reference.begin(frames)
            evicted += len(chunk.plan.leaving)
            for forward in range(choose.randint(1, 3)):
                q, k, v = tensors(cache, frames, seed * 10_000 + number * 10 + forward)
                out = chunk.attend(0, q, k, v)
                assert relative_l2(out, reference.attend(q, k, v)) < 1e-12
                rotated = chunk.append(0, q, k, v)
                k_seen, v_seen, tokens, _ = chunk.kv(0)
                assert k_seen.shape[1] == v_seen.shape[1] == tokens == chunk.kv_tokens
                assert_equal_bits(rf.sink_window_attention(rotated, k_seen, v_seen, kv_tokens=tokens), out)
        assert cache.next_frame == reference.t_end and cache.kv_tokens == chunk.kv_tokens
    assert evicted > 0


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("state", ["compensated", "float32", "published"])
def test_half_precision_states(dtype, state):
    """In bf16 and fp16 the sink that attention reads stays within the rounding of the slot (and, but for
    "published", the state far closer) of the float64 recursion over the same stored frames."""
    alpha, chunks = 0.99, 120
    cache = make(2, 4, policy=rf.EMASink(alpha, state=state), dtype=dtype)
    reference = StreamingReference(grid=(2, 3), sink_frames=2, window_frames=4, policy="ema", alpha=alpha)
    for number in range(chunks):
        q, k, v = tensors(cache, 2, number)
        with cache.chunk(2) as chunk:
            chunk.append(0, q, k, v)
        reference.begin(2)
        reference.attend(q, k, v)
    k, v = cache.sink_state(0)
    # Values are averaged as stored; the keys' state also carries the rounding of the rotated keys in the
    # cache.
    v_reference = torch.cat([reference.sink_kv[j][1] for j in range(2)], 1)
    eps = torch.finfo(dtype).eps
    error = relative_l2(v, v_reference)
    assert error < (40 * eps if state == "published" else eps / 4), error
    if state != "published":
        assert relative_l2(cache.v[0][:, : 2 * cache.spec.frame_tokens], v_reference) < eps


def test_the_slots_of_wans_geometry():
    cache = make(3, 6, grid=(30, 52), heads=1, head_dim=128, dtype=torch.bfloat16, device="meta")
    assert cache.k.shape == (1, 1, 9 * 1560, 1, 128)
    ring = cache.ring
    assert [ring.slot(f) for f in range(12)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 3, 4, 5]
    assert list(ring.leaving(9, 12)) == [3, 4, 5] and list(ring.leaving(6, 9)) == []
    assert ring.shift(9) == 0 and ring.shift(12) == 3
    assert ring.held(12) == [0, 1, 2, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("sink_frames, window_frames", [(0, 3), (2, 3), (3, 2)])
def test_held_frames_are_those_in_the_slots(sink_frames, window_frames):
    ring, slots = make(sink_frames, window_frames).ring, {}
    for frame in range(12):
        slots[ring.slot(frame)] = frame
        assert sorted(slots) == list(range(len(slots)))  # a prefix
        assert ring.held(frame + 1) == sorted(slots.values())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("state", ["compensated", "float32", "published"])
def test_keys_without_positions_are_averaged_as_values_are(dtype, state):
    cache = make(2, 3, policy=rf.EMASink(0.99, state=state), dtype=dtype, rope=None)
    for number in range(20):
        q, k, _ = tensors(cache, 2, number)
        with cache.chunk(2) as chunk:
            chunk.append(0, q, k, k)
    assert_equal_bits(cache.k, cache.v)
    assert_equal_bits(*cache.sink_state(0))


def test_queries_may_have_more_heads():
    cache = make(1, 3, heads=2)
    q, k, v = tensors(cache, 2, 0, q_heads=6)
    with cache.chunk(2) as chunk:
        assert chunk.append(0, q, k, v).shape == chunk.attend(0, q, k, v).shape == q.shape


def test_absolute_positions_without_rephasing():
    cache = make(2, 3, policy=rf.StaticSink())
    step(cache, 2, 0)
    before = cache.k[0][:, : 2 * cache.spec.frame_tokens].clone()
    for chunk in range(1, 5):
        step(cache, 3, chunk)
    assert_equal_bits(cache.k[0][:, : 2 * cache.spec.frame_tokens], before)


def test_an_average_without_rephasing_stays_at_its_own_phase():
    """The state is that of a re-phased stream of the same frames; the slots are the state itself."""
    still, moved = (make(2, 3, policy=rf.EMASink(0.5, rephase=rephase)) for rephase in (False, True))
    for number in range(9):
        for cache in (still, moved):
            with cache.chunk(1) as chunk:
                assert chunk.plan.shift == (max(0, chunk.plan.t_end - 5) if cache is moved else 0)
                chunk.append(0, *tensors(cache, 1, number))
    tokens = 2 * still.spec.frame_tokens
    for ours, theirs in zip(still.sink_state(0), moved.sink_state(0), strict=True):
        assert_equal_bits(ours, theirs)
    assert_equal_bits(still.k[0][:, :tokens], still.sink_state(0)[0])
    assert relative_l2(moved.k[0][:, :tokens], still.k[0][:, :tokens]) > 0.1


@pytest.mark.parametrize("grid", [(2, 3), (3, 2)])
def test_a_stream_of_absolute_positions_is_the_whole_sequence(grid):
    """A static sink that is not re-phased: chunk by chunk through the cache, or all at once with a sink and a
    window per chunk."""
    cache, frames, length = make(3, 4, policy=rf.StaticSink(), grid=grid), 12, 2
    q, k, v = (
        torch.randn(1, frames * 6, 2, 32, generator=torch.Generator().manual_seed(i)).double()
        for i in range(3)
    )
    rope, outputs = cache.spec.rope, []
    for begin in range(0, frames, length):
        part = slice(begin * 6, (begin + length) * 6)
        with cache.chunk(length) as chunk:
            outputs.append(chunk.attend(0, q[:, part], k[:, part], v[:, part]))
    angles, axes = rope.table([range(frames), *map(range, grid)], dtype=torch.float64)
    q, k = (rf.rope(x, angles=angles, axes=axes) for x in (q, k))
    ends = list(range(length * 6, frames * 6 + 1, length * 6))
    whole = rf.sink_window_attention(q, k, v, chunk_ends=ends, num_sink_tokens=3 * 6, num_window_tokens=4 * 6)
    assert relative_l2(torch.cat(outputs, 1), whole) < 1e-14


def test_without_rope_the_sink_is_the_plain_average():
    cache = make(1, 2, policy=rf.EMASink(0.5), rope=None)
    chunks = [tensors(cache, 1, i) for i in range(5)]
    for q, k, v in chunks:
        with cache.chunk(1) as chunk:
            assert_equal_bits(chunk.append(0, q, k, v), q)
    expected = chunks[0][1]
    for i in (1, 2):
        expected = 0.5 * expected + 0.5 * chunks[i][1]
    assert_equal_bits(cache.k[0][:, : cache.spec.frame_tokens], expected)


@pytest.mark.heavy
def test_a_static_sink_does_not_drift():
    """10,000 chunks: the state's bits never change, and the slot's error is that of one rounding."""
    policy = rf.StaticSink(rephase=True)
    cache, reference = (
        make(2, 2, policy=policy, dtype=dtype, grid=(1, 2), heads=1)
        for dtype in (torch.bfloat16, torch.float64)
    )
    held, errors = [c._sink.tensors["k_state"] for c in (cache, reference)], []
    for number in range(10_000):
        qkv = tensors(cache, 2, min(number, 3))
        for each in (cache, reference):
            with each.chunk(2) as chunk:
                chunk.append(0, *(t.to(each.spec.dtype) for t in qkv))
        if number == 2:
            state = held[0].clone()
            held[1].copy_(held[0])  # from here on both turn the same stored keys
        if number >= 3 and number % 500 == 0:
            errors.append(relative_l2(cache.k[0][:, :4], reference.k[0][:, :4]))
    assert_equal_bits(held[0], state)
    assert max(errors) < torch.finfo(torch.bfloat16).eps / 2


# ---- norms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["model", "head"])
@pytest.mark.parametrize("eps", [1e-6, 1e-3, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_norm_may_be_a_module_or_its_weight(over, eps, dtype):
    """The module's weight and eps are taken, and what one mean spans follows from the weight's size."""
    cache, size = make(1, 3, dtype=dtype), 64 if over == "model" else 32
    norms = [torch.nn.RMSNorm(size, eps=eps, dtype=dtype).requires_grad_(False) for _ in range(2)]
    for i, norm in enumerate(norms):
        norm.weight.copy_(torch.rand(size, generator=torch.Generator().manual_seed(i)) + 0.5)
    value = eps or torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    qkv = [t * 1e-2 for t in tensors(cache, 2, 0)]
    with cache.chunk(2) as chunk:
        found = chunk.append(0, *qkv, q_norm=norms[0], k_norm=norms[1])
        keys = chunk.kv(0).k.clone()
        weights = {"q_norm": norms[0].weight, "k_norm": norms[1].weight, "eps": value}
        assert_equal_bits(chunk.append(0, *qkv, **weights), found)
        assert_equal_bits(chunk.append(0, *qkv, **weights, norm=over), found)
        assert_equal_bits(chunk.kv(0).k, keys)
        first, norm = qkv[0][:, :6], norms[0]
        plain = norm(first.flatten(2) if over == "model" else first).view_as(first)
        assert (
            relative_l2(chunk.append(0, plain.repeat(1, 2, 1, 1), *qkv[1:])[:, :6], found[:, :6])
            < torch.finfo(dtype).eps * 2
        )
        assert_equal_bits(chunk.append(0, *qkv, q_norm=torch.nn.Identity()), chunk.append(0, *qkv))


def scaled(rope):
    return rope.with_frequencies(0, rope.frequencies(0) * 0.5)


def riflex(rope):
    """The intrinsic frequency lowered, so that its period is longer than the clip (arXiv 2502.15894)."""
    frequencies = rope.frequencies(0)
    frequencies[1] = 0.9 * 2 * math.pi / 25
    return rope.with_frequencies(0, frequencies)


def yarn(rope):
    """Slow pairs interpolated, fast ones kept, a ramp between, on every axis (arXiv 2309.00071)."""
    for axis in range(3):
        frequencies = rope.frequencies(axis)
        ramp = np.clip((frequencies / frequencies.max() - 0.1) / 0.6, 0, 1)
        rope = rope.with_frequencies(axis, frequencies * (ramp + (1 - ramp) / 4))
    return rope


@pytest.mark.parametrize("change", [scaled, riflex, yarn])
@pytest.mark.parametrize("policy", ["ema", "static"])
@pytest.mark.parametrize("grid, head_dim", [((2, 3), 32), ((3, 1), 20)])
def test_given_frequencies_are_rephased_right(change, policy, grid, head_dim, monkeypatch):
    """The plain recomputation with those frequencies, evictions included."""
    rope = change(rf.RoPE3D.wan(head_dim))
    made = {"ema": rf.EMASink(0.9), "static": rf.StaticSink(rephase=True)}[policy]
    cache = make(2, 3, policy=made, grid=grid, head_dim=head_dim, rope=rope)
    reference = StreamingReference(grid=grid, sink_frames=2, window_frames=3, policy=policy, alpha=0.9)

    def rotate(x, positions):
        turns = [positions[:, a, None] * torch.from_numpy(rope.frequencies(a)) for a in range(3)]
        turn = torch.cat(turns, dim=1)[:, None]
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(turn), turn)).flatten(-2)

    monkeypatch.setattr("rf_kernels.reference.streaming.rotate", rotate)
    for number in range(8):
        data = tensors(cache, 2, number)
        reference.begin(2)
        with cache.chunk(2) as chunk:
            assert relative_l2(chunk.attend(0, *data), reference.attend(*data)) < 1e-12
    other = make(2, 3, policy=made, grid=grid, head_dim=head_dim)
    with pytest.raises(rf.ArgumentError, match="argument `meta.rope`"):
        other.load_state_dict(cache.state_dict())
    make(2, 3, policy=made, grid=grid, head_dim=head_dim, rope=rope).load_state_dict(cache.state_dict())


def test_given_frequencies_are_checked_and_kept():
    rope = rf.RoPE3D.wan(32)
    frequencies = rope.frequencies(0)
    changed = rope.with_frequencies(0, frequencies)
    assert changed == rope.with_frequencies(0, list(frequencies)) and hash(changed)
    frequencies[:] = 0
    rope.frequencies(0)[:] = 0
    assert (changed.frequencies(0) == rope.frequencies(0)).all() and rope.frequencies(0).all()
    assert (changed.axis_table(0, range(9)) == rope.axis_table(0, range(9))).all()
    for wrong in (frequencies[1:], [math.nan] * 6, "x" * 6, 3, [None] * 6):
        with pytest.raises(rf.ArgumentError, match="RoPE: argument `given`: expected 6 finite numbers"):
            rope.with_frequencies(0, wrong)
    for axis in (3, -1):
        with pytest.raises(rf.ArgumentError, match=r"argument `axis`: expected 0..2"):
            rope.with_frequencies(axis, frequencies)
    with pytest.raises(rf.ArgumentError, match="one entry per axis"):
        rf.RoPE(pairs=(2, 2), bases=(10.0, 10.0), given=(None,))
