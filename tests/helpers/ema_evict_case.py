"""Random calls of ema_evict, for its tests."""

import itertools

import numpy as np
import torch

import rf_kernels as rf
from rf_kernels.reference.ema_evict import ema_evict as reference
from rf_kernels.testing import assert_equal_bits

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)
STATES = ("compensated", "float32", "published")
WAN = rf.RoPE3D.wan(16)  # 4 temporal pairs of 8
LAYOUTS = {
    "adjacent": rf.RoPE((4, 2, 2), (1e4,) * 3, "adjacent"),
    "adjacent_tail": rf.RoPE(
        (3, 2, 1), (1e4,) * 3, "adjacent"
    ),  # dims 12.. are not rotated; 6 temporal dims of a vector
    # the temporal span starts at dim 4
    "adjacent_second": rf.RoPE((2, 5, 1), (1e4,) * 3, "adjacent", temporal_axis=1),
    "half": rf.RoPE((4, 2, 2), (1e4,) * 3, "half"),
    "axis_half": rf.RoPE((3, 3, 2), (1e4,) * 3, "axis_half"),
    "all_temporal": rf.RoPE((8,), (1e4,), "half"),
    "none": rf.RoPE((0, 4, 4), (1e4,) * 3, "adjacent"),
}


def turn_table(rope, deltas, dtype):
    """R_t for nested lists of frame distances: [..., nt, 2] in the dtype the op wants."""
    deltas = np.asarray(deltas)
    table = torch.from_numpy(rope.temporal_table(deltas.reshape(-1)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return table.to(wide).reshape(*deltas.shape, rope.temporal_pairs, 2)


class Case:
    """Arguments of one call: a random cache, its state, a schedule. ``tensors`` are those the op writes, in
    order."""

    def __init__(
        self, dtype, state, *, rope=WAN, head_dim=16, batch=2, n=5, heads=3, schedule=None, window=5, seed=0
    ):
        generator = torch.Generator().manual_seed(seed)
        schedule = [[0, 2, 3, 4], [1, 1, 6, 0]] if schedule is None else schedule
        schedule = torch.tensor(schedule, dtype=torch.int32)
        self.sink_frames, width = schedule.shape[-2:]
        frames = self.sink_frames + window

        def normal(tokens, kind, scale=1.0):
            full = torch.randn(batch, tokens, heads, head_dim, generator=generator, dtype=torch.float64)
            return (full * scale).to(kind)

        self.k, self.v = normal(frames * n, dtype), normal(frames * n, dtype)
        tokens, precision = self.sink_frames * n, state if dtype in HALF else "published"
        self.k_state = normal(tokens, torch.float32 if precision == "float32" else dtype)
        self.k_lo = self.v_state = None
        if precision == "compensated":
            self.k_lo = (self.k_state.double() * torch.finfo(dtype).eps / 7).to(dtype)
            self.v_state = (self.v[:, :tokens].double() * torch.finfo(dtype).eps / 9).to(dtype)
        elif precision == "float32":
            self.v_state = self.v[:, :tokens].float() * (1 + 2.0**-13)
        deltas = torch.randint(-40, 40, (*schedule.shape[:-1], width - 1), generator=generator).numpy()
        self.skipped = torch.zeros(1, dtype=torch.int64)
        self.options = dict(
            schedule=schedule,
            turns=turn_table(rope, deltas, dtype),
            alpha=0.9,
            frame_tokens=n,
            temporal=rope.temporal_dims,
            state=state,
            skipped=self.skipped,
        )

    @property
    def tensors(self):
        return [self.k, self.v, self.k_state, self.k_lo, self.v_state]

    def run(self, function=rf.ema_evict, **changes):
        """A call on copies; returns what it wrote (with the counter last)."""
        options = {**self.options, **changes}
        copies = [None if t is None else t.clone() for t in self.tensors]
        options["skipped"] = self.skipped.clone()
        function(*copies, **options)
        return [*copies, options["skipped"]]

    def wide(self, function=reference, **changes):
        """The same call in float64: (k, v, k state, v state)."""
        n_sink = self.sink_frames * self.options["frame_tokens"]
        k, v, k_state = (t.double().clone() for t in (self.k, self.v, self.k_state))
        if self.k_lo is not None:
            k_state += self.k_lo.double()
            v[:, :n_sink] += self.v_state.double()
        elif self.v_state is not None:
            v[:, :n_sink] = self.v_state.double()
        options = {**self.options, **changes, "turns": self.options["turns"].double()}
        options["skipped"] = self.skipped.clone()
        # init takes the rounded slot, not the state
        for b, j in itertools.product(range(k.shape[0]), range(self.sink_frames)):
            plan = options["schedule"].expand(k.shape[0], *options["schedule"].shape[-2:])
            if plan[b, j, 0]:
                rows = slice(j * options["frame_tokens"], (j + 1) * options["frame_tokens"])
                v[b, rows] = self.v[b, rows].double()
        function(k, v, k_state, **options)
        return k, v, k_state, v[:, :n_sink]


def joined(case, out):
    """(k, v, k state, v state) of a result in float64, whatever the state's storage."""
    k, v, k_state, k_lo, v_state, _ = out
    n_sink = k_state.shape[1]
    k_joined, v_joined = k_state.double(), v[:, :n_sink].double()
    if k_lo is not None:
        k_joined, v_joined = k_joined + k_lo.double(), v_joined + v_state.double()
    elif v_state is not None:
        v_joined = v_state.double()
    return k.double(), v.double(), k_joined, v_joined


def equal(a, b):
    for x, y in zip(a, b, strict=True):
        if x is not None:
            assert_equal_bits(x, y)


def eager(k, v, k_state, *, schedule, turns, alpha, frame_tokens, temporal, **_):
    """The formula in plain PyTorch in the dtype of the cache, everything rounded at every step: the yardstick
    of tolerances."""
    n, (x0, y0, step), nt = frame_tokens, temporal, turns.shape[-2]

    def turn(x, table):
        first, second = (slice(d, d + (nt - 1) * step + 1, step) for d in (x0, y0))
        cos, sin = table.to(x.dtype).unbind(-1)
        out = x.clone()
        if nt:
            out[..., first] = x[..., first] * cos - x[..., second] * sin
            out[..., second] = x[..., first] * sin + x[..., second] * cos
        return out

    for j, (init, count, *sources) in enumerate(schedule.tolist()):
        rows = slice(j * n, (j + 1) * n)
        if init:
            k_state[:, rows] = k[:, rows]
        for i, e in enumerate(sources[:count]):
            source = slice(e * n, (e + 1) * n)
            k_state[:, rows] = alpha * k_state[:, rows] + (1 - alpha) * turn(k[:, source], turns[j, i])
            v[:, rows] = alpha * v[:, rows] + (1 - alpha) * v[:, source]
        k[:, rows] = turn(k_state[:, rows], turns[j, -1])


def op_arguments(case, **changes):
    o = {**case.options, **changes}
    alpha = torch.tensor(o["alpha"], dtype=torch.float64)
    states = STATES.index(o["state"])
    return (
        *case.tensors,
        o["schedule"],
        o["turns"],
        alpha,
        o["frame_tokens"],
        list(o["temporal"]),
        states,
        True,
        case.skipped,
    )
