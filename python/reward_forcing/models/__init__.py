"""Wan transformers over the ops of rf_kernels."""

from .bidirectional_wan import BidirectionalWanModel
from .causal_wan import CausalWanModel
from .flow_predictor import FlowPrediction, FlowPredictor

__all__ = ["BidirectionalWanModel", "CausalWanModel", "FlowPrediction", "FlowPredictor"]
