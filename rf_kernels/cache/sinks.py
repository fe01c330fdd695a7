"""Sink policies: what a cache does with the frames that leave its window, and with its sink frames. One class
pair a policy.

A policy is two objects. The *policy* (``SinkPolicy``) is what a user writes down: a frozen value of settings
without tensors, which may serve any number of caches. ``policy.bind(spec)`` gives the *state* (``SinkState``)
of one cache: the tensors that the sink keeps beside the slots, and the rules that act on them. The cache asks
the state and knows no policy by name; docs/sinks.md writes a new one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._backend import argument_error, choice
from ..ops.ema_evict import ema_evict
from ..positions import table_dtype

if TYPE_CHECKING:
    from .plan import CacheSpec, ChunkPlan
    from .stream import Opening

HALF = (torch.bfloat16, torch.float16)


class NonFiniteError(ArithmeticError):
    """Frames with a NaN or an infinity left the window under ``EMASink(on_nonfinite="raise")``."""


class SinkPolicy:
    """Base of the policies. Subclass it as a frozen dataclass of plain settings, and implement ``bind``.

    Attributes:
        rephase: whether the sink's positions move along with the window, so that it keeps its distance to the
            newest frame.
    """

    rephase = False

    def bind(self, spec: CacheSpec) -> SinkState:
        """The state of one cache, zeroed. Raises ``ArgumentError`` where the policy cannot serve such a
        cache."""
        raise NotImplementedError(f"{type(self).__name__}.bind")

    def identity(self) -> dict:
        """What a saved stream must share with the policy that continues it, in JSON types. By default: the
        class and its fields."""
        fields = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        return {"policy": type(self).__qualname__, **{f.name: _plain(getattr(self, f.name)) for f in fields}}


class SinkState:
    """What one cache keeps for its sink, and the rules that act on it. Base of all states; by itself: a sink
    that is never touched.

    Args:
        policy, spec: the settings, and the cache they are bound to.

    Attributes:
        tensors: everything that ``evict`` mutates, by name; the layers are the first dimension. The cache
            saves, loads, zeroes and counts these, and takes them back in a rollback. Add to it with
            ``allocate``.
        max_sources: most frames that one sink frame absorbs in a chunk. The schedule of a chunk has room for
            so many.
        weighs: whether ``weights`` is asked.
        weighs_keys: whether ``key_bias`` is asked.
        observes: whether ``observe`` is called.
        answers: whether the model is to ask ``Chunk.beside`` for what ``answer`` says.
        hears: whether the model is to tell the text, by ``Chunk.tell``.
        resets: whether the sink's slots are all that its state is made of, so that ``reset_sink`` can take it
            from them.
        latent: whether ``evict`` serves a cache with ``value_dims``: ``v`` is then a view of channels of
            ``k``, ``[B, L * n, H, Dv]``. A state that rewrites slots or answers, and does not say so, is
            refused for such a cache.
    """

    latent = weighs = weighs_keys = observes = answers = hears = False
    resets = True

    def __init__(self, policy: SinkPolicy, spec: CacheSpec):
        writes = self.answers or type(self).evict is not SinkState.evict
        if spec.value_dims is not None and writes and not self.latent:
            expected = "a policy that serves values which are channels of the keys (SinkState.latent)"
            raise argument_error("SinkWindowCache", "sink", expected, type(policy).__name__)
        self.policy, self.spec = policy, spec
        self.tensors: dict[str, Tensor] = {}
        self.max_sources = spec.window_frames if spec.sink_frames else 0
        #: Whether keys turn at all when the sink moves. Without temporal positions re-phasing is the
        #: identity.
        self.turns = policy.rephase and spec.rope is not None and spec.rope.temporal_pairs > 0

    def allocate(
        self, name: str, dtype: torch.dtype | None = None, tokens: int | None = None, *, values: bool = False
    ) -> Tensor:
        """A zeroed tensor ``[layers, B, tokens, H, D]`` of the state; by default of the sink's tokens and the
        cache's dtype. ``values``: with the channels that values have."""
        spec = self.spec
        tokens = spec.sink_frames * spec.frame_tokens if tokens is None else tokens
        self.tensors[name] = spec.zeros(tokens, dtype, spec.value_dim if values else None)
        return self.tensors[name]

    def allocate_numbers(
        self, name: str, dtype: torch.dtype = torch.float32, tokens: int | None = None
    ) -> Tensor:
        """A zeroed tensor ``[layers, B, tokens]`` of the state, one number a token; by default of all slots,
        in their order."""
        spec = self.spec
        tokens = spec.ring.length * spec.frame_tokens if tokens is None else tokens
        self.tensors[name] = torch.zeros(spec.layers, spec.batch, tokens, dtype=dtype, device=spec.device)
        return self.tensors[name]

    def sources(self, leaving: Sequence[int]) -> list[list[int]] | None:
        """For each sink frame, the leaving frames that it absorbs, in order. Called when a chunk opens.

        Empty lists: nothing is absorbed, but ``evict`` is called. None: ``evict`` is called, with empty
        lists, only if ``shifts`` has changed. ``leaving`` may be empty. Frames count from the stream's first.
        """
        return None

    def leaving(self, opening: Opening, excess: int) -> Sequence[int]:
        """The frames of ``opening.window`` that leave, where ``excess`` of them have to: these, or more."""
        return opening.window[:excess]

    def positions(self, opening: Opening) -> Sequence[float] | None:
        """Temporal positions of the chunk's own frames, where the caller names none. None: their numbers."""
        return None

    def shifts(self, opening: Opening) -> Sequence[float]:
        """For each sink frame, by how much its position is beyond that of its own frame while the chunk is
        seen: the last of ``plan.turns[j]`` turns by it. Asked once the sink has all its frames."""
        shift = opening.ring.shift(opening.end) if self.turns else 0
        if shift and opening.ring.sink_frames:
            shift += opening.offsets[opening.begin] - opening.offsets[0]
        return (shift,) * opening.ring.sink_frames

    def weights(self, opening: Opening, held: Sequence[int]) -> Sequence[float]:
        """The logarithm of each held frame's weight in the softmax; -inf hides a frame. ``held``: the frame
        in each valid slot. Asked with ``weighs``."""
        return (0.0,) * len(held)

    def key_bias(self, layer: int, plan: ChunkPlan) -> Tensor | None:
        """The logarithm of each key's weight in one layer, float32 ``[B, L * n]`` or ``[L * n]`` in the order
        of the slots: a view of the state. Asked with ``weighs_keys``, in every forward. It is added to the
        logits, and to ``weights``; -inf hides a key; None: all keys weigh 1.

        ``evict`` writes it, and nothing else does: what a chunk's forwards see stays the same. It is asked
        before the layer's ``evict`` and read behind it.
        """
        return None

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor, plan: ChunkPlan) -> None:
        """Called with ``observes`` in every forward, once a layer's keys are written, without grad. May write
        ``tensors[...][layer]``, over what an earlier forward of the chunk left there.

        Args:
            q: the queries, normalised and rotated, ``[B, F * n, Hq, D]``.
            k, v, plan: as for ``evict``.
        """

    def hear(self, text: Tensor) -> Tensor:
        """With ``hears``: what ``evict`` needs of the text in a layer, as ``plan.told[layer]``. Without grad.

        Args:
            text: keys of the text in the layer's cross-attention, ``[B, T, Hq, D]``.
        """
        raise NotImplementedError(f"{type(self).__name__}.hear")

    def memory(self, layer: int, plan: ChunkPlan) -> tuple[Tensor, ...]:
        """With ``answers``: what the chunk's queries are answered from in one layer. New tensors, which later
        chunks do not change. Without grad."""
        raise NotImplementedError(f"{type(self).__name__}.memory")

    def answer(self, q: Tensor, rotated: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """With ``answers``: what stands beside the attention, in PyTorch that autograd can follow.

        Args:
            q, rotated: the queries ``[B, F * n, Hq, D]``, normalised, and rotated beside that.
            memory: what ``memory`` gave for the layer.
        Returns:
            the answer, of q's shape and dtype, and its weight, a number or one a sample ``[B, 1, 1, 1]``: 1,
            or 0 while there is nothing to answer from.
        """
        raise NotImplementedError(f"{type(self).__name__}.answer")

    def evict(self, layer: int, k: Tensor, v: Tensor, plan: ChunkPlan) -> None:
        """Rewrite the sink of one layer in place: absorb ``plan.sources``, turn the keys by ``plan.shifts``.

        Called once per chunk and layer, before the chunk's own keys are written, without grad. It may write
        the sink's slots and ``tensors[...][layer]``, and nothing else. It must not read a device value back.

        Args:
            k, v: the layer's slots ``[B, L * n, H, D]``; frame ``f`` of the stream is in slot
                ``plan.slot_of(f)``. For a frame that leaves, this is ``plan.ring.slot(f)``.
            plan: what the chunk does; ``plan.first`` says that the sink is rewritten for the first time, so
                that slots and state are to be united; ``plan.turns`` has the rotations.
        """
        raise NotImplementedError(f"{type(self).__name__}.evict")

    def check_commit(self, plan: ChunkPlan) -> None:
        """Called when a chunk is about to be committed; an exception here ends the chunk as any other
        does."""

    @property
    def skipped_tokens(self) -> Tensor:
        """``int64 [layers]``: tokens of leaving frames that were not absorbed because they were not
        finite."""
        return torch.zeros(self.spec.layers, dtype=torch.int64, device=self.spec.device)

    def keys_values(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The average as the state holds it, ``[B, S * n, H, D]`` in the widest dtype at hand, for
        inspection; ``k``, ``v``: the sink's slots."""
        return k, v

    def turned(self, keys: Tensor, table: Tensor) -> Tensor:
        """Keys ``[..., D]`` with their temporal pairs turned by ``table`` ``[nt, 2]`` (cos, sin), as
        ``plan.turns[j, i]`` has them."""
        if table.shape[0] == 0:
            return keys
        x0, y0, step = self.spec.temporal_dims
        span = (table.shape[0] - 1) * step + 1
        first, second = slice(x0, x0 + span, step), slice(y0, y0 + span, step)
        cos, sin = table.unbind(-1)
        out = keys.to(torch.promote_types(keys.dtype, table_dtype(self.spec.dtype)), copy=True)
        a, b = out[..., first].clone(), out[..., second].clone()
        out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
        return out


@dataclasses.dataclass(frozen=True)
class NoSink(SinkPolicy):
    """No sink frames: a plain window; frames that leave are dropped."""

    def bind(self, spec: CacheSpec) -> SinkState:
        if spec.sink_frames:
            raise argument_error(
                "SinkWindowCache", "sink", f"a policy for {spec.sink_frames} sink frames", "NoSink()"
            )
        return SinkState(self, spec)


@dataclasses.dataclass(frozen=True)
class StaticSink(SinkPolicy):
    """The first frames stay as they are.

    Args:
        rephase: True keeps their distance to the window (their keys are turned); False (default) keeps their
            absolute positions.
    """

    rephase: bool = False

    def __post_init__(self):
        _check_flag(self)

    def bind(self, spec: CacheSpec) -> SinkState:
        return _StaticState(self, spec)


@dataclasses.dataclass(frozen=True)
class EMASink(SinkPolicy):
    """Frames that leave the window are absorbed by exponential moving average (Reward Forcing, arXiv
    2512.04678, eq. 4-7): ``sink <- alpha * sink + (1 - alpha) * evicted``, keys and values alike, token by
    token. Of S sink frames, frame ``(e - S) mod S`` absorbs frame ``e`` of the stream.

    Args:
        alpha: in [0, 1]; a number, one per sink frame ``[S]``, or one per sink frame and token ``[S, n]``:
            nested sequences or a tensor, of which a copy is kept.
        state: precision of the average. "compensated" (default): a hi + lo pair in the cache's dtype;
            "float32"; "published": the cache's dtype alone, each product and the sum rounded, as the
            published code does. A float32 or float64 cache keeps its state in its own dtype, whichever is
            named.
        held: sink frames that absorb nothing (they are re-phased only).
        on_nonfinite: a token of a leaving frame with a NaN or an infinity anywhere in its K or V is fused in
            neither and counted ("skip"); fused all the same ("propagate"); or skipped, and the commit raises
            ("raise": the only mode that synchronises).
        rephase: True (default, as published): the sink's positions move along with the window. False: they
            are absolute.
    """

    alpha: float | Sequence = 0.999
    state: str = "compensated"
    held: tuple[int, ...] = ()
    on_nonfinite: str = "skip"
    rephase: bool = True

    def __post_init__(self):
        _check_flag(self)
        choice("EMASink", "state", ("compensated", "float32", "published"), self.state)
        choice("EMASink", "on_nonfinite", ("skip", "propagate", "raise"), self.on_nonfinite)
        if not isinstance(self.held, tuple | list) or not all(map(_is_integer, self.held)):
            raise argument_error("EMASink", "held", "a tuple of sink frames", repr(self.held))
        try:
            # Host tensors name their device throughout: a model is often built under torch.device("meta") or
            # a default device.
            alpha = torch.as_tensor(self.alpha, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise argument_error(
                "EMASink", "alpha", "a number, or nested sequences of them", repr(self.alpha)
            ) from None
        if not bool(((alpha >= 0) & (alpha <= 1)).all()):
            raise argument_error("EMASink", "alpha", "values in [0, 1]", self.alpha)
        # Frozen all the way down: what the caller does to a list or tensor afterwards must not change a
        # stream half way.
        object.__setattr__(self, "alpha", _frozen(alpha.tolist()))
        object.__setattr__(self, "held", tuple(self.held))

    def bind(self, spec: CacheSpec) -> SinkState:
        return _EMAState(self, spec)


class _Rephased(SinkState):
    """What static and averaging sinks share: the keys' state at the temporal phase of their own slots, fused
    and turned by ``ema_evict``."""

    latent = True
    precision, alpha = "published", 1.0
    skipped: Tensor | None = None

    def __init__(self, policy: SinkPolicy, spec: CacheSpec):
        super().__init__(policy, spec)
        self.max_sources = -(-spec.window_frames // spec.sink_frames) if spec.sink_frames else 0

    def _bind_layers(self) -> None:
        """The views and constants of every layer's call, made once."""
        self._alpha = torch.tensor(self.alpha, dtype=torch.float64, device=self.spec.device)
        named = [self.tensors.get(name) for name in ("k_state", "k_state_lo", "v_state")]
        self._layers = [tuple(None if t is None else t[i] for t in named) for i in range(self.spec.layers)]
        skipped = self.skipped
        self._skipped = [None if skipped is None else skipped[i : i + 1] for i in range(self.spec.layers)]

    def evict(self, layer: int, k: Tensor, v: Tensor, plan: ChunkPlan) -> None:
        ema_evict(
            k,
            v if self.spec.value_dims is None else None,
            *self._layers[layer],
            schedule=plan.schedule,
            turns=plan.turns,
            alpha=self._alpha,
            frame_tokens=self.spec.frame_tokens,
            temporal=self.spec.temporal_dims,
            state=self.precision,
            on_nonfinite="propagate" if self._skipped[layer] is None else "skip",
            skipped=self._skipped[layer],
        )

    def keys_values(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if self.spec.dtype == torch.float64 else torch.float32
        k_state, k_state_lo, v_state = self._layers[layer]
        k, v = (k if k_state is None else k_state).to(wide), v.to(wide)
        if self.precision == "compensated":
            k = k + k_state_lo.to(wide)
        if self.spec.value_dims is not None:
            v = self.spec.values_of(k)
        elif self.precision == "compensated":
            v = v + v_state.to(wide)
        elif self.precision == "float32":
            v = v_state
        return k, v


class _StaticState(_Rephased):
    def __init__(self, policy: StaticSink, spec: CacheSpec):
        super().__init__(policy, spec)
        if self.turns and spec.sink_frames:
            self.allocate("k_state")
        self._bind_layers()

    def sources(self, leaving: Sequence[int]) -> list[list[int]] | None:
        return [[] for _ in range(self.spec.sink_frames)] if self.tensors and leaving else None


class _EMAState(_Rephased):
    def __init__(self, policy: EMASink, spec: CacheSpec):
        super().__init__(policy, spec)
        frames, tokens = spec.sink_frames, spec.frame_tokens
        if frames and not spec.window_frames:
            raise argument_error("SinkWindowCache", "window_frames", "at least 1 with an EMASink", 0)
        if any(not 0 <= j < frames for j in policy.held):
            raise argument_error("SinkWindowCache", "sink.held", f"sink frames 0..{frames - 1}", policy.held)
        self.alpha = policy.alpha
        shape = torch.tensor(self.alpha, device="cpu").shape
        if shape not in ((), (frames,), (frames, tokens)):
            expected = f"shape (), ({frames},) or ({frames}, {tokens})"
            raise argument_error("SinkWindowCache", "sink.alpha", expected, tuple(shape))
        self.precision = policy.state if spec.dtype in HALF else "published"
        if frames:
            state_dtype = torch.float32 if self.precision == "float32" else spec.dtype
            self.allocate("k_state", state_dtype)
            if self.precision == "compensated":
                self.allocate("k_state_lo")
            if self.precision != "published" and spec.value_dims is None:
                self.allocate("v_state", state_dtype)
            self.tensors["skipped"] = torch.zeros(spec.layers, dtype=torch.int64, device=spec.device)
            if policy.on_nonfinite != "propagate":
                self.skipped = self.tensors["skipped"]
        self._bind_layers()

    @property
    def skipped_tokens(self) -> Tensor:
        return self.tensors["skipped"] if self.tensors else super().skipped_tokens

    def sources(self, leaving: Sequence[int]) -> list[list[int]] | None:
        if not self.tensors or not leaving:
            return None
        frames = self.spec.sink_frames
        absorbed: list[list[int]] = [[] for _ in range(frames)]
        for e in leaving:
            j = (e - frames) % frames
            if j not in self.policy.held:
                absorbed[j].append(e)
        return absorbed

    def check_commit(self, plan: ChunkPlan) -> None:
        if plan.sources is None or self.policy.on_nonfinite != "raise":
            return
        # A chunk that is committed has skipped nothing in this mode, so the count is this chunk's.
        if skipped := int(self.tensors["skipped"].sum()):
            frames = [plan.after.origin + e for e in plan.leaving]
            raise NonFiniteError(
                f"rf_kernels.SinkWindowCache: {skipped} tokens of the frames {frames} that left"
                " the window were not finite; they were not fused into the sink"
            )


def _check_flag(policy: SinkPolicy) -> None:
    if not isinstance(policy.rephase, bool):
        raise argument_error(type(policy).__name__, "rephase", "True or False", repr(policy.rephase))


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _frozen(value):
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _plain(value):
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
