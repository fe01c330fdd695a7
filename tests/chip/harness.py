"""Running the attention kernel on the model: cases, a float64 oracle, and what must hold after every
launch."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from chip.build import load
from rf_kernels.testing import assert_within_eager

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
POLICIES = {"random": 0, "tma_late": 1, "wgmma_late": 2}
LN2 = float(np.log(2.0))


def bits(x: torch.Tensor) -> np.ndarray:
    """16-bit floats as a numpy array of uint16 that shares their memory."""
    return x.view(torch.int16).numpy().view(np.uint16)


def floats(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(x.view(np.int16)).view(dtype)


@dataclass(frozen=True)
class Case:
    """One call. `capacity` rows of cache, of which the first kv_tokens are valid; the others hold NaN."""

    q_tokens: int
    kv_tokens: int
    batch: int = 1
    heads: int = 1
    kv_heads: int | None = None
    capacity: int | None = None
    num_sms: int = 3
    resident: int = 1 << 20
    chunk_ends: tuple = ()
    num_sink_tokens: int = 0
    num_window_tokens: int = 0
    deterministic: bool = False
    variant: str = "bf16_128"
    q_scale: float = 1.5
    k_ramp: float = 1.0  # scale of the first key: tiles are visited in descending order, so scores rise

    @property
    def head_dim(self):
        return int(self.variant.split("_")[1])

    @property
    def dtype(self):
        return DTYPES[self.variant.split("_")[0]]


@dataclass
class Inputs:
    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    softmax_scale: float


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    capacity = case.capacity or case.kv_tokens + 37
    kv_heads = case.kv_heads or case.heads
    shape_q = (case.batch, case.q_tokens, case.heads, case.head_dim)
    shape_k = (case.batch, capacity, kv_heads, case.head_dim)
    q = (case.q_scale * torch.randn(shape_q, generator=generator)).to(case.dtype)
    k = torch.randn(shape_k, generator=generator).to(case.dtype)
    v = torch.randn(shape_k, generator=generator).to(case.dtype)
    if case.k_ramp != 1:
        k *= torch.linspace(case.k_ramp, 1, capacity)[:, None, None].to(case.dtype)
    k[:, case.kv_tokens :] = float("nan")
    v[:, case.kv_tokens :] = float("nan")
    return Inputs(case, q, k, v, case.head_dim**-0.5)


def oracle(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in float64 over what each query may see: (out [B, Nq, H, D], lse [B, H, Nq])."""
    case = inputs.case
    q, k, v = (t.double() for t in (inputs.q, inputs.k[:, : case.kv_tokens], inputs.v[:, : case.kv_tokens]))
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * inputs.softmax_scale
    if case.chunk_ends:
        rows, columns = torch.arange(case.q_tokens), torch.arange(case.kv_tokens)
        ends = torch.tensor(case.chunk_ends)
        end = ends[torch.searchsorted(ends, rows, right=True)][:, None]
        seen = (columns < torch.clamp(end, max=case.num_sink_tokens)) | (
            (columns >= torch.clamp(end - case.num_window_tokens, min=case.num_sink_tokens)) & (columns < end)
        )
        s = s.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(s, -1)
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(s, -1), v), lse


def run(inputs: Inputs, *, seed: int = 0, policy: str = "random", variant: str | None = None):
    """(out, lse, stats)."""
    case = inputs.case
    out = np.full(inputs.q.shape, 0xFFFF, np.uint16)
    lse = np.full((case.batch, case.heads, case.q_tokens), np.nan, np.float32)
    stats = load().attention(
        variant or case.variant,
        bits(inputs.q),
        bits(inputs.k),
        bits(inputs.v),
        out,
        lse,
        kv_tokens=case.kv_tokens,
        softmax_scale=inputs.softmax_scale,
        chunk_ends=list(case.chunk_ends),
        num_sink_tokens=case.num_sink_tokens,
        num_window_tokens=case.num_window_tokens,
        deterministic=case.deterministic,
        num_sms=case.num_sms,
        policy=POLICIES[policy],
        seed=seed,
        resident=case.resident,
    )
    return floats(out, case.dtype), torch.from_numpy(lse), stats


