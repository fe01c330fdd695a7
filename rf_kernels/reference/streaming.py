"""Streaming attention over a sink and a window, recomputed plainly in float64: the rule of the library,
without its ring.

Raw keys (normalised, never rotated) and values of every frame are kept in a dictionary by frame; every
forward rotates what it reads and runs one softmax. The rule, with S sink frames, W window frames, L = S + W,
and a chunk of the frames [t_begin, t_end):

- The sink holds frames 0..S-1; slots that were never written are not attended.
- When a chunk begins, frames e with max(S, t_begin - W) <= e < t_end - W leave the window, in ascending
  order; with the policy "ema" each is absorbed by sink frame j = (e - S) mod S, keys and values alike:
  ``sink_j <- alpha sink_j + (1 - alpha) x_e`` (Reward Forcing, arXiv 2512.04678). With "static" and "none" it
  is dropped.
- Queries see sink frame j at the temporal position j + max(0, t_end - L), and the newest W frames (sink
  frames apart) at their own.
- A chunk that starts before the end of the stream takes the place of the frames from its start on. Those
  behind it are gone; frames that have left do not come back, and the sink keeps what it has absorbed.
- A stream may begin with any frame. Frames then count from it, and every position is that much further.

Where the published code does the same (chunk, sink and overflow all of one length) this agrees with it to
rounding; where it does not, tests/golden/index.json says ``documents_bug``, and this is what the library is
compared with.
"""

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``weight x / sqrt(mean(x^2) + eps)`` over the last dim; x itself without a weight."""
    return x if weight is None else x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def token_positions(frames: list[float], grid: tuple[int, int]) -> Tensor:
    """(frame, row, column) of the tokens of some frames, frame-major: float64 ``[len(frames) * h * w,
    3]``."""
    axes = [torch.tensor(frames).double(), *(torch.arange(n).double() for n in grid)]
    return torch.cartesian_prod(*axes).reshape(-1, 3).double()


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Wan's 3-D rotary embedding: x ``[B, N, H, D]``, positions ``[N, 3]``. Negative positions undo it.

    Of the D/2 pairs of neighbouring elements the first D/2 - 2 (D/2 // 3) turn with the frame, D/2 // 3 with
    the row and as many with the column; pair i of n of an axis turns by ``position * 10000^(-i/n)``.
    """
    half = x.shape[-1] // 2
    spatial = half // 3
    turns = []
    for axis, pairs in enumerate((half - 2 * spatial, spatial, spatial)):
        frequencies = torch.tensor([10000.0 ** (-i / pairs) for i in range(pairs)], dtype=torch.float64)
        turns.append(positions[:, axis, None] * frequencies)
    turn = torch.cat(turns, dim=1)
    turned = torch.view_as_complex(x.double().unflatten(-1, (half, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(turn), turn)[:, None]
    return torch.view_as_real(turned).flatten(-2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v`` for ``[B, N, H, D]``, no mask."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)


class StreamingReference:
    """One layer's stream.

    Args:
        grid: rows and columns of tokens of a frame.
        sink_frames, window_frames: S and W.
        policy: "ema", "static" or "none".
        alpha: decay of the average.
        rephase: False leaves the sink at its absolute positions.

    Attributes:
        sink_kv: raw (key, value) ``[B, n, H, D]`` by sink frame, as the newest chunk sees them.
        window_kv: raw (key, value) by frame of the stream, for the newest W frames that are no sink frames.
    """

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        sink_frames: int,
        window_frames: int,
        policy: str,
        alpha: float = 1.0,
        rephase: bool = True,
    ):
        if policy not in ("ema", "static", "none"):
            raise ValueError(
                f"StreamingReference: argument `policy`: expected ema, static or none, found {policy}"
            )
        self.grid, self.sink_frames, self.window_frames = grid, sink_frames, window_frames
        self.policy, self.alpha, self.rephase = policy, alpha, rephase
        self.sink_kv: dict[int, tuple[Tensor, Tensor]] = {}
        self.window_kv: dict[int, tuple[Tensor, Tensor]] = {}
        self.t_begin = self.t_end = self.origin = 0
        self.offsets: dict[int, float] = {}

    def begin(self, frames: int, start: int | None = None, position: float | None = None) -> None:
        """Start the next chunk, or the one from frame ``start`` on: what no longer fits the window leaves,
        and the sink absorbs it. For autograd all of the past is a constant. ``position``: the temporal
        position of its first frame, where it is not the frame's number."""
        if start is not None and (start in (0, self.origin) or self.t_end == self.origin):
            self.origin = self.t_end = start
        begin = (self.t_end if start is None else start) - self.origin
        for held in (self.sink_kv, self.window_kv):
            kept = {f: tuple(x.detach() for x in kv) for f, kv in held.items() if f < begin}
            held.clear()
            held.update(kept)
        offset = 0 if position is None else position - self.origin - begin
        self.offsets |= dict.fromkeys(range(begin, begin + frames), offset)
        self.t_begin, self.t_end = self.origin + begin, self.origin + begin + frames
        for e in sorted(f for f in self.window_kv if f < begin + frames - self.window_frames):
            leaving = self.window_kv.pop(e)
            if self.policy == "ema" and self.sink_frames:
                j = (e - self.sink_frames) % self.sink_frames
                pairs = zip(self.sink_kv[j], leaving, strict=True)
                self.sink_kv[j] = tuple(self.alpha * old + (1 - self.alpha) * new for old, new in pairs)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the chunk's raw queries ``[B, F * n, H, D]``; its raw keys and values replace those of
        an earlier forward.
        """
        frames = list(range(self.t_begin - self.origin, self.t_end - self.origin))
        split = zip(frames, k.double().chunk(len(frames), 1), v.double().chunk(len(frames), 1), strict=True)
        for frame, frame_k, frame_v in split:
            (self.sink_kv if frame < self.sink_frames else self.window_kv)[frame] = (frame_k, frame_v)

        shift = max(0, frames[-1] + 1 - self.sink_frames - self.window_frames) if self.rephase else 0
        own = self.origin + self.offsets[frames[0]]
        if shift:
            shift += self.offsets[frames[0]] - self.offsets[0]
        held = [(j + shift, j, kv) for j, kv in self.sink_kv.items()]
        held += [(f, f, kv) for f, kv in self.window_kv.items()]
        keys = rotate(
            torch.cat([kv[0] for _, _, kv in held], 1),
            token_positions([self.origin + p + self.offsets[f] for p, f, _ in held], self.grid),
        )
        values = torch.cat([kv[1] for _, _, kv in held], 1)
        positions = token_positions([own + f for f in frames], self.grid)
        return softmax_attention(rotate(q, positions), keys, values)

    def self_attention(self, x: Tensor, weights: dict[str, Tensor], heads: int, eps: float) -> Tensor:
        """Self-attention of a chunk ``[B, F * n, dim]`` with the layer's parameters under their published
        names."""
        x, weights = x.double(), {name: w.double() for name, w in weights.items()}

        def project(name, y):
            return y @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

        q = rms_norm(project("q", x), weights.get("norm_q.weight"), eps)
        k = rms_norm(project("k", x), weights.get("norm_k.weight"), eps)
        y = self.attend(*(t.unflatten(-1, (heads, -1)) for t in (q, k, project("v", x))))
        return project("o", y.flatten(2))
