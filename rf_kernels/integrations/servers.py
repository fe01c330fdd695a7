"""Slots of other software into which this library's attention goes without a patch of theirs.

A slot replaces the attention alone. The gain of the cache (no rolling, keys rotated once) needs the
self-attention module: ``integrations.wan`` and ``integrations.diffusers``.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .._backend import argument_error, ops
from ..ops.sink_window_attention import sink_window_attention

_OP = "integrations.servers"


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """``[B, S, H, D]``; whatever strides they have: views are not copied."""
    return sink_window_attention(query, key, value, kv_tokens=key.shape[1], softmax_scale=scale)


def _refuse(slot: str, **wanted) -> None:
    for name, (ok, expected, found) in wanted.items():
        if not ok:
            raise argument_error(f"{_OP}.{slot}", name, expected, found)


# ---- PyTorch -----------------------------------------------------------------------------------------------
class _Handle:
    """Keeps the registration; ``remove`` ends it."""

    def __init__(self, library: torch.library.Library):
        self.library: torch.library.Library | None = library

    def remove(self) -> None:
        if self.library is not None:
            self.library._destroy()
            self.library = None


def register_with_torch(name: str = "RF", *, dispatch_key: str = "CUDA") -> None:
    """Make the library selectable as PyTorch's flash attention:

        register_with_torch()
        torch.nn.attention.activate_flash_attention_impl("RF")

    Every model that calls SDPA, and for which SDPA takes flash attention, then runs on
    ``sink_window_attention``, gradients included. Dropout and causal masks raise. Nothing is activated here.

    Args:
        dispatch_key: of the tensors that it serves.
    """
    from torch.nn import attention

    if not hasattr(attention, "register_flash_attention_impl"):
        _refuse("register_with_torch", torch=(False, "PyTorch 2.13 or newer", torch.__version__))

    def register() -> _Handle:
        library = torch.library.Library("aten", "IMPL")
        library.impl("_scaled_dot_product_flash_attention", _sdpa_forward, dispatch_key)
        library.impl("_scaled_dot_product_flash_attention_backward", _sdpa_backward, dispatch_key)
        return _Handle(library)

    attention.register_flash_attention_impl(name, register_fn=register)


def _sdpa_forward(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    _refuse(
        "register_with_torch",
        dropout_p=(dropout_p == 0, "0", dropout_p),
        is_causal=(not is_causal, "False", is_causal),
        return_debug_mask=(not return_debug_mask, "False", return_debug_mask),
    )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = sink_window_attention(q, k, v, kv_tokens=k.shape[1], softmax_scale=scale, return_lse=True)
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
    offset = torch.zeros((), dtype=torch.uint64, device=query.device)
    debug = query.new_empty(0)
    return out.transpose(1, 2), lse, None, None, query.shape[2], key.shape[2], seed, offset, debug


def _sdpa_backward(grad_out, query, key, value, out, logsumexp, *_, scale=None):
    # The rest of PyTorch's schema: lengths, which the tensors have, and dropout, which the forward refuses.
    q, k, v, o, g = (x.transpose(1, 2) for x in (query, key, value, out, grad_out))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    grads = ops.sink_window_attention_backward(
        g.contiguous(), q, k, v, o.contiguous(), logsumexp, k.shape[1], scale, None, 0, None
    )
    return tuple(x.transpose(1, 2) for x in grads)


# ---- vLLM-Omni ---------------------------------------------------------------------------------------------
def vllm_omni_attention(
    query: Tensor, key: Tensor, value: Tensor, params: dict, is_causal: bool, softmax_scale: float
) -> Tensor:
    """Entry point of the group ``vllm_omni.sparse_attn``: dense attention of ``[B, S, H, D]``."""
    _refuse("vllm_omni_attention", is_causal=(not is_causal, "False", is_causal))
    return _dense(query, key, value, softmax_scale)


vllm_omni_attention.capabilities = {"supports_attention_mask": False}


# ---- LightX2V ----------------------------------------------------------------------------------------------
def register_with_lightx2v(name: str = "rf_attn") -> type:
    """Add an attention to LightX2V's registry, for ``"self_attn_1_type": "rf_attn"`` in its configuration.
    Returns the class."""
    from lightx2v.common.ops.attn.template import AttnWeightTemplate
    from lightx2v.utils.registry_factory import ATTN_WEIGHT_REGISTER

    @ATTN_WEIGHT_REGISTER(name)
    class SinkWindowAttnWeight(AttnWeightTemplate):
        def __init__(self):
            self.config = {}

        def apply(
            self, q, k, v, cu_seqlens_q=None, cu_seqlens_kv=None, max_seqlen_q=None, max_seqlen_kv=None, **_
        ):
            """``[tokens, H, D]`` or ``[B, S, H, D]`` -> ``[tokens, H * D]``; one length for all samples."""
            if q.dim() == 3:
                lengths = {"q": (q, max_seqlen_q), "k": (k, max_seqlen_kv), "v": (v, max_seqlen_kv)}
                for what, (x, longest) in lengths.items():
                    fits = longest is None or (longest > 0 and x.shape[0] % longest == 0)
                    _refuse("lightx2v", **{what: (fits, f"samples of {longest} tokens", tuple(x.shape))})
                q, k, v = (x.unflatten(0, (-1, longest or x.shape[0])) for x, longest in lengths.values())
            return _dense(q, k, v, None).flatten(2).flatten(0, 1)

    return SinkWindowAttnWeight


# ---- SGLang diffusion --------------------------------------------------------------------------------------
def sglang_plugin() -> None:
    """Entry point of the group ``sglang.multimodal_gen.plugins``. Does nothing unless ``RF_SGLANG=1``: then
    the platform's choice of a flash attention becomes ``SGLangBackend``."""
    if os.environ.get("RF_SGLANG") != "1":
        return
    from sglang.multimodal_gen.runtime.plugins.hook_registry import HookRegistry, HookType

    target = "sglang.multimodal_gen.runtime.platforms.cuda.CudaPlatformBase.get_attn_backend_cls_str"
    HookRegistry.register(target, _sglang_choice, HookType.AROUND)


def _sglang_choice(original, *args, **kwargs) -> str:
    chosen = original(*args, **kwargs)
    return f"{__name__}.SGLangBackend" if "flash" in chosen.lower() else chosen


class SGLangImpl:
    """Attention of one layer: ``[B, S, H, D]``."""

    def __init__(self, num_heads, head_size, softmax_scale, causal=False, num_kv_heads=None, prefix="", **_):
        _refuse("sglang", causal=(not causal, "False", causal))
        self.scale = softmax_scale

    def preprocess_qkv(self, qkv, attn_metadata):
        return qkv

    def postprocess_output(self, output, attn_metadata):
        return output

    def forward(self, query, key, value, attn_metadata=None, **_):
        return _dense(query, key, value, self.scale)


class SGLangBackend:
    """What SGLang asks an attention backend for."""

    accept_output_buffer = True

    @staticmethod
    def get_enum():
        from sglang.multimodal_gen.runtime.platforms import AttentionBackendEnum

        return AttentionBackendEnum.FA

    @staticmethod
    def get_impl_cls():
        return SGLangImpl

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        return [32, 64, 96, 128, 256]
