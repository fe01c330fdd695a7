"""Wan's tokenizer, text encoder and VAE in their real formats, small and random."""

from pathlib import Path

import torch

WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "walks"]


def wan_folder(folder: Path, config) -> Path:
    """A folder as diffusers keeps Wan, for a model of these sizes."""
    from diffusers import AutoencoderKLWan
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    sizes = {"d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": len(WORDS)}
    UMT5EncoderModel(UMT5Config(d_model=config.text_dim, **sizes)).save_pretrained(folder / "text_encoder")
    AutoencoderKLWan(
        base_dim=8,
        z_dim=config.in_dim,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1] * config.in_dim,
        latents_std=[1.5] * config.in_dim,
    ).save_pretrained(folder / "vae")
    return folder
