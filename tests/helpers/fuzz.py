"""Differential fuzzing: random configurations of every op and of whole streams, against a float64 oracle.

    python tests/helpers/fuzz.py                                   all ops, seeds 0:200
    python tests/helpers/fuzz.py --op rope_append --seeds 0:2000
    python tests/helpers/fuzz.py --op rope_append --seed 17        one configuration again

A seed is one configuration: sizes, dtype, strides, options and numbers. Even seeds draw numbers that the op's
arithmetic represents exactly, and demand equality; odd seeds draw from a normal distribution, and allow twice
the error of eager PyTorch in the same dtype (testing.assert_within_eager). Tensors are views of larger
buffers whose other elements are poison: they must come back unchanged. Whatever is raised is a failure.
"""

import argparse
import os
import random
import sys
import time
import traceback
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

import torch
import torch.nn.functional as F

import rf_kernels as rf
from helpers.attention_case import HALF_LSE, INF, visible
from helpers.dmd_gradient_case import gradient_of, loss_of
from rf_kernels.reference import ema_evict as ref_ema
from rf_kernels.reference import rope_append as ref_rope
from rf_kernels.reference.dmd_gradient import dmd_gradient as ref_dmd
from rf_kernels.reference.sink_window_attention import sink_window_attention as ref_attention
from rf_kernels.reference.streaming import StreamingReference
from rf_kernels.testing import assert_equal_bits, assert_within_eager, max_error, relative_l2

TRITON = os.environ.get("RF_BACKEND") == "triton"  # no float64; and small sizes, for its interpreter
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)[TRITON:]
if os.environ.get("TRITON_INTERPRET") == "1":
    import helpers.quick_interpreter  # noqa: F401


