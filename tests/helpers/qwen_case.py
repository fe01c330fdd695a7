"""A small random VideoReward in the published format: checkpoint with LoRA layers, and the model it was tuned
from."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
WORDS += ["<|video_pad|>"]
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 10, "use_rslora": False}
SETTINGS = {
    "data_config": {
        "fps": 2.0,
        "num_frames": None,
        "max_frame_pixels": 448 * 448,
        "eval_dim": ["VQ", "MQ", "TA"],
        "prompt_template_type": "detailed_special",
        "sample_type": "uniform",
    },
    "model_config": {"output_dim": 1, "use_special_tokens": True, "reward_token": "special"},
    "peft_lora_config": LORA,
    "inference_config": {"VQ_mean": 3.6, "VQ_std": 2.2, "MQ_mean": 1.1646, "MQ_std": 1.3811}
    | {"TA_mean": 2.8, "TA_std": 2.5},
}


def config():
    from transformers import Qwen2VLConfig

    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"intermediate_size": 48, "vocab_size": 300, "max_position_embeddings": 32768}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2}
    ids = {"image_token_id": 256 + WORDS.index("<|image_pad|>"), "video_token_id": 256 + len(WORDS) - 1}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def base(folder: Path) -> Path:
    """The model that was tuned: configuration, weights, tokenizer of bytes, normalisation of pixels."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer, Qwen2VLForConditionalGeneration

    letters = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[])
    tokenizer.add_tokens(WORDS, special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config())
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name and p.dim() == 1), std=0.2)
    model.save_pretrained(folder)
    means = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(means))
    return folder


def checkpoint(folder: Path, base: Path, layout: str = "whole", settings: dict = SETTINGS) -> Path:
    """VideoReward: ``layout`` "whole" is ``model.pth``, "adapters" what PEFT writes beside other weights.
    Names are those of older transformers."""
    from transformers import Qwen2VLForConditionalGeneration

    step = folder / "checkpoint-11352"
    step.mkdir(parents=True)
    (folder / "checkpoint-9").mkdir()
    (folder / "model_config.json").write_text(json.dumps(settings))
    model = Qwen2VLForConditionalGeneration.from_pretrained(base)
    outputs = settings["model_config"]["output_dim"]
    torch.manual_seed(1)
    rows = 256 + len(WORDS) + 3
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        state[name] = (
            0.2 * torch.randn(rows, 32)
            if name.endswith(("embed_tokens.weight", "lm_head.weight"))
            else tensor
        )
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["rm_head.weight"] = torch.randn(outputs, 32)
    whole, adapters = {}, {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        tuned = name.startswith("model.layers.") and module.endswith("proj")
        whole[f"base_model.model.{module}{'.base_layer' if tuned else ''}.{kind}"] = tensor
        if tuned and kind == "weight":
            pair = {"A": torch.randn(4, tensor.shape[1]), "B": 0.1 * torch.randn(tensor.shape[0], 4)}
            for side, factor in pair.items():
                whole[f"base_model.model.{module}.lora_{side}.default.weight"] = factor
                adapters[f"base_model.model.{module}.lora_{side}.weight"] = factor
    if layout == "whole":
        torch.save(whole, step / "model.pth")
    else:
        save_file(adapters, step / "adapter_model.safetensors")
        trained = ("rm_head", "embed_tokens", "visual.merger")
        others = {name: t for name, t in whole.items() if any(part in name for part in trained)}
        torch.save(others, step / "non_lora_state_dict.pth")
    return folder
