"""The open chunk: what a model is given, from ``SinkWindowCache.chunk`` or ``open`` to its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .._backend import (
    ArgumentError,
    argument_error,
    check_tensors,
    choice,
    flag,
    integer,
    number,
    refuse_transforms,
)
from ..ops.rope_append import rope_append, rope_append_check
from ..ops.sink_window_attention import sink_window_attention
from . import compiled
from .beside import Beside, answer_of
from .grad import Past, attend_with_grad, inside_backward, snapshot_is_wanted
from .plan import CacheSpec, ChunkPlan, is_integer

if TYPE_CHECKING:
    from .cache import SinkWindowCache

_OP = "Chunk"
_DEFAULT_EPS = 1e-6
#: What an op names where an input does not fit the cache.
_BLAMED = ("k", "v", "k_cache", "v_cache", "slots", "angles", "axes")
#: How far a layer's eviction has come.
_WAITING, _BEGUN, _DONE = range(3)


class KV(NamedTuple):
    """Keys and values of one layer as a chunk's queries may see them."""

    k: Tensor
    """[B, kv_tokens, H, D] view of the valid slots, rotated, in the order of the slots."""
    v: Tensor
    """As k; with ``value_dims`` in the spec the values are a view of k."""
    kv_tokens: int
    bias: Tensor | None = None
    """float32 [kv_tokens] or [B, kv_tokens], to be added to the logits of a key; None where the policy weighs
    nothing."""


class Norms(NamedTuple):
    """The RMSNorm of q and k, as the ops take it."""

    q_weight: Tensor | None
    k_weight: Tensor | None
    norm: str | None
    eps: float


def _weight_and_eps(name: str, norm, dtype: torch.dtype) -> tuple[Tensor | None, float | None]:
    """Weight and eps of a ``q_norm`` or ``k_norm``: a weight, a module that has one, or None."""
    if norm is None or isinstance(norm, Tensor):
        return norm, None
    if isinstance(norm, nn.RMSNorm) and norm.weight is not None:
        if norm.eps is not None:
            return norm.weight, norm.eps
        # PyTorch takes that of the type that it computes in.
        return norm.weight, torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    if isinstance(norm, nn.Identity):
        return None, None
    weight = getattr(norm, "weight", None)
    if isinstance(norm, nn.Module) and isinstance(weight, Tensor) and getattr(norm, "bias", None) is None:
        return weight, getattr(norm, "eps", None)
    found = f"{type(norm).__name__} without a weight" if isinstance(norm, nn.Module) else type(norm).__name__
    raise argument_error(
        f"{_OP}.attend", name, "a weight tensor, an nn.RMSNorm with a weight, or None", found
    )


def norms_of(spec: CacheSpec, q_norm, k_norm, norm: str | None, eps: float | None) -> Norms:
    """The arguments of ``attend`` and ``append`` about norms, as the ops take them."""
    if q_norm is None and k_norm is None:
        if eps is not None:
            number(f"{_OP}.attend", "eps", eps)
        norm = choice(f"{_OP}.attend", "norm", (None, "model", "head"), norm) or "model"
        return Norms(None, None, norm, _DEFAULT_EPS)
    q_weight, q_eps = _weight_and_eps("q_norm", q_norm, spec.dtype)
    k_weight, k_eps = _weight_and_eps("k_norm", k_norm, spec.dtype)
    if eps is None:
        if q_eps is not None and k_eps is not None and q_eps != k_eps:
            raise argument_error(f"{_OP}.attend", "k_norm", f"the eps of q_norm, {q_eps}", k_eps)
        eps = q_eps if q_eps is not None else k_eps
        eps = _DEFAULT_EPS if eps is None else eps
    if norm is None:
        one_head = all(w is None or w.numel() == spec.head_dim for w in (q_weight, k_weight))
        norm = "head" if one_head else "model"
    return Norms(q_weight, k_weight, norm, eps)


