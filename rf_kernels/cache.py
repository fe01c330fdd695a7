"""SinkWindowCache: the KV cache of a stream. Sink first, then a ring; nothing in it ever moves, and every key is rotated once.

    cache = rf.SinkWindowCache(layers=30, batch=1, heads=12, head_dim=128, grid=(30, 52), sink_frames=3, window_frames=6,
                               sink_policy=rf.EMASink(alpha=0.999), rope=rf.RoPE3D.wan(128), dtype=torch.bfloat16, device="cuda")
    plan = cache.begin(frames=3)
    for each denoising forward, and the one on the clean result:
        for layer, block in enumerate(blocks):
            q = cache[layer].append(q, k, v, plan, q_weight=..., k_weight=...)
            y = rf.sink_window_attention(q, cache[layer].k, cache[layer].v, kv_tokens=plan.kv_tokens)
    cache.commit(plan)

The rules (slots, positions, what leaves and what absorbs it) are in plan.py; docs/cache.md tells them with their reasons.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ._backend import ArgumentError, argument_error, choice
from .ops.ema_evict import ema_evict
from .ops.rope_append import rope_append, rope_append_check
from .plan import ChunkPlan, PlanBuffers, Ring
from .positions import RoPE, table_dtype

_FORMAT = "rf_kernels.stream"
_FORMAT_VERSION = 1


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _alpha_of(policy: "EMASink") -> torch.Tensor:
    # Host tensors name their device throughout: a model is often built under torch.device("meta") or a default device.
    return torch.as_tensor(policy.alpha, dtype=torch.float64, device="cpu")


class NonFiniteError(ArithmeticError):
    """Frames with a NaN or an infinity left the window under ``EMASink(on_nonfinite="raise")``."""


@dataclass(frozen=True)
class NoSink:
    """No sink frames: a plain window; frames that leave are dropped."""


@dataclass(frozen=True)
class StaticSink:
    """The first frames stay as they are; their keys are re-phased, so that they keep their distance to the window."""


@dataclass(frozen=True)
class EMASink:
    """Frames that leave the window are absorbed by exponential moving average (Reward Forcing, arXiv 2512.04678, eq. 4-7):
    ``sink <- alpha * sink + (1 - alpha) * evicted``, keys and values alike, token by token.

    Args:
        alpha: in [0, 1]; a number, one per sink frame ``[S]``, or one per sink frame and token ``[S, n]`` (nested sequences).
        state: precision of the average. "compensated" (default): a hi + lo pair in the cache's dtype; "float32"; "published": the
            cache's dtype alone, each product and the sum rounded, as the published code does. A float32 or float64 cache keeps its
            state in its own dtype, whichever is named.
        held: sink frames that absorb nothing (they are re-phased only).
        on_nonfinite: a token of a leaving frame with a NaN or an infinity anywhere in its K or V is fused in neither and counted
            ("skip"); fused all the same ("propagate"); or skipped, and ``commit`` raises ("raise": the only mode that synchronises).
    """

    alpha: float | Sequence = 0.999
    state: str = "compensated"
    held: tuple[int, ...] = ()
    on_nonfinite: str = "skip"

    def __post_init__(self):
        choice("EMASink", "state", ("compensated", "float32", "published"), self.state)
        choice("EMASink", "on_nonfinite", ("skip", "propagate", "raise"), self.on_nonfinite)
        if not isinstance(self.held, tuple | list) or not all(map(_is_integer, self.held)):
            raise argument_error("EMASink", "held", "a tuple of sink frames", repr(self.held))
        try:
            alpha = _alpha_of(self)
        except (TypeError, ValueError, RuntimeError):
            raise argument_error(
                "EMASink", "alpha", "a number, or nested sequences of them", repr(self.alpha)
            ) from None
        if not bool(((alpha >= 0) & (alpha <= 1)).all()):
            raise argument_error("EMASink", "alpha", "values in [0, 1]", self.alpha)


class LayerCache:
    """One layer's view of the cache: ``k`` and ``v`` ``[B, L * n, H, D]`` (views), and ``append``."""

    def __init__(self, cache: "SinkWindowCache", layer: int):
        self._cache, self._layer = cache, layer
        self.k, self.v = cache.k[layer], cache.v[layer]

    def __getstate__(self) -> tuple:  # see SinkWindowCache.__getstate__
        return self._cache, self._layer

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)

    def append(self, q, k, v, plan: ChunkPlan, *, q_weight=None, k_weight=None, norm="model", eps=1e-6):
        """Normalise and rotate q and k, write k and v to the chunk's slots; in the chunk's first forward, absorb what leaves first.

        Args:
            q: ``[B, F * n, Hq, D]`` of the cache's dtype; k, v: ``[B, F * n, H, D]``.
            plan: the open plan of this cache. The same plan may be appended any number of times: it writes the same slots again.
            q_weight, k_weight: RMSNorm weights, see ``rope_append``.
        Returns:
            q, normalised and rotated, ``[B, F * n, Hq, D]``.
        Raises:
            ArgumentError: before anything is written.
        """
        cache, layer = self._cache, self._layer
        cache._check_plan("SinkWindowCache.append", plan)
        arguments = (q, k, v, self.k, self.v)
        options = {
            "slots": plan.slots, "angles": plan.angles, "axes": plan.axes, "layout": cache._layout,
            "q_weight": q_weight, "k_weight": k_weight, "norm": norm, "eps": eps,
        }  # fmt: skip
        if plan.schedule is not None and not plan.evicted[layer]:
            # Both ops or none: what would make the append refuse must be known before the sink is touched.
            rope_append_check(*arguments, **options)
            cache._check_apart_from_state(q=q, k=k, v=v)
            cache._evict(layer, plan)
            plan.evicted[layer] = True
        q_out = rope_append(*arguments, **options)
        plan.appended[layer] = True
        return q_out