def eager(inputs: Inputs) -> torch.Tensor:
    """PyTorch's own attention in the dtype of the inputs."""
    case = inputs.case
    q, k, v = (
        t.transpose(1, 2) for t in (inputs.q, inputs.k[:, : case.kv_tokens], inputs.v[:, : case.kv_tokens])
    )
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    ends = [0, *case.chunk_ends] if case.chunk_ends else [0, case.q_tokens]
    parts = []
    for begin, end in zip(ends, ends[1:], strict=False):
        keys = torch.arange(case.kv_tokens)
        if case.chunk_ends:
            window = max(case.num_sink_tokens, end - case.num_window_tokens)
            keys = keys[(keys < min(case.num_sink_tokens, end)) | ((keys >= window) & (keys < end))]
        parts.append(
            scaled_dot_product_attention(
                q[:, :, begin:end], k[:, :, keys], v[:, :, keys], scale=inputs.softmax_scale
            )
        )
    return torch.cat(parts, 2).transpose(1, 2)


def check(inputs: Inputs, **options):
    out, lse, _ = run(inputs, **options)
    expected, expected_lse = oracle(inputs)
    assert_within_eager(out, expected, eager(inputs))
    # Weights by polynomial err by 2.9e-4 at most before they are rounded to bfloat16, and their sum is not
    # rounded.
    tolerance = 3e-4 if "polynomial" in (options.get("variant") or inputs.case.variant) else 1e-5
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=tolerance)
    return out, lse


# ---- cases, for the model and for the chip -----------------------------------------------------------------

DENSE = {
    "one key, one query": Case(1, 1),
    "one key": Case(70, 1),
    "one query": Case(1, 400),
    "tile edges": Case(128, 352, num_sms=2),
    "tile edges + 1": Case(129, 353, num_sms=2),
    "tile edges - 1": Case(127, 351, num_sms=2),
    "every CTA splits": Case(200, 611, heads=2),
    "a tile over many CTAs": Case(70, 1409, num_sms=5),
    "waves and a split rest": Case(130, 530, batch=2, heads=2, num_sms=3),
    "more CTAs than work": Case(65, 200, num_sms=16),
    "one of four resident": Case(200, 611, heads=2, num_sms=4, resident=1),
    "grouped heads": Case(100, 300, batch=2, heads=6, kv_heads=2),
    "one key head": Case(100, 300, heads=3, kv_heads=1),
    "a prefix of a long cache": Case(100, 177, capacity=2000),
    "a full cache": Case(100, 360, capacity=360),
    "scores rise from tile to tile": Case(200, 1409, num_sms=2, q_scale=4.0, k_ramp=6.0),
    "scores rise over a split tile": Case(130, 900, num_sms=3, q_scale=4.0, k_ramp=6.0),
}

# Chunks of three frames of 50 tokens, sink of two frames, window of four; then chunks of unequal length, a
# window that reaches the sink, no sink, no window, chunks shorter than the sink.
WHOLE = {
    "sink and window": Case(
        900, 900, chunk_ends=(150, 300, 450, 600, 750, 900), num_sink_tokens=100, num_window_tokens=200
    ),
    "unequal chunks": Case(
        700, 700, chunk_ends=(1, 130, 131, 390, 700), num_sink_tokens=65, num_window_tokens=257, heads=2
    ),
    "window reaches the sink": Case(
        400, 400, chunk_ends=(100, 200, 300, 400), num_sink_tokens=100, num_window_tokens=300
    ),
    "no sink": Case(600, 600, chunk_ends=(200, 400, 600), num_window_tokens=177),
    "no window": Case(600, 600, chunk_ends=(200, 400, 600), num_sink_tokens=177),
    "chunks shorter than the sink": Case(
        300, 300, chunk_ends=(20, 40, 60, 300), num_sink_tokens=50, num_window_tokens=90
    ),
    "grouped heads, head_dim 64": Case(
        500,
        500,
        chunk_ends=(250, 500),
        num_sink_tokens=70,
        num_window_tokens=120,
        heads=4,
        kv_heads=2,
        variant="fp16_64",
    ),
}
