"""One layer of a stream, as a model calls it: F = 3 frames a chunk, S = 3 sink frames, L = 9 in all, the
cache full and evicting.

Jobs:
- repeat forward: RMSNorm, RoPE, write, attention, in a forward that evicts nothing (all but the first of a
  chunk).
- update, and update with norm and RoPE: the first forward of a chunk without its attention: what leaves is
  fused into the sink, the new chunk is written, keys and values are ready to be attended.
Candidates:
- rf_kernels: SinkWindowCache, planning included.
- published: the published path: roll, average, write, concatenation of sink and window, rotation of all of
  it.
- eager: the best of plain PyTorch: a ring as ours in plain tensors, keys rotated once, in complex64; in-place
  lerp; SDPA on views.
- sdpa (repeat forward): SDPA alone, on ready-made contiguous tensors, heads first.
The candidates that do the same job stream the same chunks, and their attention agrees before anything is
timed.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from rf_kernels.cache import CacheSpec, EMASink, Ring, SinkWindowCache
from rf_kernels.ops.sink_window_attention import sink_window_attention
from rf_kernels.positions import RoPE3D
from rf_kernels.reference.rope_append import token_angles

from . import floors
from .case import Case, agree
from .published import attention, rope
from .rope_append import published_norms, rotate

ALPHA = 0.999


@dataclass(frozen=True)
class Layer:
    """``rotary``: with q/k norm and RoPE."""

    grid: tuple[int, int]
    dtype: torch.dtype
    rotary: bool = True
    frames: int = 3
    sink_frames: int = 3
    window_frames: int = 6
    heads: int = 12
    head_dim: int = 128

    @property
    def frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        return self.frames * self.frame_tokens

    @property
    def length(self) -> int:
        return self.sink_frames + self.window_frames


class Ours:
    def __init__(self, layer: Layer, weights, device):
        rope_ = RoPE3D.wan(layer.head_dim) if layer.rotary else None
        spec = CacheSpec(
            layers=1,
            batch=1,
            heads=layer.heads,
            head_dim=layer.head_dim,
            grid=layer.grid,
            sink_frames=layer.sink_frames,
            window_frames=layer.window_frames,
            rope=rope_,
            dtype=layer.dtype,
            device=device,
        )
        self.cache = SinkWindowCache(spec, sink=EMASink(ALPHA))
        self.frames, self.chunk = layer.frames, None
        self.norms = {"q_norm": weights[0], "k_norm": weights[1], "norm": "model"} if layer.rotary else {}

    def begin(self):
        self.chunk = self.cache.open(self.frames)

    def commit(self):
        self.chunk.commit()

    def append(self, q, k, v):
        return self.chunk.append(0, q, k, v, **self.norms)

    def attend(self, q):
        return sink_window_attention(q, self.cache.k[0], self.cache.v[0], kv_tokens=self.chunk.kv_tokens)

    def forward(self, q, k, v):
        return self.chunk.attend(0, q, k, v, **self.norms)


class Published:
    """``append`` keeps the raw q: the published path rotates when it attends."""

    def __init__(self, layer: Layer, weights, device):
        self.layer, self.start = layer, 0
        capacity = layer.length * layer.frame_tokens
        self.cache = attention.EMASinkKVCache(1, capacity, layer.heads, layer.head_dim, layer.dtype, device)
        self.norms = published_norms(weights)
        self.table = rope.rope_table(layer.head_dim, device=device)
        self.num_sink_tokens = layer.sink_frames * layer.frame_tokens

    def begin(self):
        pass

    def commit(self):
        self.start += self.layer.tokens

    def append(self, q, k, v):
        layer = self.layer
        if layer.rotary:
            q, k = (norm(x.flatten(2)).view(x.shape) for norm, x in zip(self.norms, (q, k), strict=True))
        end = self.cache.append(k, v, self.start, self.num_sink_tokens, ALPHA)
        capacity = layer.length * layer.frame_tokens
        self.window = attention.read_window(
            end, layer.tokens, layer.frame_tokens, self.num_sink_tokens, capacity
        )
        return q

    def attended(self, q):
        """q, k and v as they go into the softmax."""
        layer = self.layer
        grid = (layer.frames, *layer.grid)
        if layer.rotary:
            return attention.cached_attention(
                q, self.cache, self.window, grid, self.num_sink_tokens, self.table, lambda *qkv: qkv
            )
        num_sink_tokens, end = self.num_sink_tokens, self.cache.local_end.item()
        parts = (
            [x[:, :num_sink_tokens], x[:, self.window.start : end]] for x in (self.cache.k, self.cache.v)
        )
        return q, *(torch.cat(pair, dim=1) for pair in parts)

    def attend(self, q):
        return attention.sdpa_attention(*self.attended(q))


class Eager:
    def __init__(self, layer: Layer, weights, device):
        self.layer, self.weights, self.device = layer, weights, device
        self.ring, self.rope = Ring(layer.sink_frames, layer.window_frames), RoPE3D.wan(layer.head_dim)
        shape = (1, layer.length * layer.frame_tokens, layer.heads, layer.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=layer.dtype, device=device) for _ in range(2))
        self.k_state = self.v_state = None
        self.t_end = 0

    def place(self, slot: int) -> slice:
        return slice(slot * self.layer.frame_tokens, (slot + 1) * self.layer.frame_tokens)

    def turn(self, delta: int) -> torch.Tensor:
        """Turn of the temporal pairs by ``delta`` frames, complex64 [D/2]."""
        table = torch.ones(self.layer.head_dim // 2, dtype=torch.complex128)
        pairs = torch.view_as_complex(torch.from_numpy(self.rope.temporal_table([delta])[0]).contiguous())
        table[: len(pairs)] = pairs
        return table.to(self.device, torch.complex64)

    def begin(self):
        layer, ring = self.layer, self.ring
        first, self.t_end = self.t_end, self.t_end + layer.frames
        self.frames = range(first, self.t_end)
        self.valid = min(self.t_end, ring.length) * layer.frame_tokens
        if layer.rotary:
            angles, axes = self.rope.table([self.frames, *map(range, layer.grid)])
            turns = torch.view_as_complex(token_angles(angles, axes).contiguous())
            self.turns = turns[:, :, None].to(self.device)
        self.evicting = list(ring.leaving(first, self.t_end))

    def commit(self):
        pass

    def evict(self):
        sink_tokens = self.layer.sink_frames * self.layer.frame_tokens
        wide = torch.promote_types(self.layer.dtype, torch.float32)
        if self.k_state is None:
            self.k_state, self.v_state = (t[:, :sink_tokens].to(wide, copy=True) for t in (self.k, self.v))
        for e in self.evicting:
            j, source = (e - self.ring.sink_frames) % self.ring.sink_frames, self.place(self.ring.slot(e))
            where = self.place(j)
            k = rotate(self.k[:, source], self.turn(j - e)) if self.layer.rotary else self.k[:, source]
            self.k_state[:, where].lerp_(k.to(wide), 1 - ALPHA)
            self.v_state[:, where].lerp_(self.v[:, source].to(wide), 1 - ALPHA)
        shift = self.turn(self.ring.shift(self.t_end))
        self.k[:, :sink_tokens] = rotate(self.k_state, shift) if self.layer.rotary else self.k_state
        self.v[:, :sink_tokens] = self.v_state
        self.evicting = []

    def append(self, q, k, v):
        if self.evicting:
            self.evict()
        if self.layer.rotary:
            width = self.layer.heads * self.layer.head_dim
            rows = ((q, self.weights[0]), (k, self.weights[1]))
            q, k = (
                rotate(F.rms_norm(x.flatten(2), (width,), w, 1e-6).view(x.shape), self.turns) for x, w in rows
            )
        for i, frame in enumerate(self.frames):
            place = self.place(self.ring.slot(frame))
            self.k[:, place], self.v[:, place] = k[:, self.place(i)], v[:, self.place(i)]
        return q

    def attend(self, q):
        return attention.sdpa_attention(q, self.k[:, : self.valid], self.v[:, : self.valid])


def streams(layer: Layer, device: str) -> tuple[list, dict]:
    """q, k, v of a chunk, and the three paths after as many chunks as fill the cache and evict once."""
    width = layer.heads * layer.head_dim
    weights = [torch.randn(width, device=device).to(layer.dtype) for _ in range(2)]
    paths = {"rf_kernels": Ours, "published": Published, "eager": Eager}
    paths = {name: path(layer, weights, device) for name, path in paths.items()}
    for _ in range(-(-layer.length // layer.frames) + 1):
        chunk = [torch.randn(1, layer.tokens, layer.heads, layer.head_dim, device=device) for _ in range(3)]
        chunk = [t.to(layer.dtype) for t in chunk]
        for path in paths.values():
            path.begin()
            path.append(*chunk)
            path.commit()
    return chunk, paths


def forward(path, chunk):
    if isinstance(path, Ours):
        return path.forward(*chunk)
    return path.attend(path.append(*chunk))


# Half precision: the states differ (published: rounded at every step), and q, k, probabilities and the output
# are rounded at different places, each half a unit in the last place of its own.
ULPS = 8


def build_forward(layer: Layer, device: str) -> dict:
    chunk, paths = streams(layer, device)
    for path in paths.values():
        path.begin()
    calls = {name: partial(forward, path, chunk) for name, path in paths.items()}
    agree(calls, ulps=ULPS)
    cache = paths["rf_kernels"].cache
    ready = [t.transpose(1, 2).contiguous() for t in (chunk[0], cache.k[0], cache.v[0])]
    return calls | {"sdpa": lambda: F.scaled_dot_product_attention(*ready)}


def build_update(layer: Layer, device: str) -> dict:
    chunk, paths = streams(layer, device)

    # Without norm and RoPE nothing is to be done to q: ours is given a q of no heads, the others never touch
    # theirs.
    q_heads = layer.heads if layer.rotary else 0

    def update(path):
        path.begin()
        q = path.append(chunk[0][:, :, :q_heads] if path is paths["rf_kernels"] else chunk[0], *chunk[1:])
        result = path.attended(q) if isinstance(path, Published) else q
        path.commit()
        return result

    for path in paths.values():
        path.begin()
    agree({name: partial(forward, path, chunk) for name, path in paths.items()}, ulps=ULPS)
    for path in paths.values():
        path.commit()
    return {name: partial(update, path) for name, path in paths.items()}


def costs(layer: Layer, update: bool) -> dict[str, int]:
    """The floors of the ops that the job consists of."""
    rope_ = RoPE3D.wan(layer.head_dim)
    append = floors.rope_append(
        batch=1,
        tokens=layer.tokens,
        q_heads=layer.heads if layer.rotary or not update else 0,
        kv_heads=layer.heads,
        head_dim=layer.head_dim,
        dtype=layer.dtype,
        pairs=rope_.pairs if layer.rotary else (),
        norm=layer.rotary,
    )
    if update:
        other = floors.ema_evict(
            batch=1,
            sink_frames=layer.sink_frames,
            frame_tokens=layer.frame_tokens,
            heads=layer.heads,
            head_dim=layer.head_dim,
            dtype=layer.dtype,
            temporal_pairs=rope_.temporal_pairs if layer.rotary else 0,
        )
    else:
        other = floors.sink_window_attention(
            1,
            layer.tokens,
            layer.heads,
            layer.head_dim,
            kv_tokens=layer.length * layer.frame_tokens,
            element_size=layer.dtype.itemsize,
        )
    return {name: append[name] + other[name] for name in append}


def case(job: str, layer: Layer, device: str | None = None, quick: bool = False) -> Case:
    update = job != "repeat forward"
    shape = f"{job}, {layer.grid[0]}x{layer.grid[1]} tokens a frame, {layer.heads} x {layer.head_dim}"
    names = ("rf_kernels", "published", "eager") + (() if update else ("sdpa",))
    build = partial(build_update if update else build_forward, layer)
    return Case("layer", shape, layer.dtype, names, build, costs(layer, update), device, quick)


def cases() -> list[Case]:
    found = []
    for grid, device, dtypes in (
        ((15, 26), "cpu", (torch.float32, torch.bfloat16)),
        ((30, 52), "cuda", (torch.bfloat16,)),
    ):
        for dtype in dtypes:
            quick = dtype == dtypes[0]
            plain, rotary = (Layer(grid, dtype, rotary) for rotary in (False, True))
            found.append(case("repeat forward", rotary, device, quick))
            found.append(case("update", plain, device, quick))
            found.append(case("update with norm and RoPE", rotary, device, quick))
    return found
