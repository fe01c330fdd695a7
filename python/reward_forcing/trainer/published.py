"""The published training file (reward_forcing.yaml), accepted as it is.

``python -m reward_forcing.trainer.published`` prints what each of its keys does here. What its trainer really
does differs from what the names suggest (601 loop steps hold 16 generator batches, each stepped twice, and
critic gradients pile up over eight micro-steps); that is not reproduced: here accumulation averages gradients
and steps once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._check import expect
from ..config import ModelConfig, StreamConfig
from .config import DistillConfig, OptimizerConfig, RewardConfig, TrainConfig, WanConfig, refuse_unknown

#: Every key of the file and of its defaults: what it does here.
KEYS = {
    "distribution_loss": "the objective: rewardeddmd is re_dmd, dmd is dmd, sid is sid",
    "trainer": "not read: the objective says it",
    "beta": "distill.beta; the reward is VideoAlign's motion quality (reward.name: videoalign)",
    "guidance_scale": "distill.real_guidance, in the same convention c + s (c - u)",
    "dfake_gen_update_ratio": "distill.critic_steps",
    "denoising_step_list": "stream.denoising_step_list",
    "warp_denoising_step": "stream.warp",
    "num_train_timestep": "must be 1000",
    "timestep_shift": "stream.shift and distill.shift",
    "num_frame_per_block": "stream.chunk_frames",
    "independent_first_frame": "stream.independent_first_frame",
    "context_noise": "stream.context_noise",
    "model_kwargs": "local_attn_size and sink_size become the stream's; timestep_shift as above",
    "same_step_across_blocks": "distill.same_exit",
    "last_step_only": "must be false",
    "image_or_video_shape": "frames, latent channels and wan.latent; the batch of the shape is not read",
    "real_name": "the teacher, Wan2.1-T2V-14B or 1.3B: its architecture, and its folder in checkpoint_path",
    "fake_name": "the critic, Wan2.1-T2V-1.3B: its folder in checkpoint_path, and the student's architecture",
    "generator_ckpt": "generator",
    "lr": "optimizer.lr",
    "beta1": "optimizer.betas[0]",
    "beta2": "optimizer.betas[1]",
    "lr_critic": "distill.critic.lr",
    "beta1_critic": "distill.critic.betas[0]",
    "beta2_critic": "distill.critic.betas[1]",
    "weight_decay": "optimizer.weight_decay and distill.critic.weight_decay",
    "batch_size": "batch (per rank there, over all ranks here: multiply by your number of ranks)",
    "gradient_accumulation_steps": "accumulate",
    "full_training_steps": "steps: optimizer steps of the generator here, loop steps there",
    "ema_weight": "ema, from the first step on (there: from ema_start_step)",
    "ema_start_step": "not read",
    "seed": "seed",
    "denoising_loss_type": "must be flow",
    "ts_schedule": "must be false",
    "causal": "must be true",
    "i2v": "must be false",
    "gradient_checkpointing": "checkpointing",
    "mixed_precision": "compute: bfloat16 (on several ranks, or one of torchrun)",
    "sharding_strategy": "not read",
    "generator_fsdp_wrap_strategy": "not read",
    "real_score_fsdp_wrap_strategy": "not read",
    "fake_score_fsdp_wrap_strategy": "not read",
    "text_encoder_fsdp_wrap_strategy": "not read",
    "data_path": "prompts",
    "negative_prompt": "wan.negative_prompt",
    "load_raw_video": "not read",
    "discriminator_lr_multiplier": "not read",
    "log_iters": "save_every",
    "gc_interval": "not read",
    "wandb_host": "not read",
    "wandb_key": "not read",
    "wandb_entity": "not read",
    "wandb_project": "not read",
    "checkpoint_path": "the folder with Wan2.1-T2V-14B, Wan2.1-T2V-1.3B and VideoReward, and here also with"
    " Wan2.1-T2V-1.3B-Diffusers (wan.folder) and Qwen2-VL-2B-Instruct (reward.base)",
    "ckpt_step": "not read: a run resumes from its newest checkpoint",
    "prompt_name": "not read",
    "prompt_path": "not read",
    "eval_first_n": "not read",
    "num_samples": "not read",
    "height": "not read: image_or_video_shape says it",
    "width": "not read: image_or_video_shape says it",
    "num_frames": "not read: image_or_video_shape says it",
    "num_training_frames": "not read: image_or_video_shape says it",
}
_OBJECTIVES = {"rewardeddmd": "re_dmd", "dmd": "dmd", "sid": "sid"}
_TEACHERS = {"Wan2.1-T2V-1.3B": ModelConfig.wan_1_3b, "Wan2.1-T2V-14B": ModelConfig.wan_14b}
_FIXED = {
    "num_train_timestep": 1000,
    "denoising_loss_type": "flow",
    "ts_schedule": False,
    "last_step_only": False,
    "causal": True,
    "i2v": False,
    "fake_name": "Wan2.1-T2V-1.3B",
}


def is_published(values: Any) -> bool:
    """Whether a file is of the published kind."""
    return isinstance(values, Mapping) and "distribution_loss" in values


def from_published(values: Mapping[str, Any]) -> TrainConfig:
    """The run that the published file describes.

    Raises:
        rf_kernels.ArgumentError: a key that the file does not have, or a value that is not served here.
    """
    refuse_unknown("the published file", values, KEYS, "")
    for key, served in _FIXED.items():
        expect(
            values.get(key, served) == served, "the published file", key, repr(served), repr(values.get(key))
        )
    name = values["distribution_loss"]
    expect(
        name in _OBJECTIVES,
        "the published file",
        "distribution_loss",
        f"one of {list(_OBJECTIVES)}",
        repr(name),
    )
    teacher = values.get("real_name", "Wan2.1-T2V-1.3B")
    expect(
        teacher in _TEACHERS, "the published file", "real_name", f"one of {list(_TEACHERS)}", repr(teacher)
    )
    given = dict(values)
    model = given.get("model_kwargs", {})
    shift = float(given.get("timestep_shift", 5.0))
    _, frames, channels, *size = given.get("image_or_video_shape", (1, 21, 16, 60, 104))
    folder = given.get("checkpoint_path", "checkpoints")
    decay = float(given.get("weight_decay", 0.01))
    stream = StreamConfig(
        chunk_frames=given.get("num_frame_per_block", 3),
        sink_frames=model.get("sink_size", 3),
        local_attn_size=model.get("local_attn_size", 9),
        denoising_step_list=tuple(given.get("denoising_step_list", (1000, 750, 500, 250))),
        warp=given.get("warp_denoising_step", False),
        shift=shift,
        context_noise=float(given.get("context_noise", 0)),
        independent_first_frame=given.get("independent_first_frame", False),
    )
    distill = DistillConfig(
        objective=_OBJECTIVES[name],
        beta=float(given.get("beta", 2.0)),
        real_guidance=float(given.get("guidance_scale", 3.0)),
        critic=_optimizer(given, "_critic", decay),
        critic_steps=given.get("dfake_gen_update_ratio", 5),
        shift=shift,
        same_exit=given.get("same_step_across_blocks", True),
    )
    return TrainConfig(
        stage="distill",
        model=ModelConfig.wan_1_3b(in_dim=channels, out_dim=channels),
        teacher_model=_TEACHERS[teacher](in_dim=channels, out_dim=channels),
        compute="bfloat16" if given.get("mixed_precision", False) else "float32",
        frames=frames,
        batch=given.get("batch_size", 1),
        accumulate=given.get("gradient_accumulation_steps", 1),
        steps=given.get("full_training_steps", 601),
        seed=given.get("seed", 0),
        optimizer=_optimizer(given, "", decay),
        ema=float(given.get("ema_weight", 0.99)),
        stream=stream,
        distill=distill,
        reward=RewardConfig("videoalign", f"{folder}/VideoReward", f"{folder}/Qwen2-VL-2B-Instruct"),
        wan=WanConfig(
            f"{folder}/Wan2.1-T2V-1.3B-Diffusers",
            latent=tuple(size),
            negative_prompt=given.get("negative_prompt", ""),
        ),
        prompts=given.get("data_path", ""),
        teacher=f"{folder}/{teacher}",
        critic=f"{folder}/{given.get('fake_name', 'Wan2.1-T2V-1.3B')}",
        generator=given.get("generator_ckpt", ""),
        checkpointing=given.get("gradient_checkpointing", False),
        save_every=given.get("log_iters", 0),
    )


def _optimizer(values: Mapping[str, Any], suffix: str, decay: float) -> OptimizerConfig:
    betas = (float(values.get(f"beta1{suffix}", 0.0)), float(values.get(f"beta2{suffix}", 0.999)))
    return OptimizerConfig(lr=float(values[f"lr{suffix}"]), betas=betas, weight_decay=decay, clip=10.0)


if __name__ == "__main__":
    width = max(map(len, KEYS))
    print("\n".join(f"{key:{width}}  {meaning}" for key, meaning in KEYS.items()))
