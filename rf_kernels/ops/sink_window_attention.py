"""Attention of a chunk's queries over sink and window; and over whole sequences, a sink and a window per
chunk."""

import torch

from .._backend import (
    argument_error,
    flag,
    integer,
    integers,
    invoke,
    number,
    ops,
    refuse_grad,
    register_fake,
)
from ..profiling import nvtx_annotated, when_imported

_OP = "sink_window_attention"


@nvtx_annotated
def sink_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    kv_tokens: int | torch.Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    chunk_ends: list[int] | tuple[int, ...] | None = None,
    num_sink_tokens: int = 0,
    num_window_tokens: int | None = None,
    deterministic: bool | None = None,
    kv_bias: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention without a mask over the keys that a query's chunk may see.

    For a query ``i`` with the set ``K(i)`` of visible keys::

        lse[i] = log sum_{j in K(i)} exp(softmax_scale * q[i] . k[j] + kv_bias[j])
        out[i] = sum_{j in K(i)} exp(softmax_scale * q[i] . k[j] + kv_bias[j] - lse[i]) v[j]

    *Dense prefix* (streaming, the default): ``K(i) = [0, kv_tokens)`` for every query, or ``[0,
    kv_tokens[b])`` for those of sample ``b``. The cache keeps sink and window in one buffer whose valid slots
    are a prefix, and softmax does not care about the order of keys.

    *Whole sequence* (``chunk_ends``; diffusion-forced training): the queries of the chunk that ends at token
    ``t`` see the sink ``[0, min(S, t))`` and their window ``[max(S, t - W), t)``, with ``S =
    num_sink_tokens``, ``W = num_window_tokens``. This is what streaming the same sequence with a static sink
    and absolute positions computes.

    Args:
        q: queries ``[B, Nq, Hq, D]``; float64, float32, bfloat16 or float16 (float64 on CPU only), ``1 <= D
            <= 256``.
        k: keys ``[B, T, Hkv, D]``, ``Hkv`` dividing ``Hq``: query head ``h`` reads key head ``h // (Hq //
            Hkv)``.
        v: values ``[B, T, Hkv, Dv]``, ``1 <= Dv <= D``. All three may be strided views with a unit stride in
            the last dimension: with ``Dv = D`` nothing is copied. Nor is it where ``v`` is columns of k's own
            rows, ``k[..., a:b]``: keys and values are one latent then. Any other v of ``Dv < D`` is copied
            once, with zeros behind it.
        kv_tokens: number of valid tokens at the start of k and v, ``0 .. T``; required without
            ``chunk_ends``. Tokens behind it are never read and get zero gradient. With 0, ``out`` is 0 and
            ``lse`` is ``-inf``. An int32 tensor ``[B]`` on the device of q gives each sample its own number.
            On CUDA its values are not read on the host: one out of range counts as the nearest in range.
        softmax_scale: factor on the logits, above 0 (default ``D ** -0.5``).
        return_lse: also return the log-sum-exp.
        chunk_ends: ends of the chunks in tokens, ascending; the last is ``Nq = T``. Whole-sequence mode.
        num_sink_tokens: ``S`` in tokens, whole-sequence mode only.
        num_window_tokens: ``W`` in tokens, the chunk itself included; None is unlimited. Whole-sequence mode
            only.
        deterministic: on Hopper, cut no tile of queries over several multiprocessors. Every call gives the
            same bits again either way; with True, a sample's bits depend neither on its neighbours in the
            batch nor on the GPU's size, at the price of the balanced schedule
            (docs/sink_window_attention_sm90.md). None: as ``torch.are_deterministic_algorithms_enabled()``.
            Other backends always behave as with True.
        kv_bias: float32 ``[T]`` or ``[B, T]`` on the device of q, added to the logits of a key: the logarithm
            of a factor on its weight. ``-inf`` hides a key; NaN and ``inf`` give NaN. Not with
            ``chunk_ends``, and without a gradient of its own.

    Returns:
        ``out [B, Nq, Hq, Dv]``, contiguous, in the dtype of q; with ``return_lse`` also ``lse [B, Hq, Nq]``,
        natural logarithm, float32 (float64 for float64 inputs).

    Gradients flow to q, k and v in both modes (once: the backward is not differentiable). The LSE is not
    differentiable. Nothing is mutated; the output never aliases an input. The result of a sample does not
    depend on its neighbours in the batch (on Hopper: with ``deterministic``), nor on the number of threads.

    Raises:
        ArgumentError: a wrong shape, dtype, device, stride, count or range, before anything is computed.

    Source: Reward Forcing (arXiv 2512.04678), EMA-Sink attention of section 3; the merge of two key sets by
    their LSE is that of FlashAttention-2 (arXiv 2307.08691, section 3.1).
    """
    if softmax_scale is None:
        dim = q.size(-1) if isinstance(q, torch.Tensor) and q.dim() > 0 else 0
        softmax_scale = dim**-0.5 if dim > 0 else 1.0
    rows = None
    if isinstance(kv_tokens, torch.Tensor) and kv_tokens.dim() > 0:
        if kv_tokens.dtype == torch.int32:
            rows, kv_tokens = kv_tokens, None
            # The operator's own check of devices would name its own argument.
            if isinstance(q, torch.Tensor) and rows.device != q.device:
                raise argument_error(_OP, "kv_tokens", f"a tensor on {q.device}", rows.device)
        elif kv_tokens.numel() != 1:
            expected = "an integer, or an int32 tensor [B] with the valid tokens of each row"
            raise argument_error(_OP, "kv_tokens", expected, f"{kv_tokens.dtype} {list(kv_tokens.shape)}")
    if kv_bias is not None:
        refuse_grad(_OP, "the op has no gradient for it", kv_bias=kv_bias)
    out, lse = invoke(
        ops.sink_window_attention.default,
        q,
        k,
        v,
        None if kv_tokens is None else integer(_OP, "kv_tokens", kv_tokens),
        number(_OP, "softmax_scale", softmax_scale),
        None if chunk_ends is None else integers(_OP, "chunk_ends", chunk_ends),
        integer(_OP, "num_sink_tokens", num_sink_tokens),
        None if num_window_tokens is None else integer(_OP, "num_window_tokens", num_window_tokens),
        torch.are_deterministic_algorithms_enabled()
        if deterministic is None
        else flag(_OP, "deterministic", deterministic),
        rows,
        kv_bias,
    )
    return (out, lse) if return_lse else out


def _lse_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@register_fake("sink_window_attention")
def _fake(q, k, v, *options):
    batch, queries, heads, _ = q.shape
    out = q.new_empty((batch, queries, heads, v.shape[3]))
    return out, q.new_empty((batch, heads, queries), dtype=_lse_dtype(q.dtype))


@register_fake("sink_window_attention_backward", op=_OP)
def _fake_backward(grad_out, q, k, v, out, lse, *options):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    q, k, v, *ctx.options, _deterministic, rows, bias = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, rows, bias)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, _grad_lse):
    options = (len(ctx.options) + 3) * (None,)
    if grad_out is None:
        return None, None, None, *options
    *tensors, rows, bias = ctx.saved_tensors
    grads = ops.sink_window_attention_backward(grad_out, *tensors, *ctx.options, rows, bias)
    return *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)), *options


torch.library.register_autograd("rf_kernels::sink_window_attention", _backward, setup_context=_setup_context)


def _refuse_double_backward(ctx, *grads):
    raise NotImplementedError(
        "rf_kernels.sink_window_attention: its gradient is not differentiable (no double backward)"
    )


# Without it, a second derivative would be taken through the op's internals, and be wrong.
torch.library.register_autograd("rf_kernels::sink_window_attention_backward", _refuse_double_backward)


def _flops(q, k, v, kv_tokens, chunk_ends, num_sink_tokens, num_window_tokens) -> int:
    """Of the two matrix products over the visible (query, key) pairs, 2 per multiply-add. q, k, v: shapes.
    Rows of their own count as full: the counter shows no values."""
    batch, queries, heads, dim = q
    if chunk_ends is None:
        pairs = queries * (k[1] if kv_tokens is None else kv_tokens)
    else:
        pairs = begin = 0
        for end in chunk_ends:
            sink_end = min(num_sink_tokens, end)
            oldest = 0 if num_window_tokens is None else end - num_window_tokens
            pairs += (end - begin) * (sink_end + end - max(sink_end, oldest))
            begin = end
    return 2 * batch * heads * (dim + v[3]) * pairs


def _register_flops(counter) -> None:
    """For FlopCounterMode. Five products in the backward, as PyTorch counts its own attention."""

    @counter.register_flop_formula(ops.sink_window_attention)
    def forward(q, k, v, kv_tokens, scale, ends, sink_tokens, window_tokens, *_, out_shape=None, **__) -> int:
        return _flops(q, k, v, kv_tokens, ends, sink_tokens, window_tokens)

    @counter.register_flop_formula(ops.sink_window_attention_backward)
    def backward(
        grad, q, k, v, out, lse, kv_tokens, scale, ends, sink_tokens, window_tokens, *_, out_shape=None
    ) -> int:
        return _flops(q, k, v, kv_tokens, ends, sink_tokens, window_tokens) * 5 // 2


when_imported("torch.utils.flop_counter", _register_flops)
