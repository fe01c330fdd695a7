"""The embedded world: video, text, codec and read-outs on which every stage trains and is judged without a
download.
"""

from .codec import PATCH, PatchCodec
from .measure import Reading, colour_right, measure, similarity_to_first, steady_speed
from .scene import PROMPTS, SIZE, SPEEDS, Prompt, draw_prompts, render
from .text import TEXT_DIM, TEXT_LEN, embed, no_text

__all__ = [
    "PATCH",
    "PROMPTS",
    "SIZE",
    "SPEEDS",
    "TEXT_DIM",
    "TEXT_LEN",
    "PatchCodec",
    "Prompt",
    "Reading",
    "colour_right",
    "draw_prompts",
    "embed",
    "measure",
    "no_text",
    "render",
    "similarity_to_first",
    "steady_speed",
]