class SinkWindowCache:
    """Keys and values of a stream: ``sink_frames`` at the front, then a ring of ``window_frames``; all memory is allocated here.

    Args:
        layers, batch, heads, head_dim: as in the model (``heads`` are key/value heads; queries may have a multiple of them).
        grid: tokens of a frame along its spatial axes, e.g. ``(30, 52)``; n = their product.
        sink_frames, window_frames: S and W in latent frames; sink and window together are what a query sees (L = S + W).
        sink_policy: ``NoSink()``, ``StaticSink()`` or ``EMASink(...)``. Default: NoSink without sink frames, else EMASink().
        rope: positions of ``(frame, *grid)``, ``RoPE3D.wan(head_dim)`` for Wan; None for keys without positions.
        dtype, device: of keys and values.
        rephase: move the sink's positions along with the window (published behaviour); False keeps absolute positions.
        undo_frames: frames of the largest chunk that ``begin(undo=True)`` may be asked for (its save area is allocated here).

    Attributes:
        k, v: ``[layers, B, L * n, H, D]``.
        next_frame: frames committed so far = first frame of the next chunk.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        grid: Sequence[int],
        sink_frames: int,
        window_frames: int,
        sink_policy: NoSink | StaticSink | EMASink | None = None,
        rope: RoPE | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        rephase: bool = True,
        undo_frames: int = 0,
    ):
        op = "SinkWindowCache"
        self._arguments = {
            "layers": layers, "batch": batch, "heads": heads, "head_dim": head_dim, "grid": grid, "sink_frames": sink_frames,
            "window_frames": window_frames, "sink_policy": sink_policy, "rope": rope, "dtype": dtype, "device": device,
            "rephase": rephase, "undo_frames": undo_frames,
        }  # fmt: skip
        if not isinstance(grid, Sequence) or not all(map(_is_integer, grid)):
            raise argument_error(op, "grid", "a sequence of integers", repr(grid))
        grid = tuple(grid)
        for name, value, least in (
            ("layers", layers, 1), ("batch", batch, 1), ("heads", heads, 1), ("head_dim", head_dim, 1),
            ("sink_frames", sink_frames, 0), ("window_frames", window_frames, 0), ("undo_frames", undo_frames, 0),
            ("grid", min(grid, default=1), 1),
        ):  # fmt: skip
            if not _is_integer(value) or value < least:
                raise argument_error(op, name, f"an integer >= {least}", repr(value))
        if sink_frames + window_frames < 1:
            raise argument_error(op, "sink_frames + window_frames", "an integer >= 1", 0)
        if sink_policy is None:
            sink_policy = EMASink() if sink_frames else NoSink()
        if not isinstance(sink_policy, NoSink | StaticSink | EMASink):
            raise argument_error(op, "sink_policy", "NoSink, StaticSink or EMASink", repr(sink_policy))
        if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise argument_error(op, "dtype", "float64, float32, bfloat16 or float16", dtype)
        if isinstance(sink_policy, NoSink) and sink_frames:
            raise argument_error(op, "sink_policy", f"StaticSink or EMASink with {sink_frames} sink frames", "NoSink()")
        if isinstance(sink_policy, EMASink) and sink_frames and not window_frames:
            raise argument_error(op, "window_frames", "at least 1 with an EMASink", window_frames)
        if rope is not None:
            if not isinstance(rope, RoPE):
                raise argument_error(op, "rope", "a RoPE or None", repr(rope))
            if len(rope.pairs) != 1 + len(grid):
                raise argument_error(op, "rope", f"{1 + len(grid)} axes (frame, *grid)", f"{len(rope.pairs)} axes")
            if rope.temporal_axis not in (0, None) or (rope.temporal_axis is None and rope.pairs[0]):
                raise argument_error(op, "rope", "temporal_axis 0, or None with pairs[0] = 0", rope)
            if rope.rotated_dims > head_dim:
                raise argument_error(op, "rope", f"at most {head_dim} rotated dims", rope.rotated_dims)
        if undo_frames > sink_frames + window_frames:
            raise argument_error(op, "undo_frames", f"at most {sink_frames + window_frames}", undo_frames)
        if isinstance(sink_policy, EMASink) and any(not 0 <= j < sink_frames for j in sink_policy.held):
            raise argument_error(op, "sink_policy.held", f"sink frames 0..{sink_frames - 1}", sink_policy.held)

        try:
            device = torch.device(device)
        except (RuntimeError, TypeError):
            raise argument_error(op, "device", "a device", repr(device)) from None
        self.layers, self.batch, self.heads, self.head_dim = layers, batch, heads, head_dim
        self.grid, self.rope, self.sink_policy, self.rephase = grid, rope, sink_policy, rephase
        self.ring = Ring(sink_frames, window_frames)
        self.frame_tokens = torch.Size(grid).numel()
        self.dtype, self.device, self.undo_frames = dtype, device, undo_frames
        self._layout = rope.layout if rope is not None else "adjacent"
        turns = rope is not None and rope.temporal_pairs > 0
        self._temporal = rope.temporal_dims if turns else (0, 1, 2)

        def zeros(tokens, dtype=dtype):
            return torch.zeros(layers, batch, tokens, heads, head_dim, dtype=dtype, device=device)

        self.k, self.v = zeros(self.ring.length * self.frame_tokens), zeros(self.ring.length * self.frame_tokens)
        self.k_state = self.k_state_lo = self.v_state = None
        sink_tokens = sink_frames * self.frame_tokens
        self._ema = isinstance(sink_policy, EMASink) and sink_frames > 0
        self._state = "published"
        if self._ema and dtype in (torch.bfloat16, torch.float16):
            self._state = sink_policy.state
        if sink_frames and (self._ema or (rephase and turns)):
            state_dtype = torch.float32 if self._state == "float32" else dtype
            self.k_state = zeros(sink_tokens, state_dtype)
            if self._state == "compensated":
                self.k_state_lo = zeros(sink_tokens)
            if self._state != "published":
                self.v_state = zeros(sink_tokens, state_dtype)
        self._alpha = None
        self._skipped = torch.zeros(layers, dtype=torch.int64, device=device)
        if self._ema:
            alpha = _alpha_of(sink_policy)
            if alpha.shape not in ((), (sink_frames,), (sink_frames, self.frame_tokens)):
                expected = f"shape (), ({sink_frames},) or ({sink_frames}, {self.frame_tokens})"
                raise argument_error(op, "sink_policy.alpha", expected, tuple(alpha.shape))
            self._alpha = alpha.to(device)
        elif self.k_state is not None:
            self._alpha = torch.ones((), dtype=torch.float64, device=device)  # a static sink averages nothing

        self._undo = None
        if undo_frames:
            chunk = undo_frames * self.frame_tokens
            self._undo = {"k": zeros(chunk), "v": zeros(chunk), "skipped": torch.zeros_like(self._skipped)}
            if self.k_state is not None:
                self._undo.update(sink_k=zeros(sink_tokens), sink_v=zeros(sink_tokens))
                self._undo.update({name: torch.zeros_like(t) for name, t in self._states().items()})

        self._buffers = PlanBuffers(self.ring, grid, rope, table_dtype(dtype), device)
        self._layer_views = [LayerCache(self, layer) for layer in range(layers)]
        self._plan: ChunkPlan | None = None
        self._generation = 0
        self._state_ready = False
        self._seen_skipped = 0
        self.next_frame = 0

    # ---- looking ------------------------------------------------------------------------------------------------------------
    def __getitem__(self, layer: int) -> LayerCache:
        return self._layer_views[layer]

    def __len__(self) -> int:
        return self.layers

    @property
    def sink_frames(self) -> int:
        return self.ring.sink_frames

    @property
    def window_frames(self) -> int:
        return self.ring.window_frames

    @property
    def kv_tokens(self) -> int:
        """Tokens of the valid prefix after the last commit."""
        return min(self.next_frame, self.ring.length) * self.frame_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the cache (on device "meta" they are counted without being allocated)."""
        tensors = [self.k, self.v, self._skipped, self._buffers.ints, self._buffers.floats]
        tensors += [*self._states().values(), *(self._undo or {}).values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def skipped_tokens(self) -> torch.Tensor:
        """``int64 [layers]`` on the device; counts tokens of leaving frames that were not fused because they were not finite."""
        return self._skipped

    def sink_state(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The sink's keys (at the temporal phase of their own slots) and values ``[B, S * n, H, D]`` of one layer, in float32
        (float64 for a float64 cache); a copy, for inspection."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        sink_tokens = min(self.next_frame, self.sink_frames) * self.frame_tokens
        k, v = self.k[layer][:, :sink_tokens].to(wide), self.v[layer][:, :sink_tokens].to(wide)
        if not self._state_ready:
            return k.clone(), v.clone()  # slots and state are one and the same until the first frame leaves
        if self.k_state is not None:
            k = self.k_state[layer].to(wide)
        if self.k_state_lo is not None:
            k = k + self.k_state_lo[layer].to(wide)
        if self._state == "compensated":
            v = v + self.v_state[layer].to(wide)
        elif self._state == "float32":
            v = self.v_state[layer]
        return k.clone(), v.clone()

    # ---- a chunk ------------------------------------------------------------------------------------------------------------
    def begin(self, frames: int, *, undo: bool = False) -> ChunkPlan:
        """Plan the next chunk of ``frames`` latent frames. Keys, values and state are not touched (with ``undo`` they are saved).

        Args:
            undo: save what the chunk will destroy (its slots, the sink, the sink's state), so that ``rollback`` can return to before
                this call, also after an exception in the middle. Needs ``undo_frames >= frames`` at construction.
        Raises:
            ArgumentError: frames do not fit in the window, a plan is still open, or no save area.
        """
        op = "SinkWindowCache.begin"
        if not _is_integer(frames) or frames < 1:
            raise argument_error(op, "frames", "an integer >= 1", repr(frames))
        if self._plan is not None:
            found = f"the chunk [{self._plan.t_begin}, {self._plan.t_end}) still open (commit, rollback or reset it)"
            raise argument_error(op, "self", "no open plan", found)
        if undo and frames > self.undo_frames:
            raise argument_error(op, "undo", f"at most undo_frames = {self.undo_frames} frames", frames)
        ring, t_begin, t_end = self.ring, self.next_frame, self.next_frame + frames
        ring.check_chunk(t_begin, t_end)

        shift = ring.shift(t_end) if self.rephase else 0
        leaving = ring.leaving(t_begin, t_end)
        slots, angles, axes, schedule, turns = self._buffers.views(frames)
        sources = None
        if self.k_state is not None and len(leaving):
            sources = [[] for _ in range(ring.sink_frames)]
            if self._ema:
                for e in leaving:
                    if ring.absorber(e) not in self.sink_policy.held:
                        sources[ring.absorber(e)].append(e)
        self._buffers.upload(t_begin, t_end, shift, sources, first=not self._state_ready)
        acts = sources is not None
        plan = ChunkPlan(
            owner=self,
            generation=self._generation,
            t_begin=t_begin,
            t_end=t_end,
            kv_tokens=min(t_end, ring.length) * self.frame_tokens,
            shift=shift,
            leaving=leaving,
            slots=slots,
            angles=angles,
            axes=axes,
            schedule=schedule if acts else None,
            turns=turns if acts else None,
            undo=undo,
            seen_skipped=self._seen_skipped,
            evicted=[False] * self.layers,
            appended=[False] * self.layers,
        )
        if undo:
            self._copy_undo(plan, save=True)
        self._plan = plan
        return plan

    def commit(self, plan: ChunkPlan) -> None:
        """Close the chunk: its frames belong to the stream. Every layer must have been appended.

        Raises:
            ArgumentError: not the open plan of this cache, or layers without an append.
            NonFiniteError: with ``EMASink(on_nonfinite="raise")``, when leaving frames had non-finite tokens (they were not fused).
                The plan stays open: ``rollback`` it, or ``commit`` again to accept.
        """
        self._check_plan("SinkWindowCache.commit", plan)
        if not all(plan.appended):
            missing = [layer for layer, done in enumerate(plan.appended) if not done]
            raise argument_error(
                "SinkWindowCache.commit", "plan", "an append in every layer", f"none in layers {missing}"
            )
        if self._ema and self.sink_policy.on_nonfinite == "raise" and plan.schedule is not None:
            skipped = int(self._skipped.sum())
            new, self._seen_skipped = skipped - self._seen_skipped, skipped
            if new:
                raise NonFiniteError(
                    f"rf_kernels.SinkWindowCache.commit: {new} tokens of the frames {list(plan.leaving)} that left the window were "
                    "not finite; they were not fused into the sink"
                )
        self._state_ready = self._state_ready or plan.schedule is not None
        self.next_frame = plan.t_end
        self._close(plan)

    def rollback(self, plan: ChunkPlan) -> None:
        """Return to before ``begin(undo=True)``, bit for bit. A plan that no layer has touched needs no undo."""
        self._check_plan("SinkWindowCache.rollback", plan)
        if plan.touched and not plan.undo:
            raise argument_error("SinkWindowCache.rollback", "plan", "a plan begun with undo=True", "undo=False")
        if plan.undo:
            self._copy_undo(plan, save=False)
        self._seen_skipped = plan.seen_skipped
        self._close(plan)

    def reset(self) -> None:
        """Start a new stream: frame 0, slots zeroed (nothing of the old stream stays in memory), open plans void."""
        for tensor in (self.k, self.v, self._skipped, *self._states().values(), *(self._undo or {}).values()):
            tensor.zero_()
        self._restart(next_frame=0, state_ready=False)

    # ---- saving and copying a stream between chunks ----------------------------------------------------------------------------
    def state_dict(self) -> dict:
        """The stream between chunks: ``{"meta": {...}, "tensors": {...}}``, tensors cloned, valid slots only."""
        if self._plan is not None:
            found = f"the chunk [{self._plan.t_begin}, {self._plan.t_end}) open"
            raise argument_error("SinkWindowCache.state_dict", "self", "no open plan", found)
        tensors = {"k": self.k[:, :, : self.kv_tokens], "v": self.v[:, :, : self.kv_tokens], "skipped": self._skipped}
        tensors.update(self._states() if self._state_ready else {})
        meta = self._identity() | {"next_frame": self.next_frame, "state_ready": self._state_ready}
        return {
            "meta": meta,
            "tensors": {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue a saved stream, bit for bit. Everything is checked before anything is written."""
        op = "SinkWindowCache.load_state_dict"
        if (
            not isinstance(state, dict)
            or not isinstance(state.get("meta"), dict)
            or not isinstance(state.get("tensors"), dict)
        ):
            raise argument_error(op, "state", "a dict with `meta` and `tensors`", type(state).__name__)
        meta, tensors = state["meta"], state["tensors"]
        for name, expected in self._identity().items():
            if meta.get(name) != expected:
                raise argument_error(op, f"meta.{name}", repr(expected), repr(meta.get(name)))
        next_frame, ready = meta.get("next_frame"), meta.get("state_ready")
        if not _is_integer(next_frame) or not 0 <= next_frame < 2**53:  # positions are exact in float64
            raise argument_error(op, "meta.next_frame", "an integer in [0, 2**53)", repr(next_frame))
        # The state is taken at the first chunk that makes a frame leave, so the two must agree.
        if ready is not (self.k_state is not None and next_frame > self.ring.length):
            raise argument_error(op, "meta.state_ready", f"the value that {next_frame} frames imply", repr(ready))
        valid = min(next_frame, self.ring.length) * self.frame_tokens
        targets = {"k": self.k[:, :, :valid], "v": self.v[:, :, :valid], "skipped": self._skipped}
        targets.update(self._states() if ready else {})
        if set(tensors) != set(targets):
            raise argument_error(op, "tensors", f"{sorted(targets)}", f"{sorted(tensors)}")
        for name, target in targets.items():
            found = tensors[name]
            if not isinstance(found, torch.Tensor) or found.shape != target.shape or found.dtype != target.dtype:
                text = f"{found.dtype} {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
                raise argument_error(op, f"tensors.{name}", f"{target.dtype} {list(target.shape)}", text)
            if found.layout != torch.strided or found.device.type == "meta":
                raise argument_error(
                    op, f"tensors.{name}", "a dense tensor with memory", f"{found.layout} on {found.device}"
                )
            if found.untyped_storage().data_ptr() == target.untyped_storage().data_ptr() and found.numel():
                raise argument_error(op, f"tensors.{name}", "memory apart from the cache", "the cache's own")
        self.reset()
        for name, target in targets.items():
            target.copy_(tensors[name].detach())
        self._restart(next_frame, ready)
        self._seen_skipped = int(tensors["skipped"].sum())

    def save(self, path) -> None:
        """Write the stream to a safetensors file (between chunks)."""
        from safetensors.torch import save_file

        state = self.state_dict()
        save_file(
            {n: t.cpu() for n, t in state["tensors"].items()},
            str(path),
            metadata={"rf_kernels": json.dumps(state["meta"])},
        )

    def load(self, path) -> None:
        """Continue the stream of a file written by ``save`` on a cache of the same geometry, dtype and policy."""
        from safetensors import SafetensorError, safe_open

        op = "SinkWindowCache.load"
        try:
            # What the parser builds from a header is many times its size: only one as long as ours is given to it.
            with open(path, "rb") as file:
                claimed = int.from_bytes(file.read(8), "little")
            limit = 4096 + 4 * len(json.dumps(self._identity()))
            if claimed > limit:
                raise ValueError(f"a header of {claimed} bytes, expected at most {limit}")
            with safe_open(str(path), framework="pt", device="cpu") as file:
                text = (file.metadata() or {}).get("rf_kernels")
                if text is None:
                    raise argument_error(
                        op, "path", "a stream saved by SinkWindowCache.save", f"no such metadata in {path}"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            meta = json.loads(text)
        except (ArgumentError, FileNotFoundError, PermissionError):
            raise
        except (SafetensorError, ValueError, OSError, RecursionError) as error:
            raise argument_error(op, "path", "a readable stream file", f"{path}: {error}") from error
        self.load_state_dict({"meta": meta, "tensors": tensors})

    # copy and pickle: tensors that share memory (k, and each layer's view of it) would come back as tensors that do not. So a copy is
    # a new cache that continues the same stream; like state_dict, between chunks only. copy.copy shares nothing either.
    def __getstate__(self) -> dict:
        return {"arguments": self._arguments, "stream": self.state_dict()}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state["arguments"])
        self.load_state_dict(state["stream"])

    # ---- inside ---------------------------------------------------------------------------------------------------------------
    def _states(self) -> dict[str, torch.Tensor]:
        named = {"k_state": self.k_state, "k_state_lo": self.k_state_lo, "v_state": self.v_state}
        return {name: t for name, t in named.items() if t is not None}

    def _identity(self) -> dict:
        """What a saved stream must share with the cache that continues it, in JSON types."""
        policy = self.sink_policy
        alpha = _alpha_of(policy).tolist() if self._ema else None
        rope = self.rope
        return {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            "geometry": [self.layers, self.batch, self.heads, self.head_dim, *self.grid],
            "sink_frames": self.sink_frames,
            "window_frames": self.window_frames,
            "dtype": str(self.dtype).removeprefix("torch."),
            "policy": type(policy).__name__,
            "alpha": alpha,
            "held": list(policy.held) if self._ema else None,
            "state": self._state,
            "rephase": self.rephase,
            "rope": None if rope is None else [list(rope.pairs), list(rope.bases), rope.layout, rope.temporal_axis],
        }

    def _check_plan(self, op: str, plan) -> None:
        # Inlined comparisons of host values: this runs once per layer and forward.
        if plan is self._plan and plan is not None:
            return
        if not isinstance(plan, ChunkPlan):
            raise argument_error(op, "plan", "a ChunkPlan from SinkWindowCache.begin", type(plan).__name__)
        if plan.owner is not self:
            raise argument_error(op, "plan", "a plan of this cache", "a plan of another cache")
        reason = "a plan from before a reset or load" if plan.generation != self._generation else "a closed plan"
        raise argument_error(
            op, "plan", "the open plan of this cache", f"{reason} (frames {plan.t_begin}..{plan.t_end})"
        )

    def _check_apart_from_state(self, **inputs) -> None:
        """The eviction writes the sink's state before the append reads its inputs."""
        if torch.compiler.is_compiling():
            return  # traced tensors have no memory
        state = {t.untyped_storage().data_ptr() for t in self._states().values()}
        for name, tensor in inputs.items():
            if tensor.untyped_storage().data_ptr() in state:
                raise argument_error(
                    "SinkWindowCache.append", name, "memory apart from the sink's state", "the state's own"
                )

    def _evict(self, layer: int, plan: ChunkPlan) -> None:
        def of_layer(tensor):
            return None if tensor is None else tensor[layer]

        mode = self.sink_policy.on_nonfinite if self._ema else "propagate"
        ema_evict(
            self.k[layer],
            self.v[layer],
            self.k_state[layer],
            of_layer(self.k_state_lo),
            of_layer(self.v_state),
            schedule=plan.schedule,
            turns=plan.turns,
            alpha=self._alpha,
            frame_tokens=self.frame_tokens,
            temporal=self._temporal,
            state=self._state,
            on_nonfinite="propagate" if mode == "propagate" else "skip",
            skipped=self._skipped[layer : layer + 1],
        )

    def _copy_undo(self, plan: ChunkPlan, *, save: bool) -> None:
        """Copy what the plan will destroy into the save area, or back: O(chunk + sink) bytes."""
        n, area = self.frame_tokens, self._undo

        def copy(cache_part, saved_part):
            target, source = (saved_part, cache_part) if save else (cache_part, saved_part)
            target.copy_(source)

        for i, frame in enumerate(range(plan.t_begin, plan.t_end)):
            slot = self.ring.slot(frame)
            for name, tensor in (("k", self.k), ("v", self.v)):
                copy(tensor[:, :, slot * n : (slot + 1) * n], area[name][:, :, i * n : (i + 1) * n])
        if plan.schedule is not None:
            sink_tokens = self.sink_frames * n
            copy(self.k[:, :, :sink_tokens], area["sink_k"])
            copy(self.v[:, :, :sink_tokens], area["sink_v"])
            for name, tensor in (*self._states().items(), ("skipped", self._skipped)):
                copy(tensor, area[name])

    def _close(self, plan: ChunkPlan) -> None:
        plan.open = False
        self._plan = None

    def _restart(self, next_frame: int, state_ready: bool) -> None:
        if self._plan is not None:
            self._close(self._plan)
        self._generation += 1
        self._state_ready = state_ready
        self._seen_skipped = 0
        self.next_frame = next_frame
