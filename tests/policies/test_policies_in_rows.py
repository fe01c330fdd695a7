"""Rows of one memory, under every policy that ships."""

import dataclasses

import pytest
import torch

import rf_kernels as rf
from helpers.cache_case import make, tensors
from reward_forcing import policies
from rf_kernels.testing import assert_equal_bits

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
            out = batch.attend(0, *(torch.cat(x) for x in zip(*data, strict=True)), deterministic=True)
        for i, row in enumerate(part):
            with alone[row].chunk(frames, cut=cut) as chunk:
                assert_equal_bits(chunk.attend(0, *data[i], deterministic=True), out[i : i + 1])
    assert all(row._stream.left for row in rows)
