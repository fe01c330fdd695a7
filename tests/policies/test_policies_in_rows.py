"""Rows of one memory, under every policy that ships."""

import copy
import dataclasses

import pytest
import torch

import rf_kernels as rf
from helpers import policy_rules as rules
from helpers.cache_case import attend, make, tensors
from reward_forcing import policies
from rf_kernels.reference.streaming import rotate, token_positions
from rf_kernels.testing import assert_equal_bits, relative_l2

PARTS = ([0, 1, 2], [1], [2, 0], [0, 1])


@pytest.mark.parametrize("name", [name for name in policies.NAMES if name != "state"])
def test_a_row_has_the_bits_of_the_row_alone(name):
    """With shots, and with frames that leave."""
    policy = policies.parse(name)
    alone = [make(0 if name == "none" else 3, 6, policy=policy, dtype=torch.float32) for _ in range(3)]
    rows = rf.SinkWindowRows(dataclasses.replace(alone[0].spec, batch=3), sink=policy)
    for number in range(24):
        part, frames, cut = PARTS[number % 4], 1 + number // 4 % 3, number % 9 == 4
        with rows.chunk(frames, rows=part, cut=cut) as batch:
            data = [tensors(alone[0], frames, 10 * number + row) for row in part]
            out = attend(batch, 0, *(torch.cat(x) for x in zip(*data, strict=True)), deterministic=True)
        for i, row in enumerate(part):
            with alone[row].chunk(frames, cut=cut) as chunk:
                assert_equal_bits(attend(chunk, 0, *data[i], deterministic=True), out[i : i + 1])
    assert all(row._stream.left for row in rows)


def test_rows_with_policies_of_their_own():
    """They need unequal room in a plan, some weigh frames, and some look at queries."""
    names = ("ema:0.9", "log-bias", "important", "merged:threshold=0.1", "short", "static")
    sinks = [policies.parse(name) for name in names]
    alone = [make(3, 6, policy=sink, dtype=torch.float64) for sink in sinks]
    spec = dataclasses.replace(alone[0].spec, batch=len(sinks))
    rows = rf.SinkWindowRows(spec, sink=sinks)
    assert [row.sink for row in rows] == sinks == list(copy.deepcopy(rows).sink)
    for number in range(9):
        data = [tensors(alone[0], 3, 10 * number + row) for row in range(len(sinks))]
        with rows.chunk(3) as batch:
            out = batch.attend(0, *(torch.cat(x) for x in zip(*data, strict=True)))
        for row, cache in enumerate(alone):
            with cache.chunk(3) as chunk:
                assert relative_l2(out[row : row + 1], chunk.attend(0, *data[row])) < 1e-13
        if number == 5:
            rows = copy.deepcopy(rows)
    with pytest.raises(rf.ArgumentError, match="sink.*one for each of the 6 rows.*5"):
        rf.SinkWindowRows(spec, sink=sinks[:5])


def test_heads_with_windows_of_their_own():
    """Heads as rows (Dummy Forcing): one sees the chunk alone, one a frame more, one all of the window."""
    H, W, F, grid = 3, 7, 2, (2, 3)
    n = grid[0] * grid[1]
    sinks = [policies.ShortWindow(0), policies.ShortWindow(1), rf.NoSink()]
    whole = make(0, W, grid=grid, heads=H, dtype=torch.float64)
    rows = rf.SinkWindowRows(dataclasses.replace(whole.spec, batch=H, heads=1), sink=sinks)
    told = rules.Told(0, W, grid=grid)
    for number in range(12):
        told.ends.append(F * (number + 1))
        q, k, v = tensors(whole, F, number)  # [1, F * n, H, D]
        own_at = range(told.begin, told.end)
        for i, frame in enumerate(own_at):
            at = slice(i * n, (i + 1) * n)
            told.k[frame], told.v[frame], told.at[frame] = k[:, at], v[:, at], frame
        with rows.chunk(F) as batch:
            y = batch.attend(0, *(x[0].transpose(0, 1).unsqueeze(2) for x in (q, k, v)))
        assert [chunk.kv_tokens // n - F for chunk in batch.chunks] == [
            0,
            min(1, told.begin),
            min(5, told.begin),
        ]
        for head, past in enumerate((0, 1, W - F)):
            frames = range(max(0, told.begin - past), told.end)
            keys = torch.cat(
                [rotate(told.k[f][:, :, head : head + 1], token_positions([f], grid)) for f in frames], 1
            )
            values = torch.cat([told.v[f][:, :, head : head + 1] for f in frames], 1)
            query = rotate(q[:, :, head : head + 1], token_positions(list(own_at), grid))
            query, keys, values = (x.transpose(1, 2) for x in (query, keys, values))
            expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values).transpose(1, 2)
            assert relative_l2(y[head : head + 1], expected) < 1e-12


def test_static_and_dynamic_heads_are_one_attention():
    """Forcing-KV: every head sees one sink frame, the frame before the chunk, and the chunk; a dynamic one
    the third of the patches before that which changed most."""
    H, F, grid, S, W = 4, 3, (2, 3), 2, 4
    n = grid[0] * grid[1]
    dynamic = (0, 3)
    sinks = [policies.ChangingPatches(6, keep=0.33 if head in dynamic else 0.0) for head in range(H)]
    whole = make(S, W, grid=grid, heads=H, dtype=torch.float64)
    rows = rf.SinkWindowRows(dataclasses.replace(whole.spec, batch=H, heads=1), sink=sinks)
    heads = [rules.Told(S, W, grid=grid) for _ in range(H)]
    for number in range(12):
        q, k, v = tensors(whole, F, number)
        with rows.chunk(F) as batch:
            y = batch.attend(0, *(x[0].transpose(0, 1).unsqueeze(2) for x in (q, k, v)))
        for head, told in enumerate(heads):
            told.ends.append(F * (number + 1))
            query, key, value = (x[:, :, head : head + 1] for x in (q, k, v))
            if head in dynamic:
                seen = rules.patches(told, 6, 0.33, 1, 1)
                tokens = sum(x.shape[1] for _, x, _ in seen)
                assert tokens == n * min(number + 1, 3) * (number > 0)  # sink; with it a frame; and patches
            else:
                seen = rules.short(dataclasses.replace(told, S=1, W=5), 1)
            own_at = list(range(told.begin, told.end))
            entries = [
                *seen,
                *((f, x, y) for f, x, y in zip(own_at, key.split(n, 1), value.split(n, 1), strict=True)),
            ]
            keys = [x if f is None else rotate(x, token_positions([f], grid)) for f, x, _ in entries]
            query = rotate(query, token_positions(own_at, grid))
            query, keys, values = (
                x.transpose(1, 2) for x in (query, torch.cat(keys, 1), torch.cat([x for *_, x in entries], 1))
            )
            expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values).transpose(1, 2)
            assert relative_l2(y[head : head + 1], expected) < 1e-12
            for i, frame in enumerate(own_at):
                told.k[frame], told.v[frame] = (x[:, i * n : (i + 1) * n] for x in (key, value))
                told.at[frame] = frame
