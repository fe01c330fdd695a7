"""Slots that are not valid are never seen: filled with NaN, infinities or 3e38 they change no bit of a result
or a gradient."""

import itertools
import random

import pytest
import torch

import rf_kernels as rf
from helpers.promise_tools import (
    DTYPES,
    POISON,
    POLICIES,
    assert_all_equal_bits,
    draw,
    forward,
    make_cache,
    poison_of,
    seen_of,
    states_of,
)
from rf_kernels.reference.sink_window_attention import visible_keys

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD_DIMS = (1, 13, 64, 128, 256)
PAIRS = (
    (float("nan"), float("inf")),
    (3e38, float("nan")),
    (-float("inf"), 3e38),
)  # what keys and values are filled with
heavy = pytest.mark.heavy


def attend(inputs, grad_out, **options):
    """Output, LSE and the three gradients."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out, lse = rf.sink_window_attention(*leaves, **options, return_lse=True)
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, grad_out)]


def attention_inputs(dtype, tokens, queries, head_dim, heads=2, kv_heads=1):
    g = torch.Generator().manual_seed(head_dim)
    shapes = ((queries, heads), (tokens, kv_heads), (tokens, kv_heads), (queries, heads))
    return [torch.randn(1, *shape, head_dim, generator=g).to(dtype) for shape in shapes]


def check_dense(dtype, head_dim, tokens, queries, lengths):
    q, k, v, grad_out = attention_inputs(dtype, tokens, queries, head_dim)
    for kv_tokens in lengths:
        clean = attend((q, k, v), grad_out, kv_tokens=kv_tokens)
        exact = attend(
            (q, k[:, :kv_tokens].clone(), v[:, :kv_tokens].clone()), grad_out, kv_tokens=kv_tokens
        )  # nothing there to see
        for in_k, in_v in PAIRS:
            bad_k, bad_v = k.clone(), v.clone()
            bad_k[:, kv_tokens:], bad_v[:, kv_tokens:] = poison_of(in_k, dtype), poison_of(in_v, dtype)
            found = attend((q, bad_k, bad_v), grad_out, kv_tokens=kv_tokens)
            assert_all_equal_bits(found, clean)
        assert_all_equal_bits([*clean[:3], *(g[:, :kv_tokens] for g in clean[3:])], exact)
        assert not any(bool(g[:, kv_tokens:].any()) for g in clean[3:])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_at_every_valid_length(dtype, head_dim):
    check_dense(dtype, head_dim, tokens=17, queries=3, lengths=range(18))


@heavy
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_at_every_valid_length_of_three_tiles(dtype, head_dim):
    check_dense(dtype, head_dim, tokens=98, queries=33, lengths=range(98))
    check_dense(dtype, head_dim, tokens=1030, queries=2, lengths=(*range(508, 517), *range(1021, 1030)))


def check_whole_sequence(dtype, head_dim, ends, num_sink_tokens, num_window_tokens):
    """Keys that no chunk sees change no bit of anything; keys that one chunk does not see, none of its
    rows."""
    tokens = ends[-1]
    options = {"chunk_ends": ends, "num_sink_tokens": num_sink_tokens, "num_window_tokens": num_window_tokens}
    q, k, v, grad_out = attention_inputs(dtype, tokens, tokens, head_dim)
    clean = attend((q, k, v), grad_out, **options)
    seen = [visible_keys(end, num_sink_tokens, num_window_tokens) for end in ends]
    unseen_by_all = sorted(set(range(tokens)) - set(itertools.chain(*seen)))

    def poisoned(keys, in_k, in_v):
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[:, keys], bad_v[:, keys] = poison_of(in_k, dtype), poison_of(in_v, dtype)
        return q, bad_k, bad_v

    for pair in PAIRS:
        assert_all_equal_bits(attend(poisoned(unseen_by_all, *pair), grad_out, **options), clean)
    for begin, end, keys in zip((0, *ends), ends, seen, strict=False):
        unseen = sorted(set(range(tokens)) - set(keys))
        out, lse = rf.sink_window_attention(*poisoned(unseen, *PAIRS[0]), **options, return_lse=True)
        assert_all_equal_bits(
            (out[:, begin:end], lse[:, :, begin:end]), (clean[0][:, begin:end], clean[1][:, :, begin:end])
        )
    assert not any(bool(g[:, unseen_by_all].any()) for g in clean[3:])
    return len(unseen_by_all)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whole_sequences_at_every_window(dtype, head_dim):
    ends = [5, 9, 16]
    unseen = [
        check_whole_sequence(dtype, head_dim, ends, s, w)
        for s, w in ((0, 0), (0, 3), (2, 1), (2, 16), (7, 3))
    ]
    assert max(unseen) == 16 and min(unseen) == 0


@heavy
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_sequences_at_every_sink_and_window(dtype, head_dim):
    ends = [5, 12, 13, 20]
    for s, w in itertools.product(range(0, 21, 4), range(0, 21, 2)):
        check_whole_sequence(dtype, head_dim, ends, s, w)


def fill(value, *tensors):
    for t in tensors:
        if t is not None and t.is_floating_point():
            t.fill_(poison_of(value, t.dtype))


def poison_dead(cache, plan, value):
    """Everything that no rule says is read from here on, right after the chunk is opened."""
    n = cache.spec.frame_tokens
    part = {j: cache.k[:, :, j * n : (j + 1) * n] for j in range(cache.ring.length)}
    part_v = {j: cache.v[:, :, j * n : (j + 1) * n] for j in range(cache.ring.length)}
    for slot in range(cache.ring.length):
        if slot >= min(plan.t_end, cache.ring.length):
            fill(value, part[slot], part_v[slot])  # never written
    fused = set()
    if plan.schedule is not None:
        for j, (_, count, *sources) in enumerate(plan.schedule.tolist()):
            fused |= set(sources[:count])
            plan.schedule[j, 2 + count :] = 2**31 - 1
            plan.turns[j, count:-1] = poison_of(value, plan.turns.dtype)
            if not plan.first:
                fill(value, part[j])  # the sink's key slots are written from the state, never read
        if plan.first:
            fill(value, *states_of(cache).values())
    for slot in set(plan.slots.tolist()) - fused:
        fill(value, part[slot], part_v[slot])  # frames that leave and are fused into nothing
    fill(value, *cache._undo.values())


def check_stream(policy, dtype, value, chunks, seed):
    choose = random.Random(seed)
    batch = choose.randint(1, 2)
    clean, poisoned = (make_cache(policy, dtype=dtype, batch=batch, undo_frames=3) for _ in range(2))
    fill(value, poisoned.k, poisoned.v, *states_of(poisoned).values(), *poisoned._undo.values())
    for chunk in range(chunks):
        frames = choose.randint(1, 3)
        with clean.chunk(frames) as expected, poisoned.chunk(frames) as found:
            poison_dead(poisoned, found.plan, value)
            for i in range(2):
                inputs = [draw(clean, frames, 100 * chunk + 10 * i + layer) for layer in range(2)]
                assert_all_equal_bits(forward(found, inputs), forward(expected, inputs))
        assert_all_equal_bits(seen_of(poisoned), seen_of(clean))
    assert clean.next_frame > clean.ring.length  # frames have left
    assert_all_equal_bits([poisoned.skipped_tokens], [clean.skipped_tokens])


@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize("policy", POLICIES)
def test_streams_with_every_dead_slot_poisoned(policy, value):
    for seed, dtype in enumerate((torch.float32, torch.bfloat16)):
        check_stream(policy, dtype, value, chunks=8, seed=seed)


@heavy
@pytest.mark.parametrize("value", POISON)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_streams_with_every_dead_slot_poisoned(dtype, value):
    for policy in POLICIES:
        for seed in range(3):
            check_stream(policy, dtype, value, chunks=40, seed=seed)


def test_memory_is_written_before_it_is_read():
    """Fresh memory filled with NaN by PyTorch: no op hands it on."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(4).isnan().all()
        for policy in POLICIES:
            check_stream(policy, torch.bfloat16, float("nan"), chunks=8, seed=3)
        for kv_tokens in (0, 1, 34):
            inputs = attention_inputs(torch.float32, 34, 5, 13)
            results = attend(inputs[:3], inputs[3], kv_tokens=kv_tokens)
            assert not any(bool(t.isnan().any()) for t in results)
        for ends, s, w in (([4, 12], 0, 0), ([5, 9, 16], 2, 3)):
            inputs = attention_inputs(torch.bfloat16, ends[-1], ends[-1], 64)
            options = {"chunk_ends": ends, "num_sink_tokens": s, "num_window_tokens": w}
            assert not any(bool(t.isnan().any()) for t in attend(inputs[:3], inputs[3], **options))
        x, fake, real = (torch.randn(3, 2, 2047) for _ in range(3))
        gradient, aux = rf.dmd_gradient(x, fake=fake, real=real, mask=x > 0, return_aux=True)
        assert not any(bool(t.isnan().any()) for t in (gradient, *aux))
        angles, axes = rf.RoPE3D.wan(16).table([range(2), range(3), range(3)])
        assert not rf.rope(torch.randn(2, 18, 3, 17), angles=angles, axes=axes).isnan().any()
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
