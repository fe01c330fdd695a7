"""The catalogue of wrong calls: one call per line, the public function, the argument that the error must
name, and what is wrong with it. Each is a right call (``World``) with one thing changed."""

import re

import pytest
import torch

import rf_kernels as rf


class World:
    """A right call of every public function, on fresh tensors."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=g)

        angles, axes = rf.RoPE3D.wan(8).table([[3, 4], [0], [0, 1]])
        self.rope_append = {
            "q": randn(2, 4, 4, 8),
            "k": randn(2, 4, 2, 8),
            "v": randn(2, 4, 2, 8),
            "k_cache": randn(2, 12, 2, 8),
            "v_cache": randn(2, 12, 2, 8),
            "slots": torch.tensor([1, 3], dtype=torch.int32),
            "angles": angles,
            "axes": axes,
            "q_weight": randn(32),
            "k_weight": randn(16),
        }
        self.rope = {"x": randn(2, 4, 4, 8), "angles": angles.clone(), "axes": axes, "weight": randn(32)}
        half = {"k_cache": randn(2, 12, 2, 8).bfloat16(), "v_cache": randn(2, 12, 2, 8).bfloat16()}
        state = {
            name: torch.zeros(2, 4, 2, 8, dtype=torch.bfloat16)
            for name in ("k_state", "k_state_lo", "v_state")
        }
        self.ema_evict = (
            half
            | state
            | {
                "schedule": torch.tensor([[1, 1, 2, 0], [1, 2, 3, 4]], dtype=torch.int32),
                "turns": randn(2, 3, 2, 2),
                "alpha": torch.tensor([0.5, 0.9], dtype=torch.float64),
                "frame_tokens": 2,
                "temporal": (0, 1, 2),
                "skipped": torch.zeros(1, dtype=torch.int64),
            }
        )
        self.sink_window_attention = {
            "q": randn(2, 6, 4, 8),
            "k": randn(2, 9, 2, 8),
            "v": randn(2, 9, 2, 8),
            "kv_tokens": 7,
        }
        self.dmd_gradient = {
            "x": randn(2, 3, 4, 5),
            "fake": randn(2, 3, 4, 5),
            "real": randn(2, 3, 4, 5),
            "real_uncond": randn(2, 3, 4, 5),
            "real_guidance": 3.0,
            "weight": randn(2),
            "mask": randn(2, 3) > 0,
            "x_t": randn(2, 3, 4, 5),
            "sigma": torch.rand(2, generator=g),
        }
        self.dmd_loss = self.dmd_gradient
        self.reward_weight = {"r": randn(2), "beta": 2.0}
        self.cache = {
            "layers": 2,
            "batch": 1,
            "heads": 2,
            "head_dim": 8,
            "grid": (1, 2),
            "sink_frames": 2,
            "window_frames": 3,
            "rope": rf.RoPE3D.wan(8),
            "dtype": torch.float32,
            "undo_frames": 2,
            "device": "cpu",
        }
        self.sink = rf.EMASink()

    def tensors(self):
        """All tensors that a call could change."""
        calls = (self.rope_append, self.rope, self.ema_evict, self.sink_window_attention, self.dmd_gradient)
        return [
            v
            for call in calls
            for v in call.values()
            if isinstance(v, torch.Tensor) and v.device.type == "cpu"
        ]


def meta(t):
    return t.to("meta")


def strided(t):
    """The same numbers, the last dimension not contiguous."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def twice(t):
    """One address for all samples."""
    return t[:1].expand_as(t)


def sparse(t):
    return t.to_sparse()


def needs_grad(t):
    return t.clone().requires_grad_()


def not_a_tensor(t):
    return [1.0]


def nothing(t):
    return None


# Changes of a tensor that every op refuses for every tensor it is given, by the argument's role.
DATA = {
    "one dimension less": lambda t: t[0],
    "int32": lambda t: t.int(),
    "on meta": meta,
    "sparse": sparse,
    "a list": not_a_tensor,
    "None": nothing,
    "float16 among float32": lambda t: t.half() if t.dtype != torch.float16 else t.float(),
}
STRIDE = {"last dimension strided": strided}
GRAD = {"requires grad": needs_grad}
SELF_OVERLAP = {"one address for all samples": twice}


def argument(name, change):
    def edit(call):
        call[name] = change(call[name])

    return edit


