"""Streaming generation."""

from .phases import Phase
from .streaming import Chunk, StreamingPipeline, chunk_lengths

__all__ = ["Chunk", "Phase", "StreamingPipeline", "chunk_lengths"]
