"""Oracle of ``sink_window_attention``: explicit softmax over an explicit list of keys, in the precision of
its inputs."""

import torch


def _attend(q, k, v, softmax_scale, bias=None):
    """``softmax(softmax_scale * q k^T + bias) v`` and the natural-log log-sum-exp, of q [B, n, Hq, D], k
    [B, m, Hkv, D], v [B, m, Hkv, Dv], and bias [m] or [B, m]."""
    batch, n, heads, dim = q.shape
    if k.shape[1] == 0:
        return q.new_zeros((batch, n, heads, v.shape[3])), q.new_full((batch, heads, n), float("-inf"))
    group = heads // k.shape[2] if heads else 1
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    if bias is not None:
        logits = logits + bias.to(logits.dtype).expand(batch, -1)[:, None, None]
    # A query whose logits are all -inf has an empty sum: out = 0, lse = -inf, and no gradient.
    sees = (logits > float("-inf")).any(-1) | logits.isnan().any(-1)
    weights = torch.softmax(logits.masked_fill(~sees[..., None], 0.0), dim=-1).masked_fill(
        ~sees[..., None], 0.0
    )
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    return out, torch.logsumexp(logits, dim=-1)


def visible_keys(t_end, num_sink_tokens, num_window_tokens):
    """Indices of the keys that the chunk ending at token ``t_end`` sees: the sink, then the newest tokens of
    the rest."""
    keys = range(t_end)
    oldest = 0 if num_window_tokens is None else t_end - num_window_tokens
    return [i for i in keys if i < num_sink_tokens or i >= oldest]


def sink_window_attention(
    q,
    k,
    v,
    *,
    kv_tokens=None,
    softmax_scale=None,
    return_lse=False,
    chunk_ends=None,
    num_sink_tokens=0,
    num_window_tokens=None,
    kv_bias=None,
):
    """``rf_kernels.sink_window_attention`` in plain PyTorch (differentiable; the LSE in the dtype of q).

    Dense prefix: every query attends to tokens ``[0, kv_tokens)``, those of sample ``b`` to ``[0,
    kv_tokens[b])`` if ``kv_tokens`` is a tensor ``[B]``. Whole sequence (``chunk_ends``): the
    queries of the chunk that ends at ``t_end`` attend to ``[0, min(S, t_end))`` and ``[max(S, t_end - W),
    t_end)``. ``kv_bias`` ``[T]`` or ``[B, T]`` is added to the logits of a key (dense prefix).
    """
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    if chunk_ends is None:
        kv_tokens = k.shape[1] if kv_tokens is None else kv_tokens
        if isinstance(kv_tokens, torch.Tensor) and kv_tokens.dim() == 1:
            rows = [
                _attend(
                    *(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], softmax_scale),
                    None if kv_bias is None else kv_bias.expand(len(q), -1)[b : b + 1, :n],
                )
                for b, n in enumerate(kv_tokens.tolist())
            ]
            # An empty batch keeps its shape.
            rows.append(_attend(q[:0], k[:0], v[:0], softmax_scale))
            out, lse = (torch.cat(parts) for parts in zip(*rows, strict=True))
        else:
            bias = None if kv_bias is None else kv_bias[..., :kv_tokens]
            out, lse = _attend(q, k[:, :kv_tokens], v[:, :kv_tokens], softmax_scale, bias)
    else:
        outs, lses, begin = (
            [q.new_zeros((len(q), 0, q.shape[2], v.shape[3]))],
            [q[:, :0, :, 0].transpose(1, 2)],
            0,
        )
        for t_end in chunk_ends:
            keys = visible_keys(t_end, num_sink_tokens, num_window_tokens)
            out, lse = _attend(q[:, begin:t_end], k[:, keys], v[:, keys], softmax_scale)
            outs.append(out)
            lses.append(lse)
            begin = t_end
        out, lse = torch.cat(outs, dim=1), torch.cat(lses, dim=2)
    return (out, lse) if return_lse else out
