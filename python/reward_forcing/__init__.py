"""reward_forcing: the thin PyTorch layer over rf_kernels. Models, scheduler, streaming pipeline, losses, checkpoints.

Every size comes from the configuration; all attention, caching, rotation and distillation arithmetic is rf_kernels'.
"""

from .checkpoint import (
    CheckpointError,
    infer_config,
    load_bidirectional_model,
    load_causal_model,
    read_checkpoint,
)
from .config import ModelConfig, StreamConfig
from .models import BidirectionalWanModel, CausalWanModel, FlowPredictor
from .pipeline import Chunk, Phase, StreamingPipeline
from .scheduler import FlowMatchScheduler

__all__ = [
    "BidirectionalWanModel",
    "CausalWanModel",
    "CheckpointError",
    "Chunk",
    "FlowMatchScheduler",
    "FlowPredictor",
    "ModelConfig",
    "Phase",
    "StreamConfig",
    "StreamingPipeline",
    "infer_config",
    "load_bidirectional_model",
    "load_causal_model",
    "read_checkpoint",
]
