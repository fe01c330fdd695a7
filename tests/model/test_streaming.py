"""A stream of the pipeline that begins elsewhere than behind the last frame."""

from dataclasses import replace

import pytest
import torch

import rf_kernels as rf
from helpers.training import STREAM, TINY
from reward_forcing.models import CausalWanModel
from reward_forcing.pipeline import StreamingPipeline
from rf_kernels.testing import assert_equal_bits

CONTEXT = torch.randn(1, 3, TINY.text_dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def line():
    torch.manual_seed(0)
    model = CausalWanModel(TINY).double().requires_grad_(False)
    return StreamingPipeline(model, replace(STREAM, denoising_step_list=(1000, 500)))


def clip(frames, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(1, frames, TINY.in_dim, 4, 6, generator=draws, dtype=torch.float64)


def run(line, frames, cache, **options):
    draws = torch.Generator().manual_seed(7)
    source = {"noise_source": lambda x: torch.randn(x.shape, generator=draws, dtype=x.dtype)}
    return list(line.stream(line.split(clip(frames)), CONTEXT, cache=cache, **source, **options))


@pytest.mark.parametrize("prefix", [0, 3])
def test_a_stream_begins_at_any_frame(line, prefix):
    """Positions are absolute, attention sees their differences: the latents are those from frame 0 on."""
    given = {"initial_latent": clip(prefix, 5)} if prefix else {}
    cache = line.new_cache(1, 4, 6)
    expected = run(line, 15, line.new_cache(1, 4, 6), **given)
    found = run(line, 15, cache, start=21, **given)
    assert [c.first_frame for c in found] == [21 + c.first_frame for c in expected]
    assert cache.next_frame == 21 + prefix + 15
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.latents, b.latents, rtol=1e-9, atol=1e-9)
    none = run(line, 3, None, start=21)  # a cache of its own
    assert none[0].first_frame == 21


def test_a_stream_goes_back(line):
    """To the frames that it ends with, with other noise; then to them once more; then to the beginning."""
    cache = line.new_cache(1, 4, 6)
    first = run(line, 6, cache)
    kept = cache.k.clone()
    other = list(line.stream([clip(3, 11)], CONTEXT, cache=cache, start=3, noise_source=torch.zeros_like))
    assert [c.first_frame for c in other] == [3] and not torch.equal(cache.k, kept)
    whole = run(line, 6, cache, start=0)
    assert [c.first_frame for c in whole] == [0, 3] and cache.next_frame == 6
    for a, b in zip(whole, first, strict=True):
        assert_equal_bits(a.latents, b.latents)
    assert_equal_bits(cache.k, kept)


def test_a_start_that_is_not_in_the_cache_is_refused(line):
    cache = line.new_cache(1, 4, 6)
    run(line, 3, cache)
    with pytest.raises(rf.ArgumentError, match="start"):
        run(line, 3, cache, start=5)
    assert cache.next_frame == 3
