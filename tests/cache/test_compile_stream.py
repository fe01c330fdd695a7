"""torch.compile(fullgraph=True) through streamed chunks with a cache: the same results, and one
compilation."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import rf_kernels as rf
from rf_kernels.testing import assert_equal_bits


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.heavy)])
@pytest.mark.parametrize("policy", [rf.EMASink(0.9), rf.StaticSink()], ids=["ema", "static"])
def test_a_stream_compiles_once(backend, policy):
    torch._dynamo.reset()
    torch.manual_seed(0)
    spec = rf.CacheSpec(
        layers=2,
        batch=1,
        heads=2,
        head_dim=32,
        grid=(2, 3),
        sink_frames=2,
        window_frames=4,
        rope=rf.RoPE3D.wan(32),
        dtype=torch.float32,
        device="cpu",
    )
    eager, compiled = (rf.SinkWindowCache(spec, sink=policy) for _ in range(2))
    norms = [torch.nn.RMSNorm(64, eps=1e-6).requires_grad_(False) for _ in range(2)]

    def forward(q, k, v, chunk):
        for layer in range(2):
            q = chunk.attend(layer, q, k, v, q_norm=norms[0], k_norm=norms[1])
        return q

    counter = CompileCounterWithBackend(backend)
    compiled_forward = torch.compile(forward, fullgraph=True, backend=counter)
    for _ in range(12):
        with eager.chunk(2) as expected, compiled.chunk(2) as found:
            for _ in range(2):
                data = [torch.randn(1, 12, 2, 32) for _ in range(3)]
                assert_equal_bits(compiled_forward(*data, found), forward(*data, expected))
    assert_equal_bits(compiled.k, eager.k)
    assert_equal_bits(compiled.v, eager.v)
    assert counter.frame_count == 1
