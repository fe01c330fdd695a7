"""What a compiler is told about a result is what comes out: shape, strides and dtype, for every op, every
dtype and inputs whose strides are not those of their shape."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import rf_kernels as rf

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def strided(*shape, dtype):
    """Heads before tokens, as models have them; the last dimension with stride 1."""
    batch, tokens, heads, dim = shape
    return torch.randn(batch, heads, tokens, dim).to(dtype).transpose(1, 2)


def rope_append(dtype):
    q, k, v = (strided(2, 6, heads, 8, dtype=dtype) for heads in (4, 2, 2))
    caches = [torch.zeros(2, 9, 2, 8, dtype=dtype) for _ in range(2)]
    return rf.rope_append, (q, k, v, *caches), {"slots": torch.tensor([2, 0], dtype=torch.int32)}


def rope(dtype):
    return rf.rope, (strided(2, 6, 4, 8, dtype=dtype),), {"angles": None, "axes": []}


def attention(dtype):
    tensors = (strided(2, n, heads, 8, dtype=dtype) for n, heads in ((6, 4), (9, 2), (9, 2)))
    return rf.sink_window_attention, tuple(tensors), {"kv_tokens": 7, "return_lse": True}


def attention_rows(dtype):
    function, tensors, options = attention(dtype)
    return function, tensors, options | {"kv_tokens": torch.tensor([7, 0], dtype=torch.int32)}


def whole_sequence(dtype):
    tensors = (strided(2, 6, heads, 8, dtype=dtype) for heads in (4, 2, 2))
    return (
        rf.sink_window_attention,
        tuple(tensors),
        {"chunk_ends": [2, 6], "num_sink_tokens": 1, "return_lse": True},
    )


def dmd_gradient(dtype):
    x, fake, real = (strided(2, 3, 4, 5, dtype=dtype) for _ in range(3))
    return rf.dmd_gradient, (x,), {"fake": fake, "real": real, "return_aux": True}


def dmd_loss(dtype):
    x, fake, real = (strided(2, 3, 4, 5, dtype=dtype) for _ in range(3))
    return rf.dmd_loss, (x,), {"fake": fake, "real": real, "return_aux": True}


def described(results):
    results = results if isinstance(results, tuple) else (results,)
    flat = [t for r in results for t in (r if isinstance(r, tuple) else (r,))]
    return [(tuple(t.shape), t.stride(), t.dtype) for t in flat]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "call", [rope_append, rope, attention, attention_rows, whole_sequence, dmd_gradient, dmd_loss]
)
def test_fake_results_are_described_as_they_come(call, dtype):
    function, arguments, options = call(dtype)
    with FakeTensorMode() as mode:
        fakes = tree_map_only(torch.Tensor, mode.from_tensor, (arguments, options))
        told = described(function(*fakes[0], **fakes[1]))
    assert told == described(function(*arguments, **options))
