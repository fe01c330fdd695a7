"""nvtx ranges: every public op and every pipeline phase by name, recorded by a stub in place of the nvtx
package."""

from types import SimpleNamespace

import pytest
import torch

import rf_kernels as rf
from rf_kernels import profiling


@pytest.fixture
def ranges(monkeypatch):
    """(domain, name, depth) of every range, in the order in which they were opened."""
    seen, depth = [], [0]

    class annotate:  # noqa: N801  (of the package)
        def __init__(self, name, domain):
            self.key = domain, name

        def __enter__(self):
            seen.append((*self.key, depth[0]))
            depth[0] += 1

        def __exit__(self, *_):
            depth[0] -= 1

    monkeypatch.setattr(profiling, "nvtx", SimpleNamespace(annotate=annotate))
    return seen


def cache_of():
    spec = rf.CacheSpec(
        layers=1,
        batch=1,
        heads=1,
        head_dim=16,
        grid=(1, 2),
        sink_frames=1,
        window_frames=1,
        rope=rf.RoPE3D.wan(16),
        dtype=torch.float32,
        device="cpu",
    )
    return rf.SinkWindowCache(spec, sink=rf.EMASink())


def test_every_public_op_opens_a_range(ranges):
    x = torch.randn(1, 2, 1, 16)
    cache = cache_of()
    for _ in range(3):
        with cache.chunk(1) as chunk:
            chunk.attend(0, x, x, x)
    rf.rope(x, angles=None, axes=())
    rf.dmd_gradient(x, fake=x, real=-x)
    rf.dmd_loss(x.requires_grad_(), fake=x.detach(), real=-x.detach()).backward()
    assert {domain for domain, _, _ in ranges} == {"rf_kernels"}
    names = [name for _, name, _ in ranges]
    assert (
        names.count("rope_append") == names.count("sink_window_attention") == 3
        and names.count("ema_evict") == 1
    )
    assert {"rope", "dmd_gradient", "dmd_loss"} <= set(names)


def test_a_range_closes_when_the_op_refuses(ranges):
    with pytest.raises(rf.ArgumentError):
        rf.sink_window_attention(*[torch.zeros(1, 2, 1, 8)] * 3, kv_tokens=9)
    rf.sink_window_attention(*[torch.zeros(1, 2, 1, 8)] * 3, kv_tokens=2)
    assert [depth for _, _, depth in ranges] == [0, 0]


def test_pipeline_phases_contain_the_ops(ranges):
    from reward_forcing.config import ModelConfig, StreamConfig
    from reward_forcing.models import CausalWanModel
    from reward_forcing.pipeline import StreamingPipeline

    config = ModelConfig(
        dim=32, ffn_dim=32, num_heads=2, num_layers=1, in_dim=4, out_dim=4, text_dim=8, text_len=4, freq_dim=8
    )
    pipeline = StreamingPipeline(CausalWanModel(config), StreamConfig(denoising_step_list=(1000, 500)))
    list(pipeline.stream([torch.randn(1, 3, 4, 4, 4)], torch.randn(1, 4, 8)))
    phases = [name for domain, name, _ in ranges if domain == "reward_forcing"]
    assert phases == ["denoise", "renoise", "denoise", "context"]
    assert all(depth > 0 for domain, _, depth in ranges if domain == "rf_kernels")


def test_without_the_package_nothing_happens(monkeypatch):
    monkeypatch.setattr(profiling, "nvtx", None)
    with profiling.nvtx_range("anything"):
        assert rf.rope(torch.ones(1, 1, 1, 4), angles=None, axes=()).shape == (1, 1, 1, 4)
