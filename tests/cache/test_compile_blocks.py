"""Blocks compiled one by one: one compilation serves all layers, chunks and forwards, with the values of
eager execution."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import rf_kernels as rf
from helpers.training import STREAM, TINY
from reward_forcing.models import CausalWanModel
from reward_forcing.pipeline import StreamingPipeline
from rf_kernels.testing import assert_equal_bits

LAYERS = 30
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.heavy)]


def spec_of(layers=LAYERS, **options):
    sizes = {"layers": layers, "batch": 1, "heads": 2, "head_dim": 16, "grid": (2, 2)}
    frames = {"sink_frames": 2, "window_frames": 3, "rope": rf.RoPE3D.wan(16)}
    return rf.CacheSpec(**sizes, **frames, **options, dtype=torch.float32, device="cpu")


class Block(nn.Module):
    """A user's block; ``number``: how it knows its layer."""

    def __init__(self, number):
        super().__init__()
        self.number = number
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.norm_q, self.norm_k = nn.RMSNorm(32, eps=1e-6), nn.RMSNorm(32, eps=1e-6)

    def forward(self, x, layer, chunk):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).unbind(2)
        layer = self.number if layer is None else layer
        y = chunk.attend(layer, q, k, v, q_norm=self.norm_q, k_norm=self.norm_k)
        return x + self.out(y.flatten(2))


# How a block gets its layer, and the compilations that it costs: 0 and 1 may be constants to a compiler, all
# other numbers are one symbol.
WAYS = {"argument": (lambda i: i, lambda i: None, 3), "tensor": (lambda i: None, torch.tensor, 1)}


@pytest.mark.parametrize(
    "way, backend",
    [
        ("argument", "aot_eager"),
        ("tensor", "aot_eager"),
        pytest.param("tensor", "inductor", marks=pytest.mark.heavy),
    ],
)
def test_one_compilation_serves_all_layers(way, backend):
    given, own, most = WAYS[way]
    torch._dynamo.reset()
    torch.manual_seed(0)
    blocks = [Block(own(i)).requires_grad_(False) for i in range(LAYERS)]
    eager, compiled = (rf.SinkWindowCache(spec_of(), sink=rf.EMASink(0.9)) for _ in range(2))
    counter = CompileCounterWithBackend(backend)
    fast = [torch.compile(block, fullgraph=True, backend=counter) for block in blocks]
    for at in range(6):
        strict = torch._dynamo.config.patch(error_on_recompile=at > 0)
        with eager.chunk(1) as expected, compiled.chunk(1) as found, strict:
            for _ in range(2):
                x = y = torch.randn(1, 4, 32)
                for i, block in enumerate(blocks):
                    x, y = block(x, given(i), expected), fast[i](y, given(i), found)
                assert_equal_bits(y, x) if backend == "aot_eager" else torch.testing.assert_close(y, x)
    assert 1 <= counter.frame_count <= most
    if backend == "aot_eager":
        assert_equal_bits(compiled.k, eager.k)
        assert_equal_bits(compiled.v, eager.v)


def test_the_models_blocks_compile_alone():
    """As a user does it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = CausalWanModel(replace(TINY, num_layers=10)).requires_grad_(False)
    stream = replace(STREAM, denoising_step_list=(1000, 500))
    pipeline = StreamingPipeline(model, stream)
    noise, context = torch.randn(1, 12, 4, 4, 4), torch.randn(1, 3, 8)

    def rollout():
        draws = torch.Generator().manual_seed(1)
        return pipeline.rollout(noise, context, noise_source=lambda x: torch.randn(x.shape, generator=draws))

    expected = rollout()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(fullgraph=True, backend=counter)
    assert_equal_bits(rollout(), expected)
    assert 1 <= counter.frame_count <= 3
    with torch._dynamo.config.patch(error_on_recompile=True):
        rollout()


def test_gradients_leave_the_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block(None)
    compiled = torch.compile(block, backend="aot_eager")
    caches = [rf.SinkWindowCache(spec_of(2), sink=rf.EMASink(0.9)) for _ in range(2)]
    for _ in range(7):
        x, results = torch.randn(1, 4, 32), []
        for run, cache in zip((block, compiled), caches, strict=True):
            with cache.chunk(1) as chunk:
                y = run(run(x, 0, chunk), 1, chunk)
                results.append([y.detach(), *torch.autograd.grad(y.square().sum(), list(block.parameters()))])
        for expected, found in zip(*results, strict=True):
            assert_equal_bits(found, expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported), caches[0].chunk(1) as chunk:
        torch.compile(block, backend="aot_eager", fullgraph=True)(x, 0, chunk)


def test_the_errors_are_those_of_eager_execution():
    torch._dynamo.reset()
    cache = rf.SinkWindowCache(spec_of(2), sink=rf.EMASink(0.9))
    block = torch.compile(Block(None).requires_grad_(False), backend="aot_eager", fullgraph=True)
    chunk, x = cache.open(1), torch.randn(1, 4, 32)
    for layer, value, text in (
        (2, x, r"Chunk.attend: argument `layer`: expected a layer 0..1, found 2"),
        (torch.tensor(-1), x, r"Chunk.attend: argument `layer`: expected a layer 0..1, found tensor\(-1\)"),
        (torch.tensor(0.5), x, "Chunk.attend: argument `layer`: expected a layer 0..1"),
        (0, torch.randn(1, 8, 32), "argument `q`: expected 4 tokens: 1 frames of 4, found 8"),
    ):
        with pytest.raises(rf.ArgumentError, match=text):
            block(value, layer, chunk)
    chunk.rollback()  # nothing was written
    with pytest.raises(rf.ArgumentError, match="expected an open chunk, found frames 0..1, rolled back"):
        block(x, 0, chunk)


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_keep_their_order_and_none_is_merged(backend):
    """The same arguments twice, and results that nobody uses."""
    torch._dynamo.reset()
    caches = [rf.SinkWindowCache(spec_of(1), sink=rf.StaticSink()) for _ in range(2)]

    def twice(x, chunk):
        chunk.attend(0, x, x, x)
        first = chunk.attend(0, 2 * x, 2 * x, 2 * x)
        chunk.attend(0, x, x, x)
        second = chunk.attend(0, 2 * x, 2 * x, 2 * x)
        chunk.attend(0, 3 * x, 3 * x, 3 * x)
        return first + second

    compiled = torch.compile(twice, backend=backend, fullgraph=True)
    x = torch.randn(1, 4, 2, 16)
    for run, cache in zip((twice, compiled), caches, strict=True):
        with cache.chunk(1) as chunk:
            run(x, chunk)
    assert_equal_bits(caches[1].k, caches[0].k)