def value(name, x):
    return lambda call: call.__setitem__(name, x)


def slot(*values):
    return value("slots", torch.tensor(values, dtype=torch.int32))


def plan(*rows):
    return value("schedule", torch.tensor(rows, dtype=torch.int32))


def alias(name, other, change=lambda t: t):
    """``name`` lies in the memory of ``other``."""
    return lambda call: call.__setitem__(name, change(call[other]))


def overlapping(first, second, shift):
    """Both are views of one buffer, ``shift`` elements apart."""

    def edit(call):
        t = call[first]
        buffer = torch.zeros(t.numel() + shift, dtype=t.dtype)
        call[first], call[second] = buffer[: t.numel()].view(t.shape), buffer[shift:].view(t.shape)

    return edit


def op_entries():
    """(function, argument named by the error, what is wrong, edit of the right call)."""
    entries = []

    def add(function, named, what, edit):
        entries.append((function, named, what, edit))

    def add_all(function, names, *groups):
        for name in names:
            for group in groups:
                for what, change in group.items():
                    add(function, name, what, argument(name, change))

    # ---- rope_append
    op = "rope_append"
    add_all(op, ("k", "v", "k_cache", "v_cache"), DATA, STRIDE, GRAD)
    for what, change in (
        STRIDE | GRAD | {"one dimension less": DATA["one dimension less"], "a list": not_a_tensor}
    ).items():
        add(op, "q", what, argument("q", change))
    add(op, "q", "int32", lambda c: c.update({n: c[n].int() for n in ("q", "k", "v", "k_cache", "v_cache")}))
    add_all(op, ("k_cache", "v_cache"), SELF_OVERLAP)
    add_all(
        op,
        ("q_weight", "k_weight"),
        GRAD,
        {
            "on meta": meta,
            "float64": torch.Tensor.double,
            "too long": lambda t: t.repeat(2),
            "two dimensions": lambda t: t[None],
            "strided": lambda t: t.repeat(2)[::2],
        },
    )
    add(op, "v", "fewer heads than k", argument("k", lambda t: t.repeat(1, 1, 2, 1)))
    add(op, "k_cache", "other heads", argument("k_cache", lambda t: t[:, :, :1]))
    add(op, "v_cache", "fewer tokens than k_cache", argument("v_cache", lambda t: t[:, :10]))
    add(op, "k_cache", "overlaps v_cache", overlapping("k_cache", "v_cache", 8))
    for other in ("q", "k", "v"):
        for cache in ("k_cache", "v_cache"):
            heads = slice(None, 2) if other != "q" else slice(None)
            size = 4 if other == "q" else 2
            add(
                op,
                cache,
                f"holds {other}",
                lambda c, o=other, a=cache, h=heads, s=size: c.__setitem__(
                    o, c[a].reshape(2, -1)[:, : 4 * s * 8].view(2, 4, s, 8)[:, :, h]
                ),
            )
    add(op, "k_cache", "holds k_weight", lambda c: c.__setitem__("k_weight", c["k_cache"].view(-1)[:16]))
    add(op, "v_cache", "holds q_weight", lambda c: c.__setitem__("q_weight", c["v_cache"].view(-1)[:32]))
    for what, edit in {
        "beyond the cache": slot(1, 6),
        "negative": slot(-1, 2),
        "far beyond": slot(0, 2**31 - 1),
        "twice the same": slot(2, 2),
        "a number that does not divide N": slot(0, 1, 2),
        "none": slot(),
        "int64": value("slots", torch.tensor([1, 3])),
        "three dimensions": value("slots", torch.zeros(1, 1, 2, dtype=torch.int32)),
        "on meta": argument("slots", meta),
        "of another batch": value("slots", torch.tensor([[0, 1]] * 3, dtype=torch.int32)),
        "a list": value("slots", [1, 3]),
        "beyond the cache in the second sample": value(
            "slots", torch.tensor([[0, 1], [2, 9]], dtype=torch.int32)
        ),
    }.items():
        add(op, "slots", what, edit)
    for function in (op, "rope"):
        for what, change in {
            "float64": torch.Tensor.double,
            "on meta": meta,
            "three columns": lambda t: t.repeat(1, 1, 2)[..., :3],
            "of another batch": lambda t: t.expand(3, -1, -1),
            "two dimensions": lambda t: t[0],
            "strided": strided,
        }.items():
            add(function, "angles", what, argument("angles", change))
        for what, axes in {
            "other tokens": [3, 2, 0, 1, 1, 6, 2, 1, 7],
            "two integers": [2, 2],
            "beyond the table": [2, 2, 90, 1, 1, 4, 2, 1, 5],
            "negative offset": [2, 2, -1, 1, 1, 4, 2, 1, 5],
            "negative length": [-2, 2, 0, 1, 1, 4, 2, 1, 5],
            "more pairs than half a head": [2, 5, 0, 1, 0, 0, 2, 0, 0],
            "none, with angles": [],
            "nine": [1, 0, 0] * 9,
            "an integer": 3,
            "fractions": [0.5, 1, 0],
            "product of 2^62": [2**31 - 1, 0, 0, 2**31 - 1, 0, 0],
        }.items():
            add(function, "axes", what, value("axes", axes))
        add(function, "axes", "without angles", value("angles", None))
        for name, wrong in {
            "layout": ("interleaved", 0, None, []),
            "norm": ("rms", 1, []),
            "eps": (-1.0, float("nan"), float("inf"), "x"),
        }.items():
            for x in wrong:
                add(function, name, repr(x), value(name, x))
        add(function, "norm", "None, with weights", value("norm", None))
    add_all(
        "rope",
        ("x",),
        STRIDE,
        {"one dimension less": lambda t: t[0], "int32": torch.Tensor.int, "a list": not_a_tensor},
    )
    add("rope", "x", "None", lambda c: c.update(x=None, angles=None, weight=None, axes=[]))
    add_all(
        "rope", ("weight",), {"on meta": meta, "float64": torch.Tensor.double, "too short": lambda t: t[:8]}
    )

    # ---- ema_evict
    op = "ema_evict"
    add_all(
        op, ("k_cache", "v_cache"), STRIDE, GRAD, SELF_OVERLAP, {"sparse": sparse, "a list": not_a_tensor}
    )
    add_all(
        op,
        ("v_cache", "k_state", "k_state_lo", "v_state"),
        {k: DATA[k] for k in ("one dimension less", "on meta", "int32", "float16 among float32")},
    )
    add_all(
        op,
        ("k_state", "k_state_lo", "v_state"),
        GRAD,
        {
            "None": nothing,
            "strided": strided,
            "a frame too short": lambda t: t[:, :2],
            "other heads": lambda t: t[:, :, :1],
            "a list": not_a_tensor,
        },
    )
    add(op, "k_cache", "one dimension less", argument("k_cache", lambda t: t[0]))
    add(op, "k_cache", "int32", lambda c: c.update(k_cache=c["k_cache"].int(), v_cache=c["v_cache"].int()))
    add(op, "v_cache", "fewer tokens than k_cache", argument("v_cache", lambda t: t[:, :10]))
    add(
        op,
        "k_state_lo",
        "with a float32 cache",
        lambda c: c.update({n: c[n].float() for n in ("k_cache", "v_cache", "k_state", "k_state_lo")}),
    )
    add(op, "v_state", "with the published state", lambda c: c.update(state="published", k_state_lo=None))
    add(op, "k_state", "bfloat16 with state float32", lambda c: c.update(state="float32", k_state_lo=None))
    for first, second in (
        ("v_cache", "k_cache"),
        ("k_state_lo", "k_state"),
        ("v_state", "k_state"),
        ("v_state", "k_state_lo"),
    ):
        add(op, first, f"is {second}", alias(first, second))
        add(op, first, f"overlaps {second}", overlapping(second, first, 8))
    for state in ("k_state", "k_state_lo", "v_state"):
        for cache in ("k_cache", "v_cache"):
            add(
                op,
                state,
                f"lies in {cache}",
                alias(state, cache, lambda t: t.view(-1)[8 : 8 + 128].view(2, 4, 2, 8)),
            )
    add(
        op,
        "k_cache",
        "holds turns",
        lambda c: c.update(turns=c["k_cache"].view(-1)[:48].view(torch.float32).view(2, 3, 2, 2)),
    )
    add(op, "v_cache", "holds alpha", lambda c: c.update(alpha=c["v_cache"].view(-1)[:8].view(torch.float64)))
    add(
        op,
        "skipped",
        "lies in v_state",
        lambda c: c.update(skipped=c["v_state"].view(-1)[:4].view(torch.int64)),
    )
    for what, edit in {
        "a sink slot as source": plan([1, 1, 1, 0], [1, 0, 0, 0]),
        "beyond the cache": plan([1, 1, 6, 0], [1, 0, 0, 0]),
        "negative": plan([1, 1, -1, 0], [1, 0, 0, 0]),
        "init 2": plan([2, 0, 0, 0], [1, 0, 0, 0]),
        "count beyond E": plan([1, 3, 2, 3], [1, 0, 0, 0]),
        "negative count": plan([1, -1, 2, 3], [1, 0, 0, 0]),
        "one source twice": plan([1, 1, 2, 0], [1, 1, 2, 0]),
        "one column": plan([1], [1]),
        "of another batch": value("schedule", torch.zeros(3, 2, 4, dtype=torch.int32)),
        "int64": argument("schedule", torch.Tensor.long),
        "strided": argument("schedule", strided),
        "on meta": argument("schedule", meta),
        "more sink frames than slots": value("schedule", torch.zeros(7, 4, dtype=torch.int32)),
        "one dimension": argument("schedule", lambda t: t[0]),
    }.items():
        add(op, "schedule", what, edit)
    for what, change in {
        "float64": torch.Tensor.double,
        "on meta": meta,
        "three dimensions": lambda t: t[0],
        "of another batch": lambda t: t.expand(3, 2, 3, 2, 2),
        "other sink frames": lambda t: t[:1],
        "other sources": lambda t: t[:, :2],
        "five pairs": lambda t: t.repeat(1, 1, 3, 1)[:, :, :5],
        "three columns": lambda t: t.repeat(1, 1, 1, 2)[..., :3],
        "strided": strided,
    }.items():
        add(op, "turns", what, argument("turns", change))
    for what, x in {
        "above 1": 1.5,
        "below 0": -0.1,
        "nan": float("nan"),
        "text": "x",
        "None": None,
        "float32": torch.tensor(0.5),
        "on meta": torch.zeros((), dtype=torch.float64, device="meta"),
        "three numbers": torch.full((3,), 0.5, dtype=torch.float64),
        "one above 1": torch.tensor([0.5, 1.5], dtype=torch.float64),
        "nan in a tensor": torch.tensor([0.5, float("nan")], dtype=torch.float64),
        "other tokens": torch.full((2, 3), 0.5, dtype=torch.float64),
        "three dimensions": torch.full((2, 2, 1), 0.5, dtype=torch.float64),
    }.items():
        add(op, "alpha", what, value("alpha", x))
    for name, wrong in {
        "frame_tokens": (0, -2, 5, 2.0, "2", None),
        "temporal": ((0, 1), (0, 1, 1), (-1, 0, 2), (6, 7, 2), (0, 7, 1), (0, 1, 3), 3, "012"),
        "state": ("fp32", 0, None, []),
        "on_nonfinite": ("raise", True, None),
        "skipped": (torch.zeros(1), torch.zeros(2, dtype=torch.int64), 3),
    }.items():
        for x in wrong:
            add(op, name, repr(x), value(name, x))

    # ---- sink_window_attention
    op = "sink_window_attention"
    add_all(op, ("k", "v"), DATA, STRIDE)
    add_all(
        op,
        ("q",),
        STRIDE,
        {"one dimension less": lambda t: t[0], "sparse": sparse, "a list": not_a_tensor, "None": nothing},
    )
    for name, wrong in {
        "kv_tokens": (-1, 10, 2**62, 2.5, "3", [3]),
        "softmax_scale": (0.0, -1.0, float("nan"), float("inf"), "x"),
        "chunk_ends": (6, "6", 0.5),
        "num_sink_tokens": (1, -1, 1.5, None),
        "num_window_tokens": (0, 3, 1.5),
    }.items():
        for x in wrong:
            add(op, name, repr(x), value(name, x))

    # ---- the losses
    for op in ("dmd_gradient", "dmd_loss"):
        add_all(
            op,
            ("fake", "real", "real_uncond", "x_t"),
            {k: DATA[k] for k in ("one dimension less", "on meta", "sparse", "a list", "int32")},
        )
        add_all(
            op,
            ("weight", "mask", "sigma"),
            {
                "on meta": meta,
                "sparse": sparse,
                "a list": not_a_tensor,
                "three samples": lambda t: t[:1].repeat(3, *(1,) * (t.dim() - 1)),
                "two frames of three": lambda t: t.reshape(2, -1)[:, :1].repeat(1, 2),
            },
        )
        add_all(op, ("x", "fake", "real"), {"None": nothing})
        add(op, "x", "a list", argument("x", not_a_tensor))
        add(op, "x", "int32", argument("x", torch.Tensor.int))
        add(op, "x", "no dimension", value("x", torch.tensor(1.0)))
        add(op, "x", "ten dimensions", value("x", torch.zeros((1,) * 10)))
        add_all(
            op,
            ("fake", "real", "real_uncond"),
            {"one sample": lambda t: t[:1], "float64": torch.Tensor.double},
        )
        add_all(op, ("real_uncond", "x_t", "sigma"), {"None": nothing})
        add(op, "x_t", "half", argument("x_t", torch.Tensor.half))
        add(op, "sigma", "four frames", value("sigma", torch.rand(2, 4)))
        for name, what, x in (
            ("weight", "of integers", torch.ones(2, dtype=torch.int64)),
            ("weight", "of other frames", torch.rand(2, 5)),
            ("mask", "of bytes", torch.ones(2, dtype=torch.uint8)),
        ):
            add(op, name, what, value(name, x))
        for name, wrong in {
            "real_guidance": (None, float("nan"), "x"),
            "fake_guidance": (float("inf"), [1.0]),
            "options": (None, {"nan": "sample"}, rf.DMDOptions),
        }.items():
            for x in wrong:
                add(op, name, repr(x), value(name, x))
    add("reward_weight", "r", "int64", argument("r", torch.Tensor.long))
    add("reward_weight", "r", "a number", value("r", 1.0))
    for x in (float("nan"), float("inf"), "x", None):
        add("reward_weight", "beta", repr(x), value("beta", x))
    return entries


