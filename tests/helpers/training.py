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

#: The published file, names of machines apart.
PUBLISHED = """
generator_ckpt: checkpoints/ode_init.pt
generator_fsdp_wrap_strategy: size
real_name: Wan2.1-T2V-14B
fake_name: Wan2.1-T2V-1.3B
denoising_step_list: [1000, 750, 500, 250]
warp_denoising_step: true
ts_schedule: false
num_train_timestep: 1000
timestep_shift: 5.0
guidance_scale: 3.0
denoising_loss_type: flow
mixed_precision: true
seed: 0
sharding_strategy: hybrid_full
lr: 2.0e-06
lr_critic: 4.0e-07
beta1: 0.0
beta2: 0.999
beta1_critic: 0.0
beta2_critic: 0.999
data_path: prompts/vidprom_filtered_extended.txt
batch_size: 1
ema_weight: 0.99
ema_start_step: 200
gradient_accumulation_steps: 8
log_iters: 600
negative_prompt: 静态
dfake_gen_update_ratio: 5
image_or_video_shape: [1, 21, 16, 60, 104]
distribution_loss: rewardeddmd
trainer: rewarded_distillation
gradient_checkpointing: true
full_training_steps: 601
num_frame_per_block: 3
load_raw_video: false
beta: 2.0
model_kwargs: {timestep_shift: 5.0, local_attn_size: 9, sink_size: 3}
checkpoint_path: checkpoints
"""


def torchrun(*arguments: str, ranks: int = 2) -> list[str]:
    """The command that starts a script, or ``-m module``, on so many ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, *arguments]
