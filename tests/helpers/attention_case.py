"""Calls of sink_window_attention for its tests: shapes, inputs, the mask from the definition, and eager
PyTorch."""

import pytest
import torch
import torch.nn.functional as F

INF = float("inf")
# What docs/promises.md promises of the LSE in half precision on the CPU, beside the rounding of float32
# logits. PyTorch's kernel takes exp(x) = 2^(n + f) for 2^n (1 + f - K(f)), a cubic K: a factor within
# 1.0705e-4 of exact, the same bound for a sum of such terms.
HALF_LSE = 2.0**-13
# B, Nq, T, Hq, Hkv, D, kv_tokens: tiny, odd, grouped heads, batch, one key, one query, past the tiles of the
# CPU kernel (32, 512)
DENSE = {
    "tiny": (1, 1, 1, 1, 1, 1, 1),
    "odd": (1, 37, 61, 3, 3, 13, 53),
    "batch_grouped": (3, 19, 40, 6, 2, 32, 33),
    "multi_query": (2, 33, 70, 4, 1, 64, 70),
    "one_query": (2, 1, 90, 2, 2, 128, 77),
    "one_key": (2, 11, 5, 2, 1, 16, 1),
    "wide_head": (1, 9, 50, 2, 2, 256, 50),
    "tile_edges": (1, 65, 600, 2, 2, 64, 513),
}
# B, N, Hq, Hkv, D, chunk_ends, S, W: two intervals, touching ones, no sink, no window, sink longer than
# chunks, unlimited window
WHOLE = {
    "streaming": (2, 60, 4, 2, 32, [12, 24, 36, 48, 60], 12, 24),
    "ragged": (1, 60, 3, 3, 13, [7, 20, 33, 34, 60], 9, 15),
    "window_below_chunk": (1, 30, 2, 2, 16, [10, 20, 30], 4, 6),
    "no_sink": (2, 40, 2, 1, 64, [10, 20, 30, 40], 0, 20),
    "sink_only": (1, 24, 2, 2, 8, [8, 16, 24], 5, 0),
    "long_sink": (1, 24, 2, 2, 8, [4, 8, 16, 24], 12, 4),
    "unlimited": (1, 24, 2, 2, 8, [8, 16, 24], 3, None),
    "nothing_visible": (1, 12, 2, 2, 8, [4, 12], 0, 0),
}


def make(dtype, batch, queries, tokens, heads, kv_heads, dim, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((queries, heads), (tokens, kv_heads), (tokens, kv_heads))
    return [torch.randn(batch, *s, dim, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def make_case(dtype, case, seed=0):
    """Inputs and options of a row of DENSE or WHOLE."""
    if len(case) == 7:
        *shape, kv_tokens = case
        return make(dtype, *shape, seed=seed), {"kv_tokens": kv_tokens}
    batch, tokens, heads, kv_heads, dim, ends, sink_tokens, window = case
    options = {"chunk_ends": ends, "num_sink_tokens": sink_tokens, "num_window_tokens": window}
    return make(dtype, batch, tokens, tokens, heads, kv_heads, dim, seed=seed), options


def visible(queries, tokens, kv_tokens=None, chunk_ends=None, num_sink_tokens=0, num_window_tokens=None):
    """The mask [Nq, T], or [B, Nq, T] of rows of their own, written from the definition, independent of the
    oracle and of csrc/math/key_intervals.h."""
    key = torch.arange(tokens)
    if isinstance(kv_tokens, torch.Tensor):
        return (key < kv_tokens[:, None, None]).expand(-1, queries, -1)
    if chunk_ends is None:
        return (key < (tokens if kv_tokens is None else kv_tokens)).expand(queries, tokens)
    end = torch.tensor([next(e for e in chunk_ends if i < e) for i in range(queries)]).view(-1, 1)
    window = tokens if num_window_tokens is None else num_window_tokens
    return (key < end) & ((key < num_sink_tokens) | (key >= end - window))


def sdpa(q, k, v, **options):
    """What eager PyTorch computes in the dtype of its inputs."""
    mask = visible(q.shape[1], k.shape[1], **options)
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def run_with_grads(fn, inputs, options, grad_out):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = fn(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))]


# Shapes that the CPU kernel works off as one unit, on which MKL would use threads of its own.
SINGLE_UNIT = {"one_head": (1, 37, 538, 1, 1, 32, 500), "one_key_head": (1, 44, 592, 4, 1, 24, 233)}
SEEING = [
    pytest.param(case, id=name) for name, case in {**DENSE, **WHOLE}.items() if name != "nothing_visible"
]
