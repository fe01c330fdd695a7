"""Tokens that are merged and counted, and patches that are chosen."""

import pytest
import torch

import rf_kernels as rf
from helpers import policy_rules as rules
from helpers.cache_case import make, state_of, step, tensors
from reward_forcing import policies
from rf_kernels.reference.streaming import rotate, token_positions
from rf_kernels.testing import assert_equal_bits, relative_l2


def attention(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def test_equal_keys_are_attended_as_if_all_of_them_were_there():
    """A stream whose frames repeat a few keys, with 40 frames, in 7 slots: the result is that of attention
    over all 40, to the rounding of the weights to float32."""
    cache = make(2, 5, policy=policies.MergedTokens(2, 0.999), rope=None, batch=2)
    few = torch.randn(2, 9, 2, 32, generator=torch.Generator().manual_seed(0)).double()
    keys, values = [], []
    for number in range(20):
        q, _, v = tensors(cache, 2, number)
        which = torch.randint(9, (2, 12), generator=torch.Generator().manual_seed(number))
        k = torch.stack([tokens[i] for tokens, i in zip(few, which, strict=True)])
        keys.append(k)
        values.append(v)
        with cache.chunk(2) as chunk:
            found = chunk.attend(0, q, k, v)
        assert relative_l2(found, attention(q, torch.cat(keys, 1), torch.cat(values, 1))) < 1e-6
    count = cache._sink.tensors["count"][0]
    assert count.sum(1).tolist() == [35 * 6] * 2  # 2 * 6 places hold all that has left


def test_content_that_stays_is_merged_although_time_turns_its_keys():
    """With temporal rotation: equal content of all frames is one place a token, behind the window."""
    cache = make(1, 5, policy=policies.MergedTokens(1, 0.999), dtype=torch.float32)
    same = tensors(cache, 1, 0)[1]
    for _ in range(12):
        with cache.chunk(2) as chunk:
            chunk.attend(0, *(same.repeat(1, 2, 1, 1) for _ in range(3)))
    assert cache._sink.tensors["count"][0].tolist() == [[24 - 5] * 6]
    turning = make(1, 5, policy=policies.MergedTokens(1, 0.999, rephase=False), dtype=torch.float32)
    for _ in range(12):
        with turning.chunk(2) as chunk:
            chunk.attend(0, *(same.repeat(1, 2, 1, 1) for _ in range(3)))
    assert turning._sink.tensors["count"][0].tolist() == [[1] * 6]


def test_a_token_that_is_not_finite_is_not_remembered():
    cache = make(1, 3, policy=policies.MergedTokens(1, 0.5))
    for number in range(6):
        q, k, v = tensors(cache, 1, number)
        if number == 2:
            k[:, 1, 0, 3], v[:, 4, 1, 5] = torch.nan, torch.inf
        with cache.chunk(1) as chunk:
            found = chunk.attend(0, q, k, v)
    assert bool(found.isfinite().all()) and bool(cache.k.isfinite().all())
    assert isinstance(policies.parse("merged:frames=2,threshold=0.8"), rf.SinkPolicy)


@pytest.mark.parametrize("text", ["merged:threshold=0.2", "patches:patches=3"])
def test_a_stream_that_starts_over_is_a_new_one(text):
    """Weights of the old stream's keys are gone, by `start=0` and by `reset`."""
    cache, fresh = (make(2, 5, policy=policies.parse(text), dtype=torch.float32) for _ in range(2))
    for number in range(6):
        step(cache, 2, number)
    for again in range(2):
        fresh.reset()
        for number in range(6):
            start = 0 if number == 0 and again == 0 else None
            with cache.chunk(2, start=start) as chunk:
                found = [chunk.attend(0, *tensors(cache, 2, 50 + number)) for _ in range(2)]
            with fresh.chunk(2) as chunk:
                expected = [chunk.attend(0, *tensors(cache, 2, 50 + number)) for _ in range(2)]
            assert_equal_bits(torch.stack(found), torch.stack(expected))
        for a, b in zip(state_of(cache)[2:], state_of(fresh)[2:], strict=True):
            assert_equal_bits(a, b)
        cache.reset()


def test_a_chunk_of_the_window_is_written_again():
    """The sink keeps what it has, and its weights: the result is that of the chunk written once."""
    found = []
    for seed in (5, 80):
        cache = make(2, 5, policy=policies.MergedTokens(1, 0.2), dtype=torch.float32)
        for number in (0, 1, 2, 3, 4, seed):
            step(cache, 2, number)
        with cache.chunk(2, start=10) as chunk:
            found.append(chunk.attend(0, *tensors(cache, 2, 9)))
    assert_equal_bits(*found)


@pytest.mark.parametrize(
    "policy, expected",
    [
        (policies.MergedTokens(3), "frames.*1..2 sink frames.*3"),
        (policies.MergedTokens(threshold=1.5), "threshold.*a cosine in -1..1.*1.5"),
        (policies.MergedTokens(most=0.5), "most.*at least 1, or None.*0.5"),
        (policies.ChangingPatches(5), "patches.*a divisor of the 6 tokens of a frame.*5"),
        (policies.ChangingPatches(keep=2), "keep.*a number in 0..1.*2"),
        (policies.ChangingPatches(memory=0), "memory.*1..2 sink frames.*0"),
        (policies.ChangingPatches(layer=1), "layer.*None, or a layer 0..0.*1"),
        (policies.ChangingPatches(frames=-1), "frames.*at least 0.*-1"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(policy, expected):
    with pytest.raises(rf.ArgumentError, match=expected):
        make(2, 5, policy=policy)


def test_a_layer_chooses_for_those_behind_it():
    """The published choice of Forcing-KV: the first layer keeps no patches, the second chooses, by all heads
    of the cache, and the third keeps the same ones."""
    cache = make(2, 4, policy=policies.ChangingPatches(3, layer=1), layers=3, batch=2)
    layers = [rules.Told(2, 4, grid=(2, 3)) for _ in range(3)]
    for number in range(12):
        with cache.chunk(3) as chunk:
            for layer, told in enumerate(layers):
                told.ends.append(3 * (number + 1))
                q, k, v = tensors(cache, 3, 10 * number + layer)
                seen = rules.patches(told, 3, 0.33 if layer else 0.0, 1, 1, by=layers[1])
                own_at = list(range(told.begin, told.end))
                own = [*zip(own_at, k.split(6, 1), v.split(6, 1), strict=True)]
                turned = [
                    x if f is None else rotate(x, token_positions([f], (2, 3))) for f, x, _ in [*seen, *own]
                ]
                query, values = rotate(q, token_positions(own_at, (2, 3))), [x for *_, x in [*seen, *own]]
                expected = attention(query, torch.cat(turned, 1), torch.cat(values, 1))
                assert relative_l2(chunk.attend(layer, q, k, v), expected) < 1e-12
                told.k |= {f: x for f, x, _ in own}
                told.v |= {f: x for f, _, x in own}
                told.at |= {f: f for f in own_at}
