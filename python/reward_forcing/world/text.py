"""Text features of the embedded world: one fixed vector a word, zeros where a word is left out."""

from __future__ import annotations

import torch
from torch import Tensor

from .scene import COLOURS, FORMS, SPEEDS, Prompt

TEXT_DIM = 32
TEXT_LEN = 3
_WORDS = (*COLOURS, *FORMS, *SPEEDS)


def _table() -> Tensor:
    """Random unit vectors times sqrt(TEXT_DIM); the seed is part of every checkpoint of the world."""
    table = torch.randn(len(_WORDS), TEXT_DIM, generator=torch.Generator().manual_seed(7), device="cpu")
    return table / table.norm(dim=1, keepdim=True) * TEXT_DIM**0.5


_TABLE = _table()


def embed(prompts: list[Prompt]) -> Tensor:
    """Text features ``[B, 3, 32]``: colour, form, speed."""
    features = torch.zeros(len(prompts), TEXT_LEN, TEXT_DIM, device="cpu")
    for row, prompt in zip(features, prompts, strict=True):
        for place, word in enumerate((prompt.colour, prompt.form, prompt.speed)):
            if word is not None:
                row[place] = _TABLE[_WORDS.index(word)]
    return features


def no_text(batch: int) -> Tensor:
    """The features of the empty prompt, for guidance: zeros ``[B, 3, 32]``."""
    return torch.zeros(batch, TEXT_LEN, TEXT_DIM)
