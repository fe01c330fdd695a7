"""torch.compile(fullgraph=True) through streamed chunks with a cache: the same results, and no compilation per chunk."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import rf_kernels as rf
from rf_kernels.testing import assert_equal_bits

# What a stream can differ in, as the compiler sees it: attended tokens while the cache fills (a number, then a symbol), and chunks
# whose first forward evicts while their repeated forwards do not.
MOST_COMPILATIONS = 5


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.heavy)])
def test_a_stream_compiles_a_few_times_and_then_never_again(backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager, compiled = (
        rf.SinkWindowCache(
            layers=2, batch=1, heads=2, head_dim=32, grid=(2, 3), sink_frames=2, window_frames=4, sink_policy=rf.EMASink(0.9),
            rope=rf.RoPE3D.wan(32), dtype=torch.float32,
        )
        for _ in range(2)
    )  # fmt: skip

    def forward(q, k, v, cache, plan):
        for layer in range(2):
            q = cache[layer].append(q, k, v, plan)
            q = rf.sink_window_attention(q, cache[layer].k, cache[layer].v, kv_tokens=plan.kv_tokens)
        return q

    counter = CompileCounterWithBackend(backend)
    compiled_forward = torch.compile(forward, fullgraph=True, backend=counter)
    counts = []
    for _ in range(12):
        plans = eager.begin(2), compiled.begin(2)
        for _ in range(2):
            data = [torch.randn(1, 12, 2, 32) for _ in range(3)]
            assert_equal_bits(compiled_forward(*data, compiled, plans[1]), forward(*data, eager, plans[0]))
        eager.commit(plans[0])
        compiled.commit(plans[1])
        counts.append(counter.frame_count)
    assert_equal_bits(compiled.k, eager.k)
    assert_equal_bits(compiled.v, eager.v)
    full = -(-eager.ring.length // 2) + 1
    assert counts[0] >= 1 and counts[-1] <= MOST_COMPILATIONS
    assert counts[full:] == [counts[-1]] * (len(counts) - full)
