"""The published path of Reward Forcing (arXiv 2512.04678) in plain PyTorch: what results are compared with,
and timed against.

It reproduces the published behaviour for any dtype, unintended behaviour included; docstrings mark that as
"Published quirk". Nothing is fast on purpose: the cache is rolled by cloning, sink and window are
concatenated, keys are rotated in complex128 at every call.

rope: rotary embedding. attention: KV cache with the EMA sink, self- and cross-attention. model: causal and
bidirectional Wan transformers under the official parameter names. scheduler: flow matching. pipeline:
inference and training rollouts. losses: Re-DMD, DMD, critic, SiD. Section numbers in docstrings refer to
tests/golden/README.md.
"""

from .attention import (
    CrossAttentionCache,
    EMASinkKVCache,
    RMSNorm,
    cached_attention,
    read_window,
    sdpa_attention,
    softmax_attention,
)
from .losses import critic_flow_loss, dmd_gradient, dmd_loss, guide, noisy_latent, re_dmd_loss, sid_loss
from .model import BidirectionalWanModel, CausalWanModel, RolloutCaches, WanConfig
from .pipeline import (
    Generator,
    GeneratorCall,
    TrainingRollout,
    denoising_steps,
    inference_chunk,
    inference_rollout,
    training_rollout,
)
from .rope import axis_pairs, rope_apply, rope_table
from .scheduler import FlowMatchScheduler, score_timestep

__all__ = [
    "BidirectionalWanModel",
    "CausalWanModel",
    "CrossAttentionCache",
    "EMASinkKVCache",
    "FlowMatchScheduler",
    "Generator",
    "GeneratorCall",
    "RMSNorm",
    "RolloutCaches",
    "TrainingRollout",
    "WanConfig",
    "axis_pairs",
    "cached_attention",
    "critic_flow_loss",
    "denoising_steps",
    "dmd_gradient",
    "dmd_loss",
    "guide",
    "inference_chunk",
    "inference_rollout",
    "noisy_latent",
    "re_dmd_loss",
    "read_window",
    "rope_apply",
    "rope_table",
    "score_timestep",
    "sdpa_attention",
    "sid_loss",
    "softmax_attention",
    "training_rollout",
]
