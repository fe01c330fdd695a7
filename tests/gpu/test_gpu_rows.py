"""Rows of one memory on CUDA: each is the row alone, in graphs too, nothing waits for the device, and what
was never written is never seen."""

import dataclasses

import pytest
import torch

import rf_kernels as rf
from helpers.gpu_tools import SERVED, Captured, no_synchronisation
from helpers.promise_tools import POLICIES, make_cache, states_of
from rf_kernels.testing import assert_equal_bits

ROWS, LAYERS = 3, 2


def make(policy, device, dtype=torch.bfloat16):
    """Rows, and a cache for each of them alone."""
    alone = [make_cache(policy, dtype=dtype, head_dim=64, device=device) for _ in range(ROWS)]
    spec = dataclasses.replace(alone[0].spec, batch=ROWS)
    return rf.SinkWindowRows(spec, sink=alone[0].sink), alone


def draw(owner, samples, seed, frames=2):
    spec, generator = owner.spec, torch.Generator().manual_seed(seed)
    size = (3, samples, frames * spec.frame_tokens, spec.heads, spec.head_dim)
    return torch.randn(size, generator=generator).to(spec.device, spec.dtype)


def on_hopper(device):
    return device == "cuda" and torch.cuda.get_device_capability() == (9, 0)


def assert_same(found, expected, device):
    """The same bits where they are promised, with ``deterministic=True``; else the rounding of the dtype."""
    if device == "cpu" or (on_hopper(device) and found.dtype != torch.float32):
        assert_equal_bits(found, expected)
    difference = (found.double() - expected.double()).norm()
    assert difference <= 4 * torch.finfo(found.dtype).eps * expected.double().norm()


def assert_same_memory(rows, alone):
    """The appends and evictions of a row have its bits on every device."""
    for row, cache in zip(rows, alone, strict=True):
        assert row.next_frame == cache.next_frame and row.kv_tokens == cache.kv_tokens
        for ours, theirs in zip((*row.k, *row.v), (*cache.k, *cache.v), strict=True):
            assert_equal_bits(ours[:, : row.kv_tokens], theirs[:, : row.kv_tokens])
        for name, tensor in states_of(row).items() if row.next_frame > row.ring.length else ():
            assert_equal_bits(tensor, states_of(cache)[name])


@pytest.mark.parametrize("dtype", SERVED, ids=str)
@pytest.mark.parametrize("policy", ["none", "static", "compensated"])
@torch.no_grad()
def test_rows_out_of_step_are_the_rows_alone(device, policy, dtype):
    """Rows that join later, sit out and start again: a number of keys for each, read by one attention."""
    rows, alone = make(policy, device, dtype)
    taking_part = [(0,), (0, 2), (2, 0), (0, 1, 2), (1, 2), (0, 1, 2), (0, 2), (2, 1, 0)]
    for number, chosen in enumerate(taking_part):
        if number == 5:
            for cache in (rows[2], alone[2]):
                cache.reset()
        with rows.chunk(2, rows=chosen) as batch:
            chunks = [alone[row].open(2) for row in chosen]
            for forward in range(2):
                for layer in range(LAYERS):
                    qkv = draw(rows, len(chosen), 100 * number + 10 * forward + layer)
                    found = batch.attend(layer, *qkv, deterministic=True)
                    for i, chunk in enumerate(chunks):
                        expected = chunk.attend(layer, *qkv[:, i : i + 1], deterministic=True)
                        assert_same(found[i : i + 1], expected, device)
            for chunk in chunks:
                chunk.commit()
    assert max(row.next_frame for row in rows) > rows.spec.ring.length
    assert_same_memory(rows, alone)


@torch.no_grad()
def test_a_captured_forward_of_rows_follows_the_streams(device):
    """Rows in step in a full cache. The plans of all rows lie in one buffer, which a replay reads anew."""
    rows, alone = make("compensated", device)
    inputs, current = draw(rows, ROWS, 0), []  # the batch: replays on the CPU are calls, and need it

    def forward():
        outputs = [current[0].attend(layer, *inputs, deterministic=True) for layer in range(LAYERS)]
        return torch.stack(outputs)

    def chunk_of_all(number, run):
        inputs.copy_(draw(rows, ROWS, number))
        found = run().clone()
        for chunk in current.pop().chunks:
            chunk.mark_written()  # what a replayed append cannot note down
            chunk.commit()
        for i, cache in enumerate(alone):
            with cache.chunk(2) as chunk:
                for layer in range(LAYERS):
                    expected = chunk.attend(layer, *inputs[:, i : i + 1], deterministic=True)
                    assert_same(found[layer, i : i + 1], expected, device)

    for number in range(8):
        current[:] = [rows.chunk(2)]
        if number == 4:  # the window is full; a capture runs nothing
            graph = Captured(forward, device)
        chunk_of_all(number, forward if number < 4 else graph.replay)
    assert_same_memory(rows, alone)


@torch.no_grad()
def test_rows_never_wait_for_the_device(device):
    """Opening, evicting, attending and committing, with rows that hold unequal numbers of frames."""
    rows, _ = make("compensated", device)
    qkv = draw(rows, ROWS, 0)
    for chosen in ((0,), (0, 1), (0, 1, 2), (0, 1, 2)):  # libraries and their workspaces
        with rows.chunk(2, rows=chosen) as batch:
            for layer in range(LAYERS):
                batch.attend(layer, *qkv[:, : len(chosen)])
    with no_synchronisation(device):
        for chosen in ((0, 1, 2), (2, 0), (1,), (0, 1, 2)):
            with rows.chunk(2, rows=chosen) as batch:
                for layer in range(LAYERS):
                    out = batch.attend(layer, *qkv[:, : len(chosen)])
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_what_was_never_written_is_never_seen_by_a_row(device, policy):
    """Memory full of NaN under rows of unequal lengths, against clean memory."""
    (clean, _), (poisoned, _) = make(policy, device), make(policy, device)
    states = [tensor for row in poisoned for tensor in states_of(row).values()]
    for tensor in (poisoned.k, poisoned.v, *states):
        tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    for number, chosen in enumerate([(0,), (0, 2), (0, 1, 2), (0, 2), (0, 1, 2), (0, 1, 2)]):
        with clean.chunk(2, rows=chosen) as expected, poisoned.chunk(2, rows=chosen) as found:
            for layer in range(LAYERS):
                qkv = draw(clean, len(chosen), 10 * number + layer)
                out = expected.attend(layer, *qkv)
                assert bool(out.isfinite().all())
                assert_equal_bits(found.attend(layer, *qkv), out)
    assert clean[0].next_frame > clean.spec.ring.length