DMD_OPTIONS = {
    "eps": (-1.0, float("nan"), float("inf"), None, "x"),
    "floor": (-1.0, float("nan"), float("inf"), None, "x"),
    "nan": ("skip", 1, None),
    "guidance": ("cfg", 1, None),
    "reduction": ("batchmean", None, 1),
}
CONFIGURATIONS = {
    "layers": (0, 1.5, True),
    "batch": (0, None),
    "heads": (0, "2", 2**70),
    "head_dim": (0, -8),
    "grid": ((0, 2), (1.5, 2), "ab", 4),
    "sink_frames": (-1, 1.0),
    "window_frames": (-1, 0, "3"),
    "undo_frames": (-1, 6),
    "dtype": (torch.int32, torch.complex64, None),
    "device": ("nowhere", 1.5),
    "sink": (rf.NoSink(), "ema", rf.EMASink, None),
    "rope": (rf.RoPE3D.wan(64), "wan", rf.RoPE((2,), (1e4,))),
    "sink.held": (rf.EMASink(held=(2,)), rf.EMASink(held=(-1,))),
    "sink.alpha": (rf.EMASink([0.5] * 3), rf.EMASink([[0.5]])),
}
POLICIES = {
    "alpha": (1.5, -0.1, float("nan"), "x", None, [0.5, 2.0], [[0.5], [0.5, 0.5]], 10**400, [10**400]),
    "held": (3, (0.5,), "0"),
    "state": ("fp8", None, []),
    "on_nonfinite": ("ignore", True),
    "rephase": (1, None, "yes"),
}
ROPES = {
    "pairs": ((-1, 2, 2), (1.5, 2, 2), 3, None),
    "bases": ((1e4,), (0.0, 1.0, 1.0), (1.0, 1.0, float("nan")), ("x", 1.0, 1.0), (10**400, 1.0, 1.0), None),
    "layout": ("neox", None),
    "temporal_axis": (3, -1),
    "given": (3, ((1.0, 2.0), None), ((1.0, 10**400), None, None), (("x", 1.0), None, None)),
}


def refused(call, argument=None):
    """The error of a call, which must be an ArgumentError in the one form that all of them have."""
    with pytest.raises(rf.ArgumentError) as caught:
        call()
    text = str(caught.value)
    found = re.fullmatch(
        r"rf_kernels\.([\w.]+): argument `([^`]+)`: expected (.+), found (.+)", text, re.DOTALL
    )
    assert found, text
    assert argument is None or argument == found[2], f"names `{found[2]}`, not `{argument}`: {text}"
    return found
