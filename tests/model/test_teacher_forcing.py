"""Teacher forcing on whole clips gives the flow that streaming the same frames gives, under every sink."""

from dataclasses import replace

import pytest
import torch

from reward_forcing.config import ModelConfig, StreamConfig
from reward_forcing.models import CausalWanModel
from reward_forcing.pipeline import StreamingPipeline
from reward_forcing.trainer.teacher_forcing import TeacherForcedWan

CONFIG = ModelConfig(
    dim=32, ffn_dim=64, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=3, freq_dim=16
)


def models(dtype=torch.float64):
    torch.manual_seed(0)
    forced = TeacherForcedWan(CONFIG).to(dtype)
    for p in forced.parameters():
        torch.nn.init.normal_(p, std=0.15)
    causal = CausalWanModel(CONFIG).to(dtype)
    causal.load_state_dict(forced.state_dict(), strict=True)
    return forced, causal


def inputs(frames, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    clean, noisy = (torch.randn(2, 4, frames, 4, 4, generator=generator).to(dtype) for _ in range(2))
    return (
        clean,
        noisy,
        1000 * torch.rand(2, frames, generator=generator),
        torch.randn(2, 3, 8, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("policy", ["none", "static", "ema"])
@pytest.mark.parametrize(("chunk", "sink", "visible"), [(3, 3, 9), (2, 3, 8), (3, 1, 5), (4, 2, 7)])
def test_equals_streaming(policy, chunk, sink, visible):
    stream = StreamConfig(
        chunk_frames=chunk,
        sink_frames=0 if policy == "none" else sink,
        local_attn_size=visible,
        alpha=0.8,
        sink_policy=policy,
    )
    forced, causal = models()
    frames = 6 * chunk
    clean, noisy, t, context = inputs(frames)
    with torch.no_grad():
        joint = forced(clean, noisy, t, forced.text_keys(context), stream)
        pipeline, text, flows = StreamingPipeline(causal, stream), causal.text_keys(context), []
        cache = pipeline.new_cache(2, 4, 4)
        for first in range(0, frames, chunk):
            part = slice(first, first + chunk)
            with cache.chunk(chunk) as opened:
                flows.append(causal(noisy[:, :, part], t[:, part], text, opened))
                causal(clean[:, :, part], torch.zeros(2, 1), text, opened)
    streamed = torch.cat(flows, dim=2)
    assert (joint - streamed).norm() / streamed.norm() <= 1e-12
    if policy == "ema":  # the average is at work: without it the flow is another
        other = forced(clean, noisy, t, forced.text_keys(context), replace(stream, alpha=1.0))
        assert (other - joint).norm() / joint.norm() > 1e-4


def test_gradient_reaches_the_clean_frames_through_the_sink():
    """A frame that has left the window acts on the last chunk through the average alone."""
    stream = StreamConfig(chunk_frames=3, sink_frames=3, local_attn_size=6, alpha=0.8)
    forced, _ = models()
    clean, noisy, t, context = inputs(18)
    reached = {}
    for policy in ("ema", "static"):
        leaf = clean.clone().requires_grad_()
        flow = forced(leaf, noisy, t, forced.text_keys(context), replace(stream, sink_policy=policy))
        (grad,) = torch.autograd.grad(flow[:, :, 15:].square().sum(), leaf)
        reached[policy] = float(grad[:, :, 3:6].norm() / grad[:, :, 15:].norm().clamp_min(1e-30))
    # A static sink too lets frame 3 act on the last chunk, through the clean frames in between.
    assert reached["ema"] > 1.5 * reached["static"]


def test_gradient_is_the_derivative():
    stream = StreamConfig(chunk_frames=2, sink_frames=2, local_attn_size=4, alpha=0.8)
    forced, _ = models()
    clean, noisy, t, context = inputs(8)
    weights = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def value():
        return (forced(clean, noisy, t, forced.text_keys(context), stream) * weights).sum()

    value().backward()
    for name in (
        "blocks.0.self_attn.k.weight",
        "blocks.1.self_attn.v.bias",
        "blocks.0.self_attn.norm_k.weight",
    ):
        p = forced.get_parameter(name)
        direction = torch.randn(p.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        with torch.no_grad():
            ends = []
            for step in (1e-5, -1e-5):
                p.add_(direction, alpha=step)
                ends.append(value())
                p.sub_(direction, alpha=step)
        numeric = (ends[0] - ends[1]) / 2e-5
        assert torch.isclose((p.grad * direction).sum(), numeric, rtol=1e-6), name
