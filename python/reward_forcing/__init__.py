"""reward_forcing: the thin PyTorch layer over rf_kernels. Models, scheduler, streaming pipeline, losses,
checkpoints.

Every size comes from the configuration; all attention, caching, rotation and distillation arithmetic is
rf_kernels'.
"""

import importlib

#: The public names of each module, imported when they are asked for: the command line answers before PyTorch
#: is loaded.
_NAMES = {
    "checkpoint": "CheckpointError infer_config load_bidirectional_model load_causal_model read_checkpoint",
    "config": "ModelConfig StreamConfig",
    "models": "BidirectionalWanModel CausalWanModel FlowPredictor",
    "pipeline": "Chunk Phase StreamingPipeline",
    "scheduler": "FlowMatchScheduler",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
