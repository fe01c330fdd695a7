"""VideoAlign's motion quality: small random weights in the published format, scored against a plain float64
computation that keeps LoRA apart, and against upstream's own code where `RF_UPSTREAM_DIR` has it."""

import ast
import hashlib
import importlib.util
import json
import os
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rf_kernels as rf
from helpers import qwen_case
from reward_forcing.rewards import scores
from reward_forcing.rewards.videoalign import VideoAlign, frame_count, frame_size, resize, to_patches
from reward_forcing.rewards.videoalign_prompt import QUESTION, TOKENS

for package in ("transformers", "jinja2"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)
FOLDER = os.environ.get("RF_UPSTREAM_DIR")
UPSTREAM = Path(FOLDER or ".", "Reward-Forcing", "videoalign")
PROMPTS = ["a cat walks", "two {dogs} play"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videoalign")
    base = qwen_case.base(folder / "base")
    layouts = ("whole", "adapters")
    return base, {name: qwen_case.checkpoint(folder / name, base, name) for name in layouts}


@pytest.fixture(scope="module")
def clips():
    return torch.rand(2, 5, 3, 24, 40, generator=torch.Generator().manual_seed(2)) * 2 - 1


def unmerged(base, checkpoint):
    """The model in float64 as PEFT runs it, ``W x + scale B (A x)``, and the head."""
    from transformers import Qwen2VLForConditionalGeneration

    tensors = torch.load(checkpoint / "checkpoint-11352" / "model.pth", weights_only=True)
    tensors = {name.removeprefix("base_model.model."): t.double() for name, t in tensors.items()}
    model = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float64)
    model.resize_token_embeddings(len(tensors["model.embed_tokens.weight"]))
    names = {
        n: n.replace("language_model.", "").replace("model.visual.", "visual.") for n in model.state_dict()
    }
    whole = {
        n: tensors.get(old, tensors.get(old.replace("proj.", "proj.base_layer."))) for n, old in names.items()
    }
    model.load_state_dict(whole)
    scale = qwen_case.LORA["lora_alpha"] / qwen_case.LORA["lora_r"]
    for name, module in model.model.language_model.named_modules():
        a, b = (tensors.get(f"model.{name}.lora_{side}.default.weight") for side in "AB")
        if a is not None:
            module.register_forward_hook(lambda m, x, y, a=a, b=b: y + scale * (x[0] @ a.T) @ b.T)
    return model.eval(), tensors["rm_head.weight"]


