"""The Hopper forward kernel on a Hopper GPU: the cases of the functional model, through the public op. The
model is not built."""

import dataclasses

import pytest
import torch

import rf_kernels as rf
from chip.harness import BIAS, DENSE, ROWS, WHOLE, eager, make_inputs, oracle
from rf_kernels.testing import assert_equal_bits, assert_within_eager


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)),
    reason="needs a Hopper GPU",
)
@pytest.mark.parametrize("variant", ["bf16_128", "fp16_128", "bf16_64", "fp16_64"])
@pytest.mark.parametrize("name", [*DENSE, *WHOLE, *ROWS, *BIAS])
def test_on_the_chip(name, variant):
    """The same cases through the public op on a Hopper GPU: the model's claims, checked."""
    inputs = make_inputs(dataclasses.replace((DENSE | WHOLE | ROWS | BIAS)[name], variant=variant))
    case = inputs.case
    window = dict(
        chunk_ends=list(case.chunk_ends),
        num_sink_tokens=case.num_sink_tokens,
        num_window_tokens=case.num_window_tokens,
    )
    options = window if case.chunk_ends else dict(kv_tokens=case.kv_tokens)
    own = case.row_kv_tokens
    if own:
        options = dict(kv_tokens=torch.tensor(own, dtype=torch.int32).cuda())
    if inputs.kv_bias is not None:
        options["kv_bias"] = inputs.kv_bias.cuda()
    # In whole-sequence mode there is a key per query; a bias is for all keys, and rows may end at the last.
    tokens = case.kv_tokens if case.chunk_ends or own or case.bias else None
    tensors = (inputs.q, inputs.k[:, :tokens], inputs.v[:, :tokens])
    for deterministic in (False, True):
        results = [
            rf.sink_window_attention(
                *(t.cuda() for t in tensors), **options, return_lse=True, deterministic=deterministic
            )
            for _ in range(3)
        ]
        assert rf.last_dispatch().backend == "hopper"
        out, lse = (t.cpu() for t in results[0])
        expected, expected_lse = oracle(inputs)
        assert_within_eager(out, expected, eager(inputs))
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
        for again in results[1:]:
            assert_equal_bits(out, again[0].cpu())


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)),
    reason="needs a Hopper GPU",
)
def test_graphs_of_one_capture_stream_replayed_on_two_streams():
    """Split tiles in both: each graph has its own ticket, flags and partial results."""
    generator = torch.Generator(device="cuda").manual_seed(3)
    calls = []
    for queries in (1560, 1300):
        tensors = [
            torch.randn(1, n, 12, 128, device="cuda", dtype=torch.bfloat16, generator=generator)
            for n in (queries, 9360, 9360)
        ]
        expected = rf.sink_window_attention(*tensors, kv_tokens=9360)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = rf.sink_window_attention(*tensors, kv_tokens=9360)
        calls.append((graph, out, expected, torch.cuda.Stream()))
    torch.cuda.synchronize()
    for _ in range(50):
        for _, out, _, _ in calls:
            out.fill_(float("nan"))
        torch.cuda.synchronize()
        for graph, _, _, stream in calls:
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for _, out, expected, _ in calls:
            assert_equal_bits(out, expected)
