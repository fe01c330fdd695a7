"""Oracles in plain PyTorch: one module per op, and the published path under ``published``. Imports torch
only."""