class Chunk(Beside):
    """One chunk of latent frames, open: from ``cache.chunk`` or ``cache.open`` to its commit or rollback.

    Any number of forwards may go through it, with the same positions and slots; the last one's keys and
    values stay. Every layer must have been written before the commit.

    Attributes:
        plan: the chunk in numbers, for those who call the ops themselves.
        undo: whether ``rollback`` can return to before the chunk was opened although slots have been written.
    """

    def __init__(self, cache: SinkWindowCache, plan: ChunkPlan, undo: bool):
        self._cache, self.plan, self.undo = cache, plan, undo
        layers = cache.spec.layers
        self._evicted = [_WAITING if plan.prepares else _DONE] * layers
        self._appended = [False] * layers
        #: Layers in which the model has asked what the policy has beside the slots, where it has something.
        self._asked = [not cache._sink.answers] * layers
        #: Layers in which the model has told the text, where the policy hears.
        self._told = [not cache._sink.hears] * layers
        #: What answers are made from: memory and angles of each layer that was asked under grad.
        self._memories: dict[int, tuple] = {}
        #: How the chunk ended; None while it is open.
        self._ended: str | None = None
        self._opened_in = inside_backward()
        self._pasts: dict[int, Past] = {}
        self._handle = compiled.handle_of(self)

    # ---- looking -------------------------------------------------------------------------------------------
    @property
    def cache(self) -> SinkWindowCache:
        """The cache it belongs to."""
        return self._cache

    @property
    def frames(self) -> int:
        """Latent frames of the chunk."""
        return self.plan.t_end - self.plan.t_begin

    @property
    def first_frame(self) -> int:
        """Index in the stream of the chunk's first frame."""
        return self.plan.t_begin

    @property
    def kv_tokens(self) -> int:
        """Tokens that a query of the chunk sees."""
        return self.plan.kv_tokens

    @property
    def is_open(self) -> bool:
        return self._ended is None

    @property
    def written(self) -> bool:
        """Whether any layer of the cache has been written by this chunk."""
        return any(self._appended) or (self.plan.prepares and any(self._evicted))

    def __repr__(self) -> str:
        state = "open" if self._ended is None else self._ended
        return f"Chunk(frames {self.plan.t_begin}..{self.plan.t_end}, {state})"

    # ---- a layer's forward ---------------------------------------------------------------------------------
    def attend(
        self,
        layer: int | Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        *,
        q_norm: Tensor | nn.Module | None = None,
        k_norm: Tensor | nn.Module | None = None,
        norm: str | None = None,
        eps: float | None = None,
        softmax_scale: float | None = None,
        deterministic: bool | None = None,
    ) -> Tensor:
        """Self-attention of the chunk in one layer: absorb what leaves the window (in the layer's first
        forward), normalise and rotate q and k, write k and v to the chunk's slots, and attend all valid keys.

        Args:
            layer: index of the layer: a number, or a tensor (int64 ``[]`` on the host), for modules
                that keep it and are compiled by themselves: each other number would be compiled again.
            q: ``[B, F * n, Hq, D]`` of the cache's dtype, neither normalised nor rotated; k, v: ``[B, F * n,
                H, D]``. No v with ``value_dims`` in the spec: values are channels of k.
            q_norm, k_norm: RMSNorm of q and k: an ``nn.RMSNorm`` (or another module with ``weight`` and
                ``eps``), the weight alone, or None for none. An ``nn.Identity`` counts as None.
            norm: what one mean spans: "model" (all heads of a token) or "head". By default as the weight's
                size says.
            eps: added to the mean of squares. By default the module's; 1e-6 for a weight alone.
            softmax_scale, deterministic: see ``sink_window_attention``.
        Returns:
            ``[B, F * n, Hq, D]``, new; with ``value_dims=(a, b)`` ``[B, F * n, Hq, b - a]``.
        Raises:
            ArgumentError: before anything is written.

        Under grad the result is differentiable with respect to q, k, v and the weights. The past is a
        constant: what the forward saw of it is copied once per chunk and layer, so that backward may come
        after the chunk has ended and its slots are taken by others. Under ``torch.utils.checkpoint``
        (``use_reentrant=False``) the recomputation writes nothing and reads that copy.
        """
        if torch.compiler.is_compiling():
            norms = {"q_norm": q_norm, "k_norm": k_norm, "norm": norm, "eps": eps}
            return self._attend_compiled(layer, q, k, v, softmax_scale, deterministic, **norms)
        refuse_transforms(f"{_OP}.attend")
        try:
            return self._attend(layer, q, k, v, q_norm, k_norm, norm, eps, softmax_scale, deterministic)
        except ArgumentError as error:
            raise self._blamed(error, q, k, v) from None

    #: Compiled code leaves its graph for it.
    _attend_uncompiled = torch._disable_dynamo(attend)

    def append(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        *,
        q_norm=None,
        k_norm=None,
        norm=None,
        eps=None,
    ) -> Tensor:
        """The first half of ``attend``, for attention of one's own: everything but the attention.

        Arguments as for ``attend``. Not differentiable: it refuses inputs that require grad while grad mode
        is on.

        Returns:
            q, normalised and rotated, ``[B, F * n, Hq, D]``; ``kv(layer)`` has the keys and values to attend.
        Raises:
            ArgumentError: before anything is written.
        """
        if not torch.compiler.is_compiling():
            refuse_transforms(f"{_OP}.append")
            if self._is_recomputation():
                expected = "a forward (only `attend` can be recomputed)"
                raise argument_error(f"{_OP}.append", "self", expected, "a recomputation inside backward")
        layer = self._check_layer("append", layer)
        self._check_values("append", v)
        norms = norms_of(self._cache.spec, q_norm, k_norm, norm, eps)
        if torch.compiler.is_compiling():
            return self._append(layer, q, k, v, norms)
        try:
            return self._append(layer, q, k, v, norms)
        except ArgumentError as error:
            raise self._blamed(error, q, k, v) from None

    def kv(self, layer: int) -> KV:
        """The keys and values that the chunk's queries may see in one layer, after its ``append``: views of
        the valid slots."""
        layer = self._check_layer("kv", layer)
        if not self._appended[layer]:
            raise argument_error(
                f"{_OP}.kv", "layer", "a layer that this chunk has written", f"{layer}, not written yet"
            )
        (k, v), tokens = self._cache._slots[layer], self.plan.kv_tokens
        bias = self._bias(self._key_bias(layer))
        return KV(k[:, :tokens], v[:, :tokens], tokens, None if bias is None else bias[..., :tokens])

    def mark_written(self) -> None:
        """Note that all layers were written by other means: the replay of a captured CUDA graph, or the raw
        ops on ``plan``."""
        self._check_open("mark_written")
        self._appended[:] = [True] * len(self._appended)
        self._evicted[:] = [_DONE] * len(self._evicted)
        self._asked[:] = self._told[:] = [True] * len(self._asked)

    # ---- the end -------------------------------------------------------------------------------------------
    def commit(self) -> None:
        """End the chunk: its frames belong to the stream.

        Raises:
            ArgumentError: layers were not written, or not asked under a policy that answers (``beside``),
                or not told the text under one that hears (``tell``).
            NonFiniteError: with ``EMASink(on_nonfinite="raise")``, when leaving frames had tokens that were
                not finite.

        A commit that fails ends the chunk as an exception inside ``with cache.chunk(...)`` does.
        """
        self._check_open("commit")
        try:
            if not all(self._appended):
                missing = [layer for layer, done in enumerate(self._appended) if not done]
                raise argument_error(
                    f"{_OP}.commit", "self", "every layer written", f"nothing in layers {missing}"
                )
            for done, does in ((self._asked, "asks for `beside`"), (self._told, "tells the text by `tell`")):
                if not all(done):
                    missing = [layer for layer, said in enumerate(done) if not said]
                    expected = f"a model that {does} in every layer"
                    found = f"none in layers {missing} under {type(self._cache.sink).__name__}"
                    raise argument_error(f"{_OP}.commit", "self", expected, found)
            self._cache._sink.check_commit(self.plan)
        except BaseException:
            self._fail("a failed commit")
            raise
        self._cache._close(self, "committed", self.plan.after)

    def rollback(self) -> None:
        """Return to before the chunk was opened, bit for bit. A chunk that has written needs ``undo=True``
        for it."""
        self._check_open("rollback")
        if self.written and not self.undo:
            raise argument_error(
                f"{_OP}.rollback", "self", "a chunk opened with undo=True", "undo=False, and slots written"
            )
        self._cache._rollback(self)

    def __enter__(self) -> Chunk:
        self._check_open("__enter__")
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._ended is not None:
            return  # committed, rolled back or voided inside
        if kind is None:
            self.commit()
        else:
            self._fail(f"an exception ({kind.__name__})")

    def _fail(self, reason: str) -> None:
        """The end by an exception."""
        if not self.written or self.undo:
            self._cache._rollback(self)
        else:
            self._cache._break(self, reason)

    # ---- inside --------------------------------------------------------------------------------------------
    def _check_open(self, what: str) -> None:
        if self._ended is not None:
            raise argument_error(
                f"{_OP}.{what}",
                "self",
                "an open chunk",
                f"frames {self.plan.t_begin}..{self.plan.t_end}, {self._ended}",
            )

    def _check_layer(self, what: str, layer: int | Tensor) -> int:
        """The layer as a number. Comparisons of host values: this runs once per layer and forward."""
        if self._ended is not None:
            self._check_open(what)
        return self._number_of(what, layer)

    def _number_of(self, what: str, layer: int | Tensor) -> int:
        layers, number = len(self._appended), layer
        if isinstance(layer, Tensor) and layer.dtype == torch.int64 and layer.dim() == 0 and layer.is_cpu:
            number = layer.item()
        if not is_integer(number) or not 0 <= number < layers:
            raise argument_error(f"{_OP}.{what}", "layer", f"a layer 0..{layers - 1}", repr(layer))
        return number

    def _check_values(self, what: str, v) -> None:
        if (v is None) != (self._cache.spec.value_dims is not None):
            found = "None" if v is None else type(v).__name__
            expected = "a tensor" if v is None else "None (values are channels of the keys)"
            raise argument_error(f"{_OP}.{what}", "v", expected, found)

    def _check_attention(self, q, softmax_scale, deterministic) -> None:
        """What the attention would refuse after the append has written: both ops or none."""
        spec = self._cache.spec
        if isinstance(q, Tensor) and q.dim() == 4 and q.shape[2] % spec.heads:
            raise argument_error(f"{_OP}.attend", "q", f"a multiple of {spec.heads} heads", q.shape[2])
        if spec.head_dim > 256:
            raise argument_error(f"{_OP}.attend", "q", "a head dim of at most 256", spec.head_dim)
        if spec.dtype == torch.float64 and spec.device.type == "cuda":
            raise argument_error(f"{_OP}.attend", "q", "float32, bfloat16 or float16 on a GPU", spec.dtype)
        if softmax_scale is not None and not (
            isinstance(softmax_scale, int | float) and 0 < softmax_scale < float("inf")
        ):
            raise argument_error(
                f"{_OP}.attend", "softmax_scale", "a number above 0, or None", repr(softmax_scale)
            )
        if deterministic is not None:
            flag(f"{_OP}.attend", "deterministic", deterministic)

    def _blamed(self, error: ArgumentError, q, k, v, samples: int | None = None) -> ArgumentError:
        """The error of an op that knows the cache and the chunk only as its own arguments, and blames them:
        here it is the inputs that do not fit. ``samples``: of the inputs, where not the cache's."""
        spec, text = self._cache.spec, str(error)
        samples = samples or spec.batch
        if not any(f"argument `{name}`" in text for name in _BLAMED):
            return error
        tokens = f"{self.frames * spec.frame_tokens} tokens: {self.frames} frames of {spec.frame_tokens}"
        inputs = [(name, x) for name, x in (("q", q), ("k", k), ("v", v)) if isinstance(x, Tensor)]
        for expected, found_of in (
            (f"{spec.dtype}, the cache's dtype", lambda x: (x.dtype, spec.dtype)),
            (f"a tensor on {spec.device.type}", lambda x: (x.device.type, spec.device.type)),
            ("[B, F * n, H, D]", lambda x: (x.dim(), 4)),
            (f"{samples} samples", lambda x: (x.shape[0], samples)),
            (tokens, lambda x: (x.shape[1], self.frames * spec.frame_tokens)),
            (f"{spec.heads} heads", lambda x: (x.shape[2], spec.heads if x is not q else x.shape[2])),
            (f"a head dim of {spec.head_dim}", lambda x: (x.shape[3], spec.head_dim)),
        ):
            for name, x in inputs:
                found, wanted = found_of(x)
                if found != wanted:
                    return argument_error("rope_append", name, expected, found)
        return error

    def _is_recomputation(self) -> bool:
        """Whether this call comes from a backward that the chunk was not opened in: activation
        checkpointing."""
        task = inside_backward()
        return task != -1 and task != self._opened_in

    def _options(self, norms: Norms) -> dict:
        plan = self.plan
        return {
            "slots": plan.slots,
            "angles": plan.angles,
            "axes": plan.axes,
            "layout": self._cache.spec.layout,
            "q_weight": norms.q_weight,
            "k_weight": norms.k_weight,
            "norm": norms.norm,
            "eps": norms.eps,
        }

    def _evict(self, layer: int, q, k, v, options: dict) -> None:
        """The layer's first forward. Both ops or none: what would make the append refuse is known before the
        sink is touched."""
        cache = self._cache
        if self._evicted[layer] == _BEGUN:
            raise argument_error(
                f"{_OP}.attend", "layer", "a layer whose eviction was not interrupted", layer
            )
        self._check_told(layer)
        rope_append_check(q, k, v, *cache._stored[layer], **options)
        cache._check_apart_from_sink(q=q, k=k, v=v)
        self._evicted[layer] = _BEGUN
        cache._prepare(layer, self.plan)
        self._evicted[layer] = _DONE

    def _attend(self, layer, q, k, v, q_norm, k_norm, norm, eps, softmax_scale, deterministic) -> Tensor:
        recomputed = self._is_recomputation()
        layer = self._number_of("attend", layer) if recomputed else self._check_layer("attend", layer)
        self._check_values("attend", v)
        self._check_attention(q, softmax_scale, deterministic)
        norms = norms_of(self._cache.spec, q_norm, k_norm, norm, eps)
        if recomputed or (torch.is_grad_enabled() and snapshot_is_wanted(q, k, v, norms)):
            return self._attend_with_grad(layer, q, k, v, norms, softmax_scale, deterministic, recomputed)
        key_bias = self._key_bias(layer)
        q = self._append(layer, q, k, v, norms)
        k_slots, v_slots = self._cache._slots[layer]
        return sink_window_attention(
            q,
            k_slots,
            v_slots,
            kv_tokens=self.plan.kv_tokens,
            softmax_scale=softmax_scale,
            deterministic=deterministic,
            kv_bias=self._bias(key_bias),
        )

    def _key_bias(self, layer: int) -> Tensor | None:
        """The layer's log-weights as the policy keeps them, refused here if attention would refuse them."""
        state, spec = self._cache._sink, self._cache.spec
        if not state.weighs_keys or (bias := state.key_bias(layer, self.plan)) is None:
            return None
        tokens, device = spec.ring.length * spec.frame_tokens, self._cache._slots[layer][0].device
        fits = isinstance(bias, Tensor) and bias.dtype == torch.float32 and bias.device == device
        if not fits or bias.shape not in ((tokens,), (spec.batch, tokens)):
            found = f"{bias.dtype} {list(bias.shape)}" if isinstance(bias, Tensor) else type(bias).__name__
            expected = f"None, or float32 [{tokens}] or [{spec.batch}, {tokens}] on {device}"
            raise argument_error(f"{type(state).__name__}.key_bias", "result", expected, found)
        return bias

    def _bias(self, key_bias: Tensor | None) -> Tensor | None:
        """With the weights of frames."""
        frames = self.plan.bias
        return frames if key_bias is None else key_bias if frames is None else key_bias + frames

    def _attend_compiled(self, layer, q, k, v, softmax_scale, deterministic, **norms) -> Tensor:
        """What a compiler traces. It sees neither which layer this is nor what the chunk will do there."""
        self._check_values("attend", v)
        check_tensors("rope_append", {"q": q, "k": k}, {"v": v})
        if not isinstance(layer, Tensor):
            layer = integer(f"{_OP}.attend", "layer", layer)
        self._check_attention(q, softmax_scale, deterministic)
        found = norms_of(self._cache.spec, **norms)
        inputs = (q, k, v, found.q_weight, found.k_weight)
        dim = self._cache.spec.value_dim
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            options = {"softmax_scale": softmax_scale, "deterministic": deterministic}
            return self._attend_uncompiled(layer, q, k, v, **norms, **options)
        return compiled.attend(self._handle, layer, q, k, v, *found, softmax_scale, deterministic, dim)

    def _norms_of_q(self, q_norm, norm, eps) -> Norms:
        return norms_of(self._cache.spec, q_norm, None, norm, eps)

    def _answer(self, layer, q, q_weight, norm, eps) -> tuple[Tensor, Tensor]:
        recomputed = self._is_recomputation()
        layer = self._number_of("beside", layer) if recomputed else self._check_layer("beside", layer)
        return answer_of(self, layer, q, Norms(q_weight, None, norm, eps), recomputed)

    @property
    def hears(self) -> bool:
        """Whether the policy wants to be told the text."""
        return self._cache._sink.hears

    def _hear(self, layer, text: Tensor) -> None:
        if self._is_recomputation():
            return
        layer, spec = self._check_layer("tell", layer), self._cache.spec
        expected = f"[{spec.batch}, T, a multiple of {spec.heads}, {spec.head_dim}]"
        if not isinstance(text, Tensor) or text.dim() != 4:
            found = list(text.shape) if isinstance(text, Tensor) else type(text).__name__
            raise argument_error(f"{_OP}.tell", "text", expected, found)
        B, T, H, D = text.shape
        if (B, D) != (spec.batch, spec.head_dim) or H % spec.heads or not T:
            raise argument_error(f"{_OP}.tell", "text", expected, list(text.shape))
        if self._evicted[layer] == _WAITING:
            with torch.no_grad():
                self.plan.told[layer] = self._cache._sink.hear(text)
        self._told[layer] = True

    def _check_told(self, layer: int) -> None:
        if self._cache._sink.hears and self.plan.sources is not None and layer not in self.plan.told:
            expected = "a model that tells the text by `tell` before it attends"
            found = f"none in layer {layer} under {type(self._cache.sink).__name__}"
            raise argument_error(f"{_OP}.attend", "self", expected, found)

    def _append(self, layer: int, q, k, v, norms: Norms) -> Tensor:
        options = self._options(norms)
        if self._evicted[layer] != _DONE:
            self._evict(layer, q, k, v, options)
        q_out = rope_append(q, k, v, *self._cache._stored[layer], **options)
        if self._cache._sink.observes:
            self._cache._sink.observe(layer, q_out, *self._cache._slots[layer], self.plan)
        self._appended[layer] = True
        return q_out

    def _attend_with_grad(self, layer, q, k, v, norms, softmax_scale, deterministic, recomputed) -> Tensor:
        cache, plan = self._cache, self.plan
        past = self._pasts.get(layer)
        if past is None:
            if recomputed:
                raise ArgumentError(
                    f"rf_kernels.{_OP}.attend: argument `self`: expected a forward under grad before its"
                    f" recomputation, found none in layer {layer} (checkpoint with use_reentrant=False: a"
                    " reentrant one runs its forward without grad, and the past that it saw is gone)"
                )
            with torch.no_grad():
                key_bias = self._key_bias(layer)
                if self._evicted[layer] != _DONE:
                    self._evict(
                        layer,
                        *(x.detach() if isinstance(x, Tensor) else x for x in (q, k, v)),
                        self._options(norms),
                    )
                frozen = next(iter(self._pasts.values()), None)
                past = Past.of(*cache._slots[layer], plan, cache.spec, frozen, key_bias)
                self._pasts[layer] = past
        if recomputed:
            return attend_with_grad(q, k, v, norms, past, None, None, softmax_scale, deterministic)

        def written(rotated: Tensor) -> None:
            if cache._sink.observes:
                cache._sink.observe(layer, rotated, *cache._slots[layer], plan)
            self._appended[layer] = True

        return attend_with_grad(
            q, k, v, norms, past, cache._stored[layer], written, softmax_scale, deterministic
        )
