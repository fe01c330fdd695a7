"""Cases of ``ema_evict``: three leaving frames are fused into the three sink frames of one layer, keys
re-phased.

- ema_evict: ours, with the state in the precision that the case names.
- eager: the best of plain PyTorch on the same ring: in-place lerp on a float32 state (of the cache's dtype
  for float32 and float64), rotation in complex64. Its values are averaged in the cache's dtype where the
  state is "published".
``layer.py`` times it together with the append, beside the published roll, average, write and concatenation.
"""

from functools import partial

import torch

from rf_kernels.ops.ema_evict import ema_evict
from rf_kernels.positions import RoPE3D

from . import floors
from .case import Case, agree
from .rope_append import rotate

SINK_FRAMES, WINDOW_FRAMES, ALPHA = 3, 6, 0.999
NAMES = ("ema_evict", "eager")


def problem(
    grid, heads: int, head_dim: int, dtype: torch.dtype, state: str, device: str
) -> tuple[tuple, dict]:
    """Caches, states and options of a call in the middle of a stream: frames in slots S..2S-1 leave, the sink
    moves on by 30."""
    n, rope = grid[0] * grid[1], RoPE3D.wan(head_dim)
    tokens = SINK_FRAMES * n
    caches = [
        torch.randn(1, (SINK_FRAMES + WINDOW_FRAMES) * n, heads, head_dim, device=device).to(dtype)
        for _ in range(2)
    ]
    half = dtype.itemsize == 2
    states = [
        caches[0][:, :tokens].to(torch.float32 if half and state == "float32" else dtype, copy=True),
        None,
        None,
    ]
    if half and state == "compensated":
        states[1:] = torch.zeros_like(states[0]), torch.zeros_like(states[0])
    elif half and state == "float32":
        states[2] = caches[1][:, :tokens].float()
    deltas = [d for _ in range(SINK_FRAMES) for d in (-SINK_FRAMES, 30)]
    table = torch.from_numpy(rope.temporal_table(deltas)).reshape(SINK_FRAMES, 2, rope.temporal_pairs, 2)
    options = {
        "schedule": torch.tensor(
            [[0, 1, SINK_FRAMES + j] for j in range(SINK_FRAMES)], dtype=torch.int32, device=device
        ),
        "turns": table.to(device, torch.float64 if dtype == torch.float64 else torch.float32),
        "alpha": torch.tensor(ALPHA, dtype=torch.float64, device=device),
        "frame_tokens": n,
        "temporal": rope.temporal_dims,
        "state": state,
    }
    return (*caches, *states), options


def build(grid, heads: int, head_dim: int, dtype: torch.dtype, state: str, device: str) -> dict:
    arguments, options = problem(grid, heads, head_dim, dtype, state, device)
    tokens = SINK_FRAMES * grid[0] * grid[1]
    k, v = (t.clone() for t in arguments[:2])
    wide = torch.float32 if dtype.itemsize == 2 and state != "published" else dtype
    k_state, v_state = k[:, :tokens].to(wide, copy=True), v[:, :tokens].to(wide, copy=True)
    turns = torch.ones(2, head_dim // 2, dtype=torch.complex64, device=device)
    turns[:, : options["turns"].shape[2]] = torch.view_as_complex(
        options["turns"][0].to(torch.float32).contiguous()
    )
    source = slice(tokens, 2 * tokens)

    def ours():
        ema_evict(*arguments, **options)
        return arguments[0][:, :tokens], arguments[1][:, :tokens]

    def eager():
        k_state.lerp_(rotate(k[:, source], turns[0]).to(wide), 1 - ALPHA)
        k[:, :tokens] = rotate(k_state, turns[1])
        v_state.lerp_(v[:, source].to(wide), 1 - ALPHA)
        v[:, :tokens] = v_state
        return k[:, :tokens], v[:, :tokens]

    calls = {"ema_evict": ours, "eager": eager}
    agree(calls, ulps=2)
    return calls


def cases() -> list[Case]:
    heads, head_dim, found = 12, 128, []
    for grid in ((15, 26), (30, 52)):
        for dtype, state in (
            (torch.float32, "published"),
            (torch.bfloat16, "compensated"),
            (torch.bfloat16, "float32"),
            (torch.bfloat16, "published"),
            (torch.float16, "float32"),
        ):
            name = "the cache's own precision" if dtype == torch.float32 else f"state {state}"
            tokens = grid[0] * grid[1]
            label = f"3 frames of {grid[0]}x{grid[1]}, {name} [1, {3 * tokens}, {heads}, {head_dim}]"
            cost = floors.ema_evict(
                batch=1,
                sink_frames=SINK_FRAMES,
                frame_tokens=tokens,
                heads=heads,
                head_dim=head_dim,
                dtype=dtype,
                temporal_pairs=RoPE3D.wan(head_dim).temporal_pairs,
                state=state,
            )
            call = partial(build, grid, heads, head_dim, dtype, state)
            found.append(Case("ema_evict", label, dtype, NAMES, call, cost, quick=grid == (15, 26)))
    return found