class Draw:
    """Random choices and tensors of one seed."""

    def __init__(self, op: str, seed: int):
        self.random = random.Random(f"{op} {seed}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(63))
        self.exact = seed % 2 == 0
        self.dtype = self.random.choice(DTYPES)
        self.half = self.dtype in (torch.bfloat16, torch.float16)
        self.guarded = []  # (buffer, a copy, what of it may change)

    def integer(self, low: int, high: int) -> int:
        small = TRITON and high <= 7
        return self.random.randint(low, min(high, low + high // 3) if small else high)

    def choice(self, options):
        return self.random.choice(options)

    def chance(self, p: float = 0.5) -> bool:
        return self.random.random() < p

    def numbers(self, shape, dtype=None, largest: int = 8) -> torch.Tensor:
        """Small integers (exact seeds) or normal numbers."""
        if self.exact:
            return torch.randint(-largest, largest + 1, shape, generator=self.generator).to(
                dtype or self.dtype
            )
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def view(self, values: torch.Tensor, written: bool = False) -> torch.Tensor:
        """The same values as a strided view (last stride 1) of a larger, poisoned buffer: padding in every
        dimension, an offset, and sometimes tokens and heads in the other order of memory."""
        swap = values.dim() == 4 and self.chance(0.3)
        stored = values.transpose(1, 2) if swap else values
        padded = [n + self.integer(0, 2) for n in stored.shape]
        poison = self.choice([float("nan"), float("inf"), torch.finfo(values.dtype).max])
        buffer = torch.full(padded, poison, dtype=values.dtype)
        view = buffer[tuple(slice(p - n, p) for p, n in zip(padded, stored.shape, strict=True))]
        view = view.transpose(1, 2) if swap else view
        view.copy_(values)
        self.guarded.append((buffer, buffer.clone(), view if written else None))
        return view

    def check_surroundings(self) -> None:
        """Nothing but the views that are written has changed."""
        for buffer, before, written in self.guarded:
            if written is not None:
                after = torch.as_strided(before, written.shape, written.stride(), written.storage_offset())
                after.copy_(written)
            assert_equal_bits(buffer, before)

    def quarter_turns(self, *shape, dtype) -> torch.Tensor:
        """cos and sin of multiples of 90 degrees: rotations that only swap and negate."""
        turn = torch.randint(0, 4, shape, generator=self.generator)
        return torch.stack((torch.tensor([1, 0, -1, 0])[turn], torch.tensor([0, 1, 0, -1])[turn]), -1).to(
            dtype
        )


def compare(draw, actual, oracle, eager, floor=0.0, **tolerance):
    """``floor``: what the rounding of terms leaves where their sum cancels."""
    if draw.exact:
        expected = oracle.to(actual.dtype)
        assert torch.equal(actual, expected), (
            f"{int((actual != expected).sum())} of {actual.numel()} elements differ"
        )
    elif not max_error(actual, oracle) <= floor:  # a NaN on one side alone is no difference below it
        if eager.dtype == torch.float64:  # there the oracle's own roundings count too
            tolerance["ulps"] = 16.0
        assert_within_eager(actual, oracle, eager, **tolerance)


def doubled(call: dict) -> dict:
    """The call in float64, on contiguous copies."""
    return {
        k: v.double().clone() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in call.items()
    }


def cloned(call: dict) -> dict:
    return {k: v.contiguous().clone() if isinstance(v, torch.Tensor) else v for k, v in call.items()}


def rotation(draw, batch, tokens_of_axis, head_dim):
    """(angles, axes, layout) of a random table, or of none."""
    if draw.chance(0.15):
        return None, [], "adjacent"
    room = head_dim // 2
    pairs = []
    for _ in tokens_of_axis:
        pairs.append(draw.integer(0, room))
        room -= pairs[-1]
    dtype = torch.float64 if draw.dtype == torch.float64 else torch.float32
    rope = rf.RoPE(pairs=tuple(pairs), bases=tuple(draw.choice((100.0, 1e4)) for _ in pairs))
    each = batch if draw.chance(0.3) else 1
    positions = [[[draw.integer(0, 10**5) for _ in range(n)] for _ in range(each)] for n in tokens_of_axis]
    angles, axes = rope.table(positions, dtype=draw.dtype)
    if draw.exact:
        angles = draw.quarter_turns(*angles.shape[:2], dtype=dtype)
    return angles, axes, draw.choice(("adjacent", "half", "axis_half"))


def norms(draw, heads, head_dim):
    """(norm, a weight for each number of heads or None). No norm in exact seeds: its root is rounded."""
    norm = draw.choice(("model", "head"))
    weights = []
    for h in heads:
        size = h * head_dim if norm == "model" else head_dim
        absent = draw.exact or draw.chance(0.3)
        dtype = draw.choice((draw.dtype, torch.float32))
        weights.append(None if absent else torch.rand(size, generator=draw.generator).add(0.5).to(dtype))
    return norm, weights


def fuzz_rope_append(draw):
    batch, frames, grid = draw.integer(1, 3), draw.integer(1, 4), (draw.integer(1, 3), draw.integer(1, 4))
    kv_heads, head_dim = draw.integer(1, 4), draw.choice((1, 2, 3, 5, 8, 16, 17, 32, 64, 128))
    q_heads, n = kv_heads * draw.integer(1, 3), grid[0] * grid[1]
    capacity = frames + draw.integer(0, 3)
    angles, axes, layout = rotation(draw, batch, (frames, *grid), head_dim)
    norm, (q_weight, k_weight) = norms(draw, (q_heads, kv_heads), head_dim)
    slots = [draw.random.sample(range(capacity), frames) for _ in range(batch)]
    tokens = frames * n
    call = {
        "q": draw.view(draw.numbers((batch, tokens, q_heads, head_dim))),
        "k": draw.view(draw.numbers((batch, tokens, kv_heads, head_dim))),
        "v": draw.view(draw.numbers((batch, tokens, kv_heads, head_dim))),
        "k_cache": draw.view(draw.numbers((batch, capacity * n, kv_heads, head_dim)), written=True),
        "v_cache": draw.view(draw.numbers((batch, capacity * n, kv_heads, head_dim)), written=True),
        "slots": torch.tensor(slots[0] if draw.chance() else slots, dtype=torch.int32),
    }
    options = {
        "angles": angles,
        "axes": axes,
        "layout": layout,
        "q_weight": q_weight,
        "k_weight": k_weight,
        "norm": norm,
    }
    options["eps"] = draw.choice((0.0, 1e-6, 1e-3))
    exact_call, eager_call = doubled(call), cloned(call)
    exact = ref_rope.rope_append(**exact_call, **doubled(options))
    eager = ref_rope.rope_append(**eager_call, **options)
    out = rf.rope_append(**call, **options)
    compare(draw, out, exact, eager)
    compare(draw, call["k_cache"], exact_call["k_cache"], eager_call["k_cache"])
    assert_equal_bits(call["v_cache"], exact_call["v_cache"].to(draw.dtype))
    draw.check_surroundings()


def fuzz_rope(draw):
    batch, lengths = draw.integer(1, 3), tuple(draw.integer(1, 5) for _ in range(draw.integer(1, 3)))
    heads, head_dim = draw.integer(1, 4), draw.choice((1, 2, 3, 6, 8, 16, 24, 64))
    angles, axes, layout = rotation(draw, batch, lengths, head_dim)
    norm, (weight,) = norms(draw, (heads,), head_dim)
    shape = (batch, torch.Size(lengths).numel(), heads, head_dim)
    x, grad = draw.view(draw.numbers(shape)), draw.numbers(shape)
    options = {"angles": angles, "axes": axes, "layout": layout, "weight": weight, "norm": norm, "eps": 1e-5}

    def run(function, x, grad, options):
        leaves = [x.detach().requires_grad_()]
        if options["weight"] is not None:
            leaves.append(options["weight"].detach().requires_grad_())
            options = options | {"weight": leaves[1]}
        out = function(leaves[0], **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    exact = run(ref_rope.rope, x.double(), grad.double(), doubled(options))
    eager = run(ref_rope.rope, x, grad, options)
    # The gradient through a norm is a difference: of terms no larger than grad * weight / root mean square.
    wide = x.double()
    over = (-2, -1) if norm == "model" else -1
    steepest = float((wide.square().mean(over) + options["eps"]).rsqrt().max()) if weight is not None else 1.0
    term = (
        8
        * torch.finfo(torch.promote_types(draw.dtype, torch.float32)).eps
        * steepest
        * 1.5
        * float(grad.abs().max())
    )
    floors = (0.0, term, term * float(wide.abs().max()) * x.shape[0] * x.shape[1] * heads)
    for a, b, c, floor in zip(run(rf.rope, x, grad, options), exact, eager, floors, strict=False):
        compare(draw, a, b, c, floor)
    draw.check_surroundings()


def fuzz_ema_evict(draw):
    batch, n, heads = draw.integer(1, 3), draw.integer(1, 5), draw.integer(1, 3)
    head_dim = draw.choice((1, 2, 3, 7, 8, 16, 24, 32, 32, 64, 64, 96, 128))
    sink_frames, window = draw.integer(0, 3), draw.integer(1, 5)
    sources, pairs = (
        draw.integer(0, window),
        draw.choice((draw.integer(0, head_dim // 2), head_dim // 4, head_dim // 2)),
    )
    state = draw.choice(("compensated", "float32", "published"))
    stored = state if draw.half else "published"
    arithmetic = torch.float64 if draw.dtype == torch.float64 else torch.float32

    def schedule_of_a_sample():
        free = draw.random.sample(range(sink_frames, sink_frames + window), window)
        rows = []
        for _ in range(sink_frames):
            count = draw.integer(0, min(sources, len(free)))
            taken, free = free[:count], free[count:]
            rows.append([draw.integer(0, 1), count, *taken, *[0] * (sources - count)])
        return rows

    per_sample = draw.chance()
    schedule = torch.tensor([schedule_of_a_sample() for _ in range(batch)], dtype=torch.int32).reshape(
        batch, sink_frames, 2 + sources
    )
    turns = draw.quarter_turns(batch, sink_frames, sources + 1, pairs, dtype=arithmetic)
    if not draw.exact:
        angle = torch.rand(turns.shape[:-1], generator=draw.generator, dtype=torch.float64) * 6.3
        turns = torch.stack((angle.cos(), angle.sin()), -1).to(arithmetic)
    # Exact seeds: integers and halvings, few enough for the 8 bits of bfloat16.
    alphas = torch.tensor([0.0, 0.5, 1.0] if draw.exact else [0.0, 0.3, 0.999, 1.0], dtype=torch.float64)
    shape = draw.choice(((), (sink_frames,), (sink_frames, n)))
    x0 = draw.choice((0, draw.integer(0, head_dim - 2 * pairs)))  # at 0 long vectors fit
    shape_of_state = (batch, sink_frames * n, heads, head_dim)
    call = {
        "k_cache": draw.view(
            draw.numbers((batch, (sink_frames + window) * n, heads, head_dim), largest=2), written=True
        ),
        "v_cache": draw.view(
            draw.numbers((batch, (sink_frames + window) * n, heads, head_dim), largest=2), written=True
        ),
        "k_state": draw.numbers(shape_of_state, torch.float32 if stored == "float32" else None, largest=2),
        "k_state_lo": (
            draw.numbers(shape_of_state).mul(0 if draw.exact else 2**-9) if stored == "compensated" else None
        ),
        "v_state": None,
        "schedule": schedule if per_sample else schedule[0].contiguous(),
        "turns": turns if per_sample else turns[0].contiguous(),
        "alpha": alphas[torch.randint(0, len(alphas), shape, generator=draw.generator)],
    }
    if stored != "published":
        small = 0 if draw.exact else 2**-9
        values = draw.numbers(shape_of_state, torch.float32 if stored == "float32" else None, largest=2)
        call["v_state"] = values if stored == "float32" else values.mul(small)
    if draw.half and state == "published" and not draw.exact:
        call["alpha"] = torch.full((), 0.999, dtype=torch.float64)
    if pairs == 0 and stored == "published" and draw.chance():
        call["k_state"] = None
    options = {
        "frame_tokens": n,
        "state": state,
        "on_nonfinite": draw.choice(("skip", "propagate")),
        "temporal": draw.choice(((x0, x0 + 1, 2), (x0, x0 + pairs, 1))),
    }
    if draw.chance(0.3):  # a source that is not finite
        slot = draw.integer(sink_frames, sink_frames + window - 1)
        call["v_cache"][draw.integer(0, batch - 1), slot * n + draw.integer(0, n - 1), 0, 0] = float("inf")
        options["on_nonfinite"] = "skip"
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(3)]
    exact_call, eager_call = cloned(call), cloned(call)
    if stored == "published":  # else the oracle's own float64 between two stored values
        exact_call = doubled(call) if not draw.half else exact_call
    ref_ema.ema_evict(**exact_call, **options, skipped=counts[0])
    ref_ema.ema_evict(**eager_call, **options, skipped=counts[1])
    rf.ema_evict(**call, **options, skipped=counts[2])
    assert_equal_bits(counts[2], counts[0])
    for name in ("k_cache", "v_cache", "k_state", "k_state_lo", "v_state"):
        if call[name] is None:
            continue
        actual, exact, eager = call[name], exact_call[name], eager_call[name]
        if name == "v_cache" and draw.half and state == "published":
            assert torch.equal(actual, exact)  # bit for bit the eager rounding
        elif not draw.exact and name in ("k_state_lo", "v_state") and stored == "compensated":
            hi = ("k_state", "v_cache")[name == "v_state"]
            rows = slice(None) if hi == "k_state" else slice(0, sink_frames * n)
            sums = [c[hi][:, rows].double() + c[name].double() for c in (call, exact_call)]
            if sums[0].numel():
                bound = torch.finfo(draw.dtype).eps ** 2 * max(1.0, float(sums[1].abs().max()))
                assert float((sums[0] - sums[1]).abs().max()) <= bound * max(1, sources)
        else:
            compare(draw, actual, exact.double(), eager, ulps=3.0)
    draw.check_surroundings()


def fuzz_sink_window_attention(draw):
    batch, kv_heads, head_dim = (
        draw.integer(1, 3),
        draw.integer(1, 3),
        draw.choice((1, 2, 7, 16, 32, 64, 100, 128, 256)),
    )
    heads, queries = kv_heads * draw.integer(1, 3), draw.integer(1, 40)
    tokens = draw.choice((draw.integer(1, 20), draw.integer(21, 120)))
    options = {"kv_tokens": draw.choice((tokens, draw.integer(1, tokens)))}
    if draw.chance():
        queries = tokens
        cuts = sorted(draw.random.sample(range(1, tokens), draw.integer(0, min(5, tokens - 1))))
        few = draw.integer(1, 1 + tokens // 4)  # small sinks and windows lie apart: two intervals of keys
        window = draw.choice((None, 0, few, draw.integer(0, tokens + 3)))
        options = {
            "chunk_ends": [*cuts, tokens],
            "num_sink_tokens": draw.choice(
                (0, draw.integer(1, 1 + tokens // 4), draw.integer(0, tokens + 3))
            ),
            "num_window_tokens": window,
        }
    elif draw.chance():  # rows of their own, and a bias of keys
        own = [draw.integer(0, tokens) for _ in range(batch)]
        options["kv_tokens"] = draw.choice((options["kv_tokens"], torch.tensor(own, dtype=torch.int32)))
        if not draw.exact:
            options["kv_bias"] = torch.randn(batch, tokens, generator=draw.generator)
    q, k, v = (
        draw.numbers((batch, rows, h, head_dim))
        for rows, h in ((queries, heads), (tokens, kv_heads), (tokens, kv_heads))
    )
    options["softmax_scale"] = draw.choice((None, draw.random.uniform(0.01, 1.0)))
    if draw.exact:
        # Logits 2048 apart: the largest alone has a weight, 1. The op compares, and copies the value of the
        # winner.
        rank = torch.stack(
            [torch.randperm(tokens, generator=draw.generator) for _ in range(batch * kv_heads)]
        )
        k.zero_()[..., 0] = rank.view(batch, kv_heads, tokens).transpose(1, 2).to(k.dtype)
        sign = torch.randint(0, 2, q.shape[:3], generator=draw.generator) * 2 - 1
        q.zero_()[..., 0] = 2048.0 * sign
        options["softmax_scale"] = 1.0
    q, k, v = draw.view(q), draw.view(k), draw.view(v)
    grad_out = draw.numbers(q.shape)

    def run(function, inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out, lse = function(*leaves, **options, return_lse=True)
        if out.requires_grad:
            grads = torch.autograd.grad(out, leaves, grad_out.to(out.dtype), allow_unused=True)
            grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]
        else:
            grads = [torch.zeros_like(t) for t in leaves]
        return [out.detach(), lse.detach(), *grads]

    def eager(q, k, v, *, softmax_scale, return_lse, kv_bias=None, **options):
        """What eager PyTorch computes in the dtype of its inputs; its LSE is private: see lse_bound."""
        mask = visible(queries, tokens, **options).reshape(-1, 1, queries, tokens)
        seen = mask.any(-1).transpose(1, 2)[..., None]
        if kv_bias is not None:
            mask = torch.where(mask, kv_bias.expand(batch, -1)[:, None, None], -INF).to(q.dtype)
        k, v = (t.repeat_interleave(heads // kv_heads, 2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale).transpose(1, 2)
        return torch.where(seen, out, 0.0), exact[1].to(ours[1].dtype)

    ours = run(rf.sink_window_attention, (q, k, v))
    exact = run(ref_attention, (q.double(), k.double(), v.double()))
    lse_bound = HALF_LSE if draw.half else 0.0
    if draw.exact:
        # The gradients of q and k are sums of p (1 - p): zero in real numbers alone.
        for name, i in (("out", 0), ("gradient of v", 4)):
            assert torch.equal(ours[i], exact[i].to(ours[i].dtype)), name
    else:
        theirs = run(eager, (q, k, v))
        eps, largest = (
            torch.finfo(ours[1].dtype).eps,
            [float(t.double().abs().max()) for t in (q, k, v, grad_out)],
        )
        scale = options["softmax_scale"] or head_dim**-0.5
        logit = scale * head_dim * largest[0] * largest[1]
        lse_bound += (
            eps * (head_dim + 4) * logit
            + 2.0**-19 * (not draw.half and draw.dtype == torch.float32)
            + 64 * eps
        )
        # Where gradients cancel (one visible key, say), what is left is the rounding of the terms: D products
        # in float.
        weight = max(eps, 2.0**-20 * (draw.dtype != torch.float64))  # error of exp in PyTorch's kernels
        residue = 4 * weight * head_dim * scale * largest[2] * largest[3]
        floors = {
            0: 4 * weight * largest[2],
            2: residue * largest[1],
            3: residue * largest[0] * queries,
            4: 4 * weight * largest[3] * queries,
        }
        for i, name in {0: "out", 2: "gradient of q", 3: "gradient of k", 4: "gradient of v"}.items():
            difference = (ours[i].double() - exact[i]).abs()
            if not float(difference.max()) <= floors[i]:
                try:
                    assert_within_eager(
                        ours[i], exact[i], theirs[i], ulps=16.0 if draw.dtype == torch.float64 else 2.0
                    )
                except AssertionError as error:
                    raise AssertionError(f"{name}: {error}") from None
    infinite = exact[1].isinf()
    assert torch.equal(ours[1].isinf(), infinite)
    error = (ours[1].double() - exact[1])[~infinite].abs()
    assert not error.numel() or float(error.max()) <= lse_bound, f"lse: {float(error.max())} > {lse_bound}"
    draw.check_surroundings()


def fuzz_dmd_gradient(draw):
    shape = (
        draw.integer(1, 3),
        *(draw.integer(1, 7) for _ in range(draw.integer(0, 4))),
        draw.choice((1, 5, 64, 300)),
    )
    prediction = draw.choice((draw.dtype, torch.float32))
    flow = draw.chance() and not draw.exact
    values = {"x": draw.numbers(shape)} | {name: draw.numbers(shape, prediction) for name in ("fake", "real")}
    special = draw.choice(
        ("dropped", "silent", *[None] * 6)
    )  # a sample that is not finite; one with nothing to normalise by
    if special == "dropped":
        sample = values[draw.choice(("fake", "real"))][draw.integer(0, shape[0] - 1)].view(-1)
        sample[draw.integer(0, len(sample) - 1)] = draw.choice((float("nan"), float("inf"), -float("inf")))
    elif special == "silent":
        flow, values["real"][0] = False, values["x"][0].to(prediction)
        values["x"][0] = values["real"][0].to(draw.dtype)
    x, call = draw.view(values.pop("x")), {name: draw.view(value) for name, value in values.items()}
    arithmetic = torch.float64 if draw.dtype == torch.float64 else torch.float32
    for side in ("fake", "real")[: 1 if special == "silent" else 2]:
        if draw.chance():
            call[f"{side}_uncond"] = draw.numbers(shape, prediction)
            call[f"{side}_guidance"] = draw.choice((0.0, 1.0, 2.0) if draw.exact else (0.0, 1.5, 3.0))
    if flow:
        sizes = shape[: draw.integer(1, min(2, len(shape)))]
        call |= {
            "x_t": draw.numbers(shape, prediction),
            "sigma": torch.rand(sizes, generator=draw.generator).to(arithmetic),
        }

    def broadcast():
        sizes = draw.choice((shape[:1], shape[:2], shape, tuple(draw.choice((1, n)) for n in shape)))
        return torch.rand(sizes, generator=draw.generator)

    if draw.chance():
        w = broadcast()
        call["weight"] = ((w * 3).floor().exp2() if draw.exact else w).to(arithmetic)
    if draw.chance():
        call["mask"] = broadcast() > 0.4
    call["reduction"] = draw.choice(("sum", "none") if draw.exact else ("mean", "sum", "none"))
    call["normalize"] = not draw.exact and draw.chance(0.8)
    call["eps"] = 0.0 if special == "silent" else draw.choice((0.0, 1e-3))
    call["floor"] = 0.0 if special == "silent" else draw.choice((0.0, 1.0))
    call["nan"] = "sample" if special else draw.choice(("sample", "published"))
    gradient, aux = gradient_of(x, **call, return_aux=True)
    limit = {"limit": torch.finfo(prediction).max}
    exact = ref_dmd(x.double(), **doubled(call), **limit)
    wide = {
        k: v.to(arithmetic) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in call.items()
    }
    eager = ref_dmd(x.to(arithmetic), **wide, **limit)
    # The sums of a tile are trees of 11 roundings: 11 * 2^-24 = 6.6e-7, in the normaliser (so in the
    # gradient) and in the loss.
    compare(draw, gradient, exact.gradient, eager.gradient.to(draw.dtype), ulps=6.0)
    for name in ("loss", "per_sample_loss"):
        compare(draw, getattr(aux, name), getattr(exact, name), getattr(eager, name).to(arithmetic), ulps=6.0)
    for name in ("gradient_norm", "normalizer"):  # means: their division rounds
        ulps = 16.0 if arithmetic == torch.float64 else 6.0
        assert_within_eager(
            getattr(aux, name), getattr(exact, name), getattr(eager, name).to(arithmetic), ulps=ulps
        )
    assert int(aux.dropped) == int(exact.dropped) == (special == "dropped")
    loss_options = call | {"reduction": "sum"}
    leaf = x.detach().clone().requires_grad_()
    loss = loss_of(leaf, **loss_options)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert_equal_bits(grad, gradient_of(x, **loss_options))
    draw.check_surroundings()


def fuzz_stream(draw):
    """A whole stream: odd seeds in float64 against the plain recomputation of the rule, even seeds in any
    dtype, without positions, against averages of integers; chunks of any length, forwards, chunks taken back,
    saving, a cache that held another stream."""
    sink_frames, window = draw.integer(0, 3), draw.integer(1, 5)
    policy = draw.choice(("ema", "static")) if sink_frames else "none"
    alpha = draw.choice((0.0, 0.5, 1.0) if draw.exact else (0.5, 0.9, 0.999))
    grid, heads, head_dim = (
        (draw.integer(1, 2), draw.integer(1, 3)),
        draw.integer(1, 2),
        draw.choice((8, 16, 34)),
    )
    settings = {
        "layers": draw.integer(1, 2),
        "batch": draw.integer(1, 2),
        "heads": heads,
        "head_dim": head_dim,
        "grid": grid,
        "sink_frames": sink_frames,
        "window_frames": window,
        "undo_frames": sink_frames + window,
        "dtype": draw.dtype if draw.exact else torch.float64,
        "rope": None if draw.exact else rf.RoPE3D.wan(head_dim),
        "device": "cpu",
    }
    policies = {"ema": rf.EMASink(alpha), "static": rf.StaticSink(rephase=True), "none": rf.NoSink()}

    def new_cache():
        return rf.SinkWindowCache(rf.CacheSpec(**settings), sink=policies[policy])

    cache = new_cache()
    # bfloat16 has 8 bits: an integer below 4 can be halved five times beside another.
    longest = 4 if draw.exact else 10
    references = [
        StreamingReference(
            grid=grid, sink_frames=sink_frames, window_frames=window, policy=policy, alpha=alpha
        )
        for _ in range(cache.spec.layers)
    ]

    def inputs(frames):
        size = (cache.spec.batch, frames * cache.spec.frame_tokens, heads, head_dim)
        return [[draw.numbers(size, cache.spec.dtype, largest=3) for _ in range(3)] for _ in references]

    for chunk in range(longest):
        frames = draw.integer(1, min(3, window + max(0, sink_frames - cache.next_frame)))
        if draw.chance(0.2):  # another chunk, given up in the middle
            given_up = cache.open(frames, undo=True)
            given_up.append(0, *inputs(frames)[0])
            given_up.rollback()
        if draw.chance(0.2):
            saved, cache = cache.state_dict(), new_cache()
            other = cache.open(1)
            for layer, qkv in enumerate(inputs(1)):
                other.append(layer, *qkv)
            cache.load_state_dict(saved)
        opened = cache.open(frames)
        for reference in references:
            reference.begin(frames)
        for _ in range(draw.integer(1, 2)):
            for layer, (q, k, v) in enumerate(inputs(frames)):
                expected = references[layer].attend(q.double(), k, v)
                if draw.exact:
                    opened.append(layer, q, k, v)
                else:
                    out = opened.attend(layer, q, k, v)
                    assert relative_l2(out, expected) < 1e-12, f"chunk {chunk}, layer {layer}"
        opened.commit()
        if draw.exact:
            check_contents(cache, references)


def check_contents(cache, references):
    """Every valid slot holds the frame or average that the rule says, to the bit."""
    n = cache.spec.frame_tokens
    for layer, reference in enumerate(references):
        for held, frames in (
            (reference.sink_kv, reference.sink_kv),
            (reference.window_kv, reference.window_kv),
        ):
            for frame in frames:
                slot = cache.ring.slot(frame)
                for which, buffer in enumerate((cache.k, cache.v)):
                    found = buffer[layer][:, slot * n : (slot + 1) * n].double()
                    assert torch.equal(found, held[frame][which]), (
                        f"layer {layer}, frame {frame}, {'kv'[which]}"
                    )


FUZZERS = {
    "rope_append": fuzz_rope_append,
    "rope": fuzz_rope,
    "ema_evict": fuzz_ema_evict,
    "sink_window_attention": fuzz_sink_window_attention,
    "dmd_gradient": fuzz_dmd_gradient,
    "stream": fuzz_stream,
}


def run(op: str, seeds) -> list[str]:
    """Try every seed; the failures, each with the line that repeats it."""
    failures = []
    for seed in seeds:
        try:
            FUZZERS[op](Draw(op, seed))
        except Exception as error:  # whatever it is: a failure of this configuration
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error}"[:300]
            failures.append(
                f"python tests/helpers/fuzz.py --op {op} --seed {seed}\n    {text}"
                f" ({Path(where.filename).name}:{where.lineno})"
            )
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description="Differential fuzzing against the float64 oracle.")
    parser.add_argument("--op", choices=[*FUZZERS, "all"], default="all")
    parser.add_argument("--seeds", default="0:200", help="first:last+1")
    parser.add_argument("--seed", type=int, help="one configuration, with its traceback")
    arguments = parser.parse_args()
    ops = list(FUZZERS) if arguments.op == "all" else [arguments.op]
    if arguments.seed is not None:
        for op in ops:
            FUZZERS[op](Draw(op, arguments.seed))
        return 0
    first, last = map(int, arguments.seeds.split(":"))
    bad = 0
    for op in ops:
        start = time.time()
        failures = run(op, range(first, last))
        bad += len(failures)
        print(
            f"{op:24} {last - first} configurations, {len(failures)} failures, {time.time() - start:.1f} s",
            flush=True,
        )
        for failure in failures:
            print(failure)
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
