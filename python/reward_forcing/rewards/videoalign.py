"""Motion quality by VideoAlign's VideoReward (arXiv 2501.13918): a Qwen2-VL that reads a video and the text
it was made from, and answers in one number at each of three tokens of the question.

    MQ = (<w, h> - mean) / std        h: last hidden state at <|MQ_reward|>, w: a row of ``rm_head``

Two folders hold it: the checkpoint (``model_config.json``, ``checkpoint-11352/model.pth``: LoRA layers inside
the whole model), and the model that it was tuned from (Qwen2-VL-2B-Instruct: configuration and tokenizer; its
weights are read for a checkpoint of adapters alone). Needs transformers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .._check import expect, installed
from ..checkpoint import CheckpointError, check_state, read_tensors
from .videoalign_prompt import QUESTION, TOKENS

_WHO = "VideoAlign"
_SAMPLING = ("every_frame", "by_rate")
_VIDEO = "<|video_pad|>"


class VideoAlign:
    """The motion quality of clips.

    Positions in the text model count tokens: the reward model was trained without the three-dimensional
    positions that Qwen2-VL gives to videos. The text of the prompt stands after the mark of motion quality in
    the published question, and attention is causal: this score does not depend on it.

    Args:
        checkpoint: folder with ``model_config.json`` and ``checkpoint-<step>/`` (the highest step is read):
            ``model.pth``, or ``adapter_model.safetensors`` beside ``non_lora_state_dict.pth``.
        base: folder of Qwen2-VL-2B-Instruct.
        sampling: "every_frame", at 336 x 588, as Reward Forcing trains; or "by_rate", as VideoAlign samples a
            file: ``fps`` and ``max_frame_pixels`` of the checkpoint's ``data_config``.
        video_fps: frames per second of the clips, for "by_rate".
        dtype, device: of the model. Published: bfloat16.

    Raises:
        rf_kernels.ArgumentError: a file that is missing, cannot be read, or holds another model.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        base: str | Path,
        *,
        sampling: str = "every_frame",
        video_fps: float = 16.0,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ):
        expect(sampling in _SAMPLING, _WHO, "sampling", f"one of {_SAMPLING}", repr(sampling))
        expect(video_fps > 0, _WHO, "video_fps", "above 0", video_fps)
        transformers = installed("transformers", _WHO, "integrations")
        self.sampling, self.video_fps = sampling, video_fps
        self.settings = Settings.read(Path(checkpoint))
        try:
            config = transformers.AutoConfig.from_pretrained(base)
            tokenizer = transformers.AutoTokenizer.from_pretrained(base)
            self._mean, self._std = _normalisation(Path(base))
        except (OSError, ValueError, KeyError) as error:
            expect(False, _WHO, "base", "a folder of Qwen2-VL-2B-Instruct", _line(error))
        found = config.model_type
        expect(found == "qwen2_vl", _WHO, "base", "a folder of Qwen2-VL-2B-Instruct", f"{base}: {found}")
        tokenizer.add_tokens(list(TOKENS), special_tokens=True)
        self.tokenizer = tokenizer
        self._reward_token, self._video_token = tokenizer.convert_tokens_to_ids([TOKENS[1], _VIDEO])
        try:
            self.model, self.head = self._load(transformers, Path(checkpoint), base, config)
        except (CheckpointError, OSError) as error:
            expect(False, _WHO, "checkpoint", "a whole VideoReward checkpoint", _line(error))
        self.model = self.model.to(device, dtype).eval().requires_grad_(False)
        self.head = self.head.to(device, torch.promote_types(dtype, torch.float32))

    def _load(self, transformers, checkpoint: Path, base: str | Path, config):
        state = _weights(checkpoint, self.settings, lambda: _base_weights(transformers, base))
        head = state.pop("rm_head.weight", None)
        width, outputs = config.text_config.hidden_size, self.settings.outputs
        shape = None if head is None else tuple(head.shape)
        expect(shape == (outputs, width), _WHO, "checkpoint", f"rm_head.weight {(outputs, width)}", shape)
        rows = state.get(_EMBEDDING, torch.empty(0)).shape[0]
        tokens = f"{len(self.tokenizer)} embeddings, one a token and three for the reward"
        expect(rows == len(self.tokenizer), _WHO, "checkpoint", tokens, rows)
        config.text_config.vocab_size = rows
        with torch.device("meta"):
            check_state(state, transformers.Qwen2VLModel(config), str(checkpoint))
        model = transformers.Qwen2VLModel.from_pretrained(None, config=config, state_dict=state)
        # One row for all three tokens, or a row each: visual quality, motion, text.
        return model, head[1 if outputs == 3 else 0]

    @torch.no_grad()
    def __call__(self, frames: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores ``[B]``, float32, of frames ``[B, F, 3, H, W]`` in [-1, 1] and their texts."""
        expect(frames.shape[1] >= 2, _WHO, "frames", "at least 2 frames", frames.shape[1])
        scores = [self._score(clip, text) for clip, text in zip(frames, prompts, strict=True)]
        return (torch.stack(scores) - self.settings.mean) / self.settings.std

    def _score(self, clip: Tensor, prompt: str) -> Tensor:
        vision = self.model.config.vision_config
        patches, grid = to_patches(self._sampled(clip), self._mean, self._std, vision)
        ids = self._tokens(prompt, math.prod(grid) // vision.spatial_merge_size**2).to(patches.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
        hidden = self.model(
            input_ids=ids,
            pixel_values_videos=patches,
            video_grid_thw=torch.tensor([grid], device=ids.device),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        return hidden[ids == self._reward_token][0].to(self.head) @ self.head

    def _sampled(self, clip: Tensor) -> Tensor:
        """The frames that the model sees, in 0..255."""
        clip = (clip.detach().to(self.head) + 1) * 127.5
        if self.sampling == "every_frame":
            return resize(clip, (336, 588))
        settings, (count, _, *size) = self.settings, clip.shape
        kept = frame_count(count, self.video_fps, settings.fps, settings.num_frames)
        index = torch.linspace(0, count - 1, kept).round().long()
        clip = clip[index.to(clip.device)].clamp(0, 255).round()  # a file has bytes
        return resize(clip, frame_size(*size, most=settings.max_frame_pixels)).clamp(0, 255).round()

    def _tokens(self, prompt: str, count: int) -> Tensor:
        """Token ids ``[1, n]`` of the question, with ``count`` places for the video."""
        marks = [mark for mark in self.tokenizer.added_tokens_encoder if mark in prompt]
        found = f"{marks[:1]} in {prompt!r:.60}"
        expect(not marks, _WHO, "prompts", "texts without the model's own marks", found)
        question = QUESTION.format(text_prompt=prompt)
        content = [{"type": "video", "video": ""}, {"type": "text", "text": question}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        text = text.replace(_VIDEO, _VIDEO * count)
        return self.tokenizer(text, return_tensors="pt").input_ids


# ---- frames ------------------------------------------------------------------------------------------------
def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames ``[F, 3, H, W]`` at another size, bicubic with antialiasing."""
    return F.interpolate(frames, size, mode="bicubic", antialias=True, align_corners=False)


def frame_count(total: int, video_fps: float, fps: float, num_frames: int | None) -> int:
    """How many of ``total`` frames VideoAlign keeps: an even number, at a rate of ``fps`` (4 to 768), or
    ``num_frames``."""
    if num_frames is None:
        wanted = min(max(total / video_fps * fps, 4), 2 * (min(768, total) // 2))
    else:
        wanted = min(num_frames, total)
    return min(2 * round(wanted / 2), total)


def frame_size(
    height: int, width: int, *, most: int, least: int = 128 * 28**2, factor: int = 28
) -> tuple[int, int]:
    """Multiples of ``factor`` near to a size, of ``least`` to ``most`` pixels."""
    h, w = (max(factor, round(n / factor) * factor) for n in (height, width))
    if h * w > most:
        scale = math.sqrt(height * width / most)
        return tuple(max(factor, math.floor(n / scale / factor) * factor) for n in (height, width))
    if h * w < least:
        scale = math.sqrt(least / (height * width))
        return tuple(math.ceil(n * scale / factor) * factor for n in (height, width))
    return h, w


def to_patches(frames: Tensor, mean: Sequence[float], std: Sequence[float], vision) -> tuple[Tensor, tuple]:
    """Frames ``[F, 3, H, W]`` in 0..255 as Qwen2-VL's patches ``[n, 3 * temporal * patch * patch]``, those of
    one token side by side, and their grid (frames, rows, columns)."""
    span, p, m = vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
    shape = (1, -1, 1, 1)
    x = (frames / 255 - frames.new_tensor(mean).view(shape)) / frames.new_tensor(std).view(shape)
    x = torch.cat([x, x[-1:].expand(-len(x) % span, -1, -1, -1)])
    grid = (len(x) // span, x.shape[2] // p, x.shape[3] // p)
    x = x.view(grid[0], span, 3, grid[1] // m, m, p, grid[2] // m, m, p)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(math.prod(grid), -1), grid


# ---- files -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Settings:
    """What ``model_config.json`` says of reading the checkpoint and of scoring."""

    outputs: int
    lora_scale: float
    mean: float
    std: float
    fps: float
    num_frames: int | None
    max_frame_pixels: int

    @classmethod
    def read(cls, folder: Path) -> Settings:
        path = folder / "model_config.json"
        try:
            values = json.loads(path.read_text())
            data, model, lora = (values[f"{name}_config"] for name in ("data", "model", "peft_lora"))
            norm = values.get("inference_config") or {"MQ_mean": 0.0, "MQ_std": 1.0}
            rank = math.sqrt(lora["lora_r"]) if lora.get("use_rslora") else lora["lora_r"]
            settings = cls(
                outputs=int(model["output_dim"]),
                lora_scale=lora["lora_alpha"] / rank,
                mean=float(norm["MQ_mean"]),
                std=float(norm["MQ_std"]),
                fps=float(data["fps"]),
                num_frames=data.get("num_frames"),
                max_frame_pixels=int(data["max_frame_pixels"]),
            )
            served = {
                "prompt_template_type": (data["prompt_template_type"], ("detailed_special",)),
                "use_special_tokens": (model["use_special_tokens"], (True,)),
                "output_dim": (settings.outputs, (1, 3)),
                "sample_type": (data.get("sample_type", "uniform"), ("uniform",)),
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            expected = "a folder with VideoReward's model_config.json"
            expect(False, _WHO, "checkpoint", expected, f"{path}: {type(error).__name__}: {_line(error)}")
        for name, (value, allowed) in served.items():
            expect(value in allowed, _WHO, "checkpoint", f"{name} of {allowed} in {path.name}", repr(value))
        expect(settings.std > 0, _WHO, "checkpoint", "MQ_std above 0", settings.std)
        return settings


_EMBEDDING = "language_model.embed_tokens.weight"
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


def _weights(checkpoint: Path, settings: Settings, base) -> dict[str, Tensor]:
    """Parameters under the names of ``transformers.Qwen2VLModel``, LoRA merged, and ``rm_head.weight``."""
    steps = {int(p.name[11:]): p for p in checkpoint.glob("checkpoint-*") if p.name[11:].isdigit()}
    expect(bool(steps), _WHO, "checkpoint", "a folder with checkpoint-<step>/", str(checkpoint))
    folder = steps[max(steps)]
    if (folder / "model.pth").exists():
        return _merged(read_tensors(folder / "model.pth"), {}, settings.lora_scale, folder)
    tensors = {}
    for name in ("non_lora_state_dict.pth", "adapter_model.safetensors"):
        found = f"{folder}, without {name}"
        whole = "model.pth, or adapter_model.safetensors and non_lora_state_dict.pth"
        expect((folder / name).exists(), _WHO, "checkpoint", whole, found)
        tensors |= read_tensors(folder / name)
    return _merged(tensors, base(), settings.lora_scale, folder)


def _base_weights(transformers, base: str | Path) -> dict[str, Tensor]:
    try:
        return transformers.Qwen2VLModel.from_pretrained(base).state_dict()
    except (OSError, ValueError) as error:
        expect(False, _WHO, "base", "a folder with the weights of Qwen2-VL-2B-Instruct", _line(error))


def _merged(tensors: Mapping[str, Tensor], base: dict[str, Tensor], scale: float, folder: Path) -> dict:
    """``base`` with the tensors laid over it, and ``W + scale B A`` where there is a pair of LoRA."""
    state, pairs = dict(base), {}
    for name, tensor in tensors.items():
        name = _published(name)
        if (match := _LORA.fullmatch(name)) is not None:
            pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = tensor
        elif not name.startswith("lm_head.") and ".original_module." not in name:
            state[name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = tensor
    for name, pair in pairs.items():
        fits = pair.keys() == {"A", "B"} and name in state
        fits = fits and (pair["B"].shape[0], pair["A"].shape[1]) == tuple(state[name].shape)
        fits = fits and pair["B"].shape[1] == pair["A"].shape[0]
        if not fits:
            raise CheckpointError(f"{folder}: no pair of LoRA that fits {name}")
        update = pair["B"].float() @ pair["A"].float()
        state[name] = (state[name].float() + scale * update).to(state[name].dtype)
    return state


def _published(name: str) -> str:
    """A parameter's name in ``transformers.Qwen2VLModel``, from those of older releases inside PEFT's."""
    name = name.removeprefix("base_model.model.")
    inside = name.removeprefix("model.")
    if inside.startswith(("visual.", "language_model.")):
        return inside
    return name if inside == name else f"language_model.{inside}"


def _normalisation(base: Path) -> tuple[list[float], list[float]]:
    """Mean and deviation of the pixels' channels."""
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        if (base / name).exists():
            values = json.loads((base / name).read_text())
            return values["image_mean"], values["image_std"]
    raise OSError(f"{base}: no preprocessor_config.json")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
