"""Small training runs, and what starts them on several ranks."""

import os
import sys
from dataclasses import replace
from pathlib import Path

from reward_forcing.config import ModelConfig, StreamConfig
from reward_forcing.trainer import DistillConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}

TINY = ModelConfig(
    dim=32, ffn_dim=64, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=3, freq_dim=16
)
WORLD = replace(TINY, in_dim=8, out_dim=8, text_dim=32)
STREAM = StreamConfig(chunk_frames=3, sink_frames=3, local_attn_size=9, alpha=0.9, shift=2.0)
TEACHER = TrainConfig("teacher", WORLD, frames=4, batch=4, steps=5, stream=STREAM, seed=3)
CAUSAL = replace(TEACHER, stage="causal", frames=12)
ODE = replace(TEACHER, stage="ode", frames=12, batch=2, teacher_steps=3)
DISTILL = TrainConfig(
    "distill",
    WORLD,
    frames=6,
    batch=2,
    steps=3,
    stream=replace(STREAM, local_attn_size=6, denoising_step_list=(1000, 500)),
    distill=DistillConfig(critic_steps=2, real_guidance=1.0, shift=2.0),
)


def torchrun(*arguments: str, ranks: int = 2) -> list[str]:
    """The command that starts a script, or ``-m module``, on so many ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, *arguments]
