"""Tokens that are merged and counted, and tokens that are chosen."""

import torch

import rf_kernels as rf
from helpers.cache_case import make, tensors
from reward_forcing import policies
from rf_kernels.testing import relative_l2


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