def expected(reward, base, checkpoint, clip, prompt, forward):
    """The published score, with ``forward(model, head, ids, patches, grid) -> three numbers``."""
    model, head = unmerged(base, checkpoint)
    frames = resize((clip.double() + 1) * 127.5, (336, 588))
    patches, grid = to_patches(frames, reward._mean, reward._std, model.config.vision_config)
    ids = reward._tokens(prompt, grid[0] * grid[1] * grid[2] // 4)
    with torch.no_grad():
        found = forward(model, head, ids, patches, torch.tensor([grid]))
    norm = qwen_case.SETTINGS["inference_config"]
    return (found[1] - norm["MQ_mean"]) / norm["MQ_std"]


def plain(model, head, ids, patches, grid):
    """Embeddings with the video's in their places, positions that count tokens, the head at each mark."""
    inside = model.model
    embedded = inside.get_input_embeddings()(ids)
    video = inside.visual(patches, grid).pooler_output
    embedded[ids == model.config.video_token_id] = video
    hidden = inside.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[0]
    marks = [next(i for i, token in enumerate(ids[0].tolist()) if token == mark) for mark in MARKS]
    return torch.stack([hidden[mark] @ head[0] for mark in marks])


MARKS = [256 + len(qwen_case.WORDS) + i for i in range(3)]


def test_the_score_is_the_published_one(folders, clips):
    base, checkpoints = folders
    reward = VideoAlign(checkpoints["whole"], base, dtype=torch.float32)
    found = scores(reward, clips, PROMPTS)
    reference = [
        expected(reward, base, checkpoints["whole"], clip, prompt, plain)
        for clip, prompt in zip(clips, PROMPTS, strict=True)
    ]
    assert abs(reference[0] - reference[1]) > 0.01  # the video or the text acts
    torch.testing.assert_close(found.double(), torch.stack(reference), rtol=1e-4, atol=1e-4)
    adapters = VideoAlign(checkpoints["adapters"], base, dtype=torch.float32)
    assert torch.equal(scores(adapters, clips, PROMPTS), found)


def test_what_acts_on_the_score(folders, clips):
    """The order of frames and their sampling; not the prompt, which stands after the mark of motion quality.
    A sample is scored by itself."""
    base, checkpoints = folders
    reward = VideoAlign(checkpoints["whole"], base, dtype=torch.float32, sampling="by_rate", video_fps=4.0)
    one = reward(clips[:1], PROMPTS[:1])
    assert torch.equal(reward(clips[:1].repeat(2, 1, 1, 1, 1), PROMPTS[:1] * 2), one.repeat(2))
    assert (reward(clips[:1].flip(1), PROMPTS[:1]) - one).abs() > 1e-2
    torch.testing.assert_close(reward(clips[:1], PROMPTS[1:]), one, rtol=1e-4, atol=1e-4)
    assert reward._sampled(clips[0]).shape == (4, 3, *frame_size(24, 40, most=448 * 448))
    assert reward._sampled(clips[0]).frac().abs().max() == 0


def test_a_head_of_three_rows(folders, tmp_path, clips):
    base, _ = folders
    settings = deepcopy(qwen_case.SETTINGS)
    settings["model_config"]["output_dim"] = 3
    whole = qwen_case.checkpoint(tmp_path / "three", base, settings=settings)
    head = torch.load(whole / "checkpoint-11352/model.pth", weights_only=True)[
        "base_model.model.rm_head.weight"
    ]
    assert torch.equal(VideoAlign(whole, base, dtype=torch.float32).head, head[1])


def test_patches_are_those_of_transformers():
    """Two equal frames are what its image processor makes of one image."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image = torch.randint(256, (3, 56, 84), generator=torch.Generator().manual_seed(0))
    processor = Qwen2VLImageProcessorPil(do_resize=False)
    wanted = processor(image.byte().numpy(), return_tensors="pt", input_data_format="channels_first")
    options = (processor.image_mean, processor.image_std, qwen_case.config().vision_config)
    patches, grid = to_patches(image.float().expand(2, -1, -1, -1), *options)
    assert [list(grid)] == wanted.image_grid_thw.tolist()
    torch.testing.assert_close(patches, wanted.pixel_values, rtol=1e-5, atol=1e-5)
    odd, grid = to_patches(torch.rand(3, 3, 28, 28), *options)  # the last frame is repeated
    assert grid == (2, 2, 2) and torch.equal(
        odd[4:].view(4, 3, 2, -1)[:, :, 0], odd[4:].view(4, 3, 2, -1)[:, :, 1]
    )


def test_the_question_is_the_published_one():
    digest = "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
    assert hashlib.sha256(QUESTION.encode()).hexdigest() == digest
    assert all(QUESTION.count(token) == 1 for token in TOKENS)


@pytest.mark.skipif(not UPSTREAM.is_dir(), reason="RF_UPSTREAM_DIR names no folder with Reward-Forcing")
class TestUpstream:
    """Definitions of upstream's files, run as they are: its packages are not needed."""

    @staticmethod
    def taken(file, **namespace):
        tree = ast.parse((UPSTREAM / file).read_text())
        kinds = (ast.FunctionDef, ast.ClassDef, ast.Assign)
        kept = [
            node for node in tree.body if isinstance(node, kinds) and "os.getenv" not in ast.unparse(node)
        ]
        skipped = ("lru_cache", "RewardTrainer", "TrainerCallback", "logger")
        kept = [node for node in kept if not any(word in ast.unparse(node) for word in skipped)]
        code = ast.Module([ast.ImportFrom("__future__", [ast.alias("annotations")], 0), *kept], [])
        exec(compile(ast.fix_missing_locations(code), file, "exec"), namespace)
        return SimpleNamespace(**namespace)

    def test_question_frames_and_sizes(self):
        import math

        from PIL import Image

        names = self.taken("prompt_template.py")
        text = names.build_prompt("a {cat}", ["VQ", "MQ", "TA"], "detailed_special")
        assert text == QUESTION.format(text_prompt="a {cat}")
        vision = self.taken("vision_process.py", math=math, Image=Image, torch=torch)
        for total in (4, 5, 9, 21, 81, 333):
            for fps in (8, 16, 24.0):
                assert frame_count(total, fps, 2.0, None) == vision.smart_nframes({"fps": 2.0}, total, fps)
            for asked in (2, 7, 16):
                wanted = vision.smart_nframes({"nframes": min(asked, total)}, total, 16)
                assert frame_count(total, 16, 2.0, asked) == wanted
        for size in ((480, 832), (32, 32), (720, 1280), (61, 4000), (336, 588)):
            pixels = {"min_pixels": vision.VIDEO_MIN_PIXELS, "max_pixels": 448 * 448}
            assert frame_size(*size, most=448 * 448) == vision.smart_resize(*size, **pixels)

    def test_the_models_forward(self, folders, clips):
        from typing import Optional

        from transformers import Qwen2VLForConditionalGeneration

        names = {"torch": torch, "nn": torch.nn, "Optional": Optional, "List": list}
        names |= {"Qwen2VLForConditionalGeneration": Qwen2VLForConditionalGeneration}
        published = self.taken("trainer.py", **names).Qwen2VLRewardModelBT

        def forward(model, head, ids, patches, grid):
            class Vision:  # transformers 5 returns a structure where 4 returned the features
                get_dtype = staticmethod(lambda: torch.float64)

                def __call__(self, pixels, grid_thw):
                    return model.model.visual(pixels, grid_thw).pooler_output

            linear = torch.nn.Linear(*head.T.shape, bias=False).double()
            linear.weight = torch.nn.Parameter(head)
            flags = {"output_attentions": False, "output_hidden_states": False, "use_return_dict": True}
            flags |= {"video_token_id": model.config.video_token_id, "pad_token_id": 256}
            own = SimpleNamespace(config=SimpleNamespace(**flags), visual=Vision(), model=model.model)
            own.rm_head, own.reward_token, own.output_dim = linear, "special", 1
            own.special_token_ids, own.get_input_embeddings = MARKS, model.get_input_embeddings
            options = {"pixel_values_videos": patches, "video_grid_thw": grid}
            mask = torch.ones_like(ids)
            return published.forward(own, input_ids=ids, attention_mask=mask, **options)["logits"][0]

        base, checkpoints = folders
        reward = VideoAlign(checkpoints["whole"], base, dtype=torch.float64)
        wanted = expected(reward, base, checkpoints["whole"], clips[0], PROMPTS[0], forward)
        found = reward(clips[:1], PROMPTS[:1])[0]
        assert abs(found - wanted) <= 1e-5 * abs(wanted)  # LoRA is merged in float32


# ---- what is refused ---------------------------------------------------------------------------------------
def change(path, **values):
    found = json.loads(path.read_text())
    for name, value in values.items():
        section, _, key = name.partition("__")
        found[f"{section}_config"][key] = value
    path.write_text(json.dumps(found))


def rewrite(path, edit):
    tensors = torch.load(path, weights_only=True)
    edit(tensors)
    torch.save(tensors, path)


INSIDE = "base_model.model.model.layers.0.self_attn"
WHOLE = "checkpoint-11352/model.pth"
FAULTS = {
    "no settings": (lambda f: (f / "model_config.json").unlink(), "model_config.json: FileNotFoundError"),
    "settings": (lambda f: (f / "model_config.json").write_text("{"), "JSONDecodeError"),
    "a key": (lambda f: (f / "model_config.json").write_text("{}"), "KeyError: 'data_config'"),
    "template": (lambda f: change(f / "model_config.json", data__prompt_template_type="simple"), "'simple'"),
    "no std": (lambda f: change(f / "model_config.json", inference__MQ_std=0.0), "MQ_std above 0"),
    "no file": (lambda f: (f / WHOLE).unlink(), "without non_lora_state_dict.pth"),
    "cut": (lambda f: (f / WHOLE).write_bytes((f / WHOLE).read_bytes()[:9000]), "not a readable checkpoint"),
    "pickle": (lambda f: torch.save({"a": SimpleNamespace()}, f / WHOLE), "more than tensors"),
    "no head": (lambda f: rewrite(f / WHOLE, lambda t: t.pop("base_model.model.rm_head.weight")), "rm_head"),
    "half a pair": (
        lambda f: rewrite(f / WHOLE, lambda t: t.pop(f"{INSIDE}.q_proj.lora_A.default.weight")),
        "no pair of LoRA that fits language_model.layers.0.self_attn.q_proj.weight",
    ),
    "a weight": (
        lambda f: rewrite(f / WHOLE, lambda t: t.pop(f"{INSIDE}.q_proj.base_layer.bias")),
        r"missing: language_model.layers.0.self_attn.q_proj.bias",
    ),
    "vocabulary": (
        lambda f: rewrite(
            f / WHOLE, lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(9, 32)})
        ),
        "266 embeddings.*found 9",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_checkpoint_is_one_error(fault, folders, tmp_path):
    base, _ = folders
    folder = qwen_case.checkpoint(tmp_path / "broken", base)
    act, text = FAULTS[fault]
    act(folder)
    with pytest.raises(rf.ArgumentError, match=text) as refused:
        VideoAlign(folder, base)
    assert str(refused.value).startswith("VideoAlign: argument `checkpoint`: expected")


def test_other_wrong_arguments(folders, tmp_path, clips):
    base, checkpoints = folders
    with pytest.raises(rf.ArgumentError, match="`base`: expected a folder of Qwen2-VL-2B-Instruct"):
        VideoAlign(checkpoints["whole"], tmp_path)
    with pytest.raises(rf.ArgumentError, match="sampling"):
        VideoAlign(checkpoints["whole"], base, sampling="all")
    reward = VideoAlign(checkpoints["whole"], base, dtype=torch.float32)
    with pytest.raises(rf.ArgumentError, match="at least 2 frames"):
        reward(clips[:, :1], PROMPTS)
    with pytest.raises(rf.ArgumentError, match="marks.*MQ_reward"):
        reward(clips[:1], ["a cat <|MQ_reward|>"])
