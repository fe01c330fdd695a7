"""Running the attention kernel on the model: cases, a float64 oracle, and what must hold after every
launch."""

from dataclasses import dataclass, replace

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
    """One call. `capacity` rows of cache, of which the first kv_tokens are valid; the others hold NaN. With
    row_kv_tokens, sample b has so many valid rows of its own, and kv_tokens is the most that may be."""

    q_tokens: int
    kv_tokens: int
    batch: int = 1
    heads: int = 1
    kv_heads: int | None = None
    row_kv_tokens: tuple = ()
    capacity: int | None = None
    num_sms: int = 3
    resident: int = 1 << 20
    chunk_ends: tuple = ()
    num_sink_tokens: int = 0
    num_window_tokens: int = 0
    deterministic: bool = False
    variant: str = "bf16_128"
    bias: float = 0.0  # size of the bias of keys; 0: none
    q_scale: float = 1.5
    k_ramp: float = 1.0  # scale of the first key: tiles are visited in descending order, so scores rise

    @property
    def valid(self):
        """Valid rows of cache of each sample, inside what there may be."""
        own = self.row_kv_tokens or self.batch * (self.kv_tokens,)
        return [min(max(n, 0), self.kv_tokens) for n in own]

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
    kv_bias: torch.Tensor | None = None  # [B, kv_tokens]


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
    for b, n in enumerate(case.valid):
        k[b, n:] = float("nan")
        v[b, n:] = float("nan")
    bias = None
    if (
        case.bias
    ):  # rows of an even length, as the kernel reads them; NaN behind a row's end, some keys hidden
        bias = torch.full((case.batch, case.kv_tokens + case.kv_tokens % 2), float("nan"))
        bias = bias[:, : case.kv_tokens]
        for b, n in enumerate(case.valid):
            bias[b, :n] = case.bias * torch.randn(n, generator=generator)
            bias[b, 3:n:7] = float("-inf")
    return Inputs(case, q, k, v, case.head_dim**-0.5, bias)


def oracle(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in float64 over what each query may see: (out [B, Nq, H, D], lse [B, H, Nq])."""
    case = inputs.case
    if case.row_kv_tokens:
        rows = [oracle(row) for row in rows_of(inputs)]
        return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
    q, k, v = (t.double() for t in (inputs.q, inputs.k[:, : case.kv_tokens], inputs.v[:, : case.kv_tokens]))
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * inputs.softmax_scale
    if inputs.kv_bias is not None:
        s = s + inputs.kv_bias.double()[:, None, None]
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


def rows_of(inputs: Inputs) -> list[Inputs]:
    """Each sample as a call of its own; of the plain kernel, where there is no bias."""
    case = inputs.case
    return [
        replace(
            inputs,
            case=replace(
                case,
                batch=1,
                kv_tokens=n,
                row_kv_tokens=(),
                variant=case.variant if case.bias else case.variant.removesuffix("_rows"),
            ),
            kv_bias=None if inputs.kv_bias is None else inputs.kv_bias[b : b + 1, :n],
            **{name: getattr(inputs, name)[b : b + 1] for name in ("q", "k", "v")},
        )
        for b, n in enumerate(case.valid)
    ]


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
        row_kv_tokens=list(case.row_kv_tokens),
        kv_bias=np.zeros((0, 0), np.float32) if inputs.kv_bias is None else inputs.kv_bias.numpy(),
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
    if case.row_kv_tokens:
        rows = rows_of(inputs)
        return torch.cat([eager(r) if r.case.kv_tokens else torch.zeros_like(r.q) for r in rows])
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
        mask = None if inputs.kv_bias is None else inputs.kv_bias[:, None, None].to(q.dtype)
        parts.append(
            scaled_dot_product_attention(
                *(q[:, :, begin:end], k[:, :, keys], v[:, :, keys]),
                attn_mask=mask,
                scale=inputs.softmax_scale,
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

# Ends inside a key tile, at its edge, none, all, one; whole tiles and whole segments behind an end; pieces of
# a tile that only others' CTAs have; numbers that are out of range.
ROWS = {
    "one row": Case(70, 400, row_kv_tokens=(300,), capacity=400),
    "ends of all kinds": Case(
        70, 720, batch=7, row_kv_tokens=(0, 1, 176, 177, 700, 720, 352), capacity=720, num_sms=4
    ),
    "an empty row between": Case(200, 530, batch=3, row_kv_tokens=(400, 0, 530), heads=2, capacity=600),
    "a tile over many CTAs": Case(70, 1409, batch=2, row_kv_tokens=(200, 1409), num_sms=9),
    "all but the first piece is empty": Case(70, 1409, row_kv_tokens=(60,), num_sms=5),
    "nothing at all": Case(70, 1409, row_kv_tokens=(0,), num_sms=5),
    "out of range": Case(40, 300, batch=2, row_kv_tokens=(-5, 4000), capacity=300),
    "grouped heads": Case(100, 300, batch=2, row_kv_tokens=(300, 111), heads=6, kv_heads=2),
    "one of four resident": Case(200, 611, batch=2, row_kv_tokens=(130, 500), heads=2, num_sms=4, resident=1),
    "one CTA": Case(300, 900, batch=2, row_kv_tokens=(500, 180), num_sms=1),
}
ROWS = {name: replace(case, variant="bf16_128_rows") for name, case in ROWS.items()}
BIAS = {
    "a bias of keys": Case(130, 611, bias=2.0, heads=2),
    "a large bias": Case(70, 900, bias=30.0, num_sms=5),
    "a bias and rows of their own": replace(ROWS["ends of all kinds"], bias=2.0),
    "a bias at odd ends": Case(70, 353, batch=2, row_kv_tokens=(351, 177), bias=1.0, capacity=400),
    "a bias and many CTAs": Case(70, 1409, batch=2, bias=1.0, num_sms=9),
}
BIAS = {name: replace(case, variant="bf16_128_rows") for name, case in BIAS.items()}
BIAS["a bias at head_dim 64"] = replace(BIAS["a bias of keys"], variant="fp16_64_rows")
ROWS["head_dim 64"] = replace(ROWS["ends of all kinds"], variant="fp16_64_rows")

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
