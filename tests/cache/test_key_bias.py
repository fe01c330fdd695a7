"""Policies that weigh single keys, by a state on the device: every way of attending sees the weights."""

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import rf_kernels as rf
from helpers.cache_case import make, state_of, step, tensors
from rf_kernels.testing import assert_equal_bits, fingerprint, relative_l2


@dataclasses.dataclass(frozen=True)
class Drawn(rf.SinkPolicy):
    """Every chunk that makes frames leave draws the weights of all keys of the past; some are hidden."""

    samples: bool = True  # each has weights of its own
    frames: bool = False  # frames have weights too
    seed: int = 0

    def bind(self, spec):
        return DrawnState(self, spec)


class DrawnState(rf.SinkState):
    weighs_keys = True

    def __init__(self, policy, spec):
        super().__init__(policy, spec)
        self.weighs = policy.frames
        self.allocate_numbers("bias")

    def sources(self, leaving):
        return [[] for _ in range(self.spec.sink_frames)] if leaving else None

    def weights(self, opening, held):
        return [-0.1 * frame for frame in held]

    def evict(self, layer, k, v, plan):
        bias, n = self.tensors["bias"][layer], self.spec.frame_tokens
        generator = torch.Generator().manual_seed(1000 * plan.end + 10 * layer + self.policy.seed)
        drawn = torch.randn(bias.shape if self.policy.samples else bias.shape[1:], generator=generator)
        bias.copy_(torch.where(drawn > 1, -torch.inf, drawn))
        for frame in range(plan.begin, plan.end):
            bias[:, plan.ring.slot(frame) * n :][:, :n] = 0.5

    def key_bias(self, layer, plan):
        bias = self.tensors["bias"][layer]
        return bias if self.policy.samples else bias[0]


KINDS = {"of samples": Drawn(), "of all samples": Drawn(samples=False), "and of frames": Drawn(frames=True)}


def attended(chunk, layer, q):
    """By PyTorch, over the slots and the policy's own weights."""
    sink, plan, n = chunk.cache._sink, chunk.plan, chunk.cache.spec.frame_tokens
    bias = sink.tensors["bias"][layer][:, : plan.kv_tokens].double()
    if sink.policy.frames:
        frames = torch.tensor([-0.1 * f for f in plan.after.held], dtype=torch.float32)
        bias = bias + frames.double().repeat_interleave(n)
    k, v = (x[layer][:, : plan.kv_tokens] for x in (chunk.cache.k, chunk.cache.v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = bias[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_has_the_weights(kind):
    """Those of `attend`, and those that `kv` gives for attention of one's own, which lie where they lay."""
    cache, places = make(2, 4, policy=KINDS[kind], batch=2, layers=2), set()
    for number in range(8):
        with cache.chunk(2) as chunk:
            for layer in (0, 1):
                for forward in (0, 1):
                    q, k, v = tensors(cache, 2, 100 * number + 10 * layer + forward)
                    found = chunk.attend(layer, q, k, v)
                    rotated = chunk.append(layer, q, k, v)
                    assert relative_l2(found, attended(chunk, layer, rotated)) < 1e-6  # a sum in float32
                    past = chunk.kv(layer)
                    options = {"kv_tokens": past.kv_tokens, "kv_bias": past.bias}
                    own = rf.sink_window_attention(rotated, past.k, past.v, **options)
                    assert_equal_bits(own, found)
                places.add((layer, chunk._key_bias(layer).data_ptr()))
    assert len(places) == 2 and bool(cache._sink.tensors["bias"].isinf().any())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_have_the_weights(kind):
    """Also when later chunks have drawn other ones, and through a checkpointed block."""
    cache = make(2, 4, policy=KINDS[kind], batch=2, rope=None)
    for number in range(6):
        q, k, v = (x.requires_grad_() for x in tensors(cache, 2, number))
        with cache.chunk(2) as chunk:
            if number % 2:
                found = chunk.attend(0, q, k, v)
            else:
                found = checkpoint(lambda *x, chunk=chunk: chunk.attend(0, *x), q, k, v, use_reentrant=False)
            own = torch.zeros_like(cache.k[0], dtype=torch.bool)
            leaves = []
            for slots, x in ((cache.k[0], k), (cache.v[0], v)):
                full = slots.clone()
                for i, frame in enumerate(range(chunk.plan.begin, chunk.plan.end)):
                    at = slice(6 * chunk.plan.ring.slot(frame), 6 * chunk.plan.ring.slot(frame) + 6)
                    own[:, at] = True
                    full[:, at] = x[:, 6 * i : 6 * i + 6]
                leaves.append(full)
            bias = chunk.kv(0).bias.double().expand(2, -1)[:, None, None]
            seen = [x[:, : chunk.kv_tokens].transpose(1, 2) for x in leaves]
            expected = torch.nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), *seen, attn_mask=bias
            ).transpose(1, 2)
            weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(number)).double()
        with torch.no_grad():
            step(cache, 1, 99 + number)
        grads = [torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (found, expected)]
        for a, b in zip(*grads, strict=True):
            assert relative_l2(a, b) < 1e-6


def test_compiled_code_has_the_weights():
    torch._dynamo.reset()
    caches = [make(2, 4, policy=Drawn(frames=True), layers=2, dtype=torch.float32) for _ in range(2)]

    def forward(q, k, v, chunk):
        for layer in range(2):
            q = chunk.attend(layer, q, k, v)
        return q

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for number in range(6):
        data = tensors(caches[0], 2, number)
        with caches[0].chunk(2) as eager, caches[1].chunk(2) as fast, torch.no_grad():
            assert_equal_bits(compiled(*data, fast), forward(*data, eager))


@pytest.mark.parametrize("part", [[0, 1, 2, 3], [3, 1], [2], [0, 2, 3]])
def test_rows_have_the_weights_of_the_row_alone(part):
    """Where some policies weigh keys, some frames, and some nothing."""
    sinks = [Drawn(), Drawn(frames=True, seed=1), rf.StaticSink(), Drawn(samples=False, seed=2)]
    alone = [make(2, 4, policy=sink) for sink in sinks]
    rows = rf.SinkWindowRows(dataclasses.replace(alone[0].spec, batch=4), sink=sinks)
    for number in range(8):
        chosen = part if number % 2 else range(4)
        data = [tensors(alone[0], 2, 10 * number + row) for row in chosen]
        with rows.chunk(2, rows=chosen) as batch:
            found = batch.attend(0, *(torch.cat(x) for x in zip(*data, strict=True)))
        for i, row in enumerate(chosen):
            with alone[row].chunk(2) as chunk:
                assert relative_l2(found[i : i + 1], chunk.attend(0, *data[i])) < 1e-13


WRONG = {
    "too few": lambda self, layer, plan: self.tensors["bias"][layer][:, :-1],
    "float64": lambda self, layer, plan: self.tensors["bias"][layer].double(),
    "no tensor": lambda self, layer, plan: [0.0],
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name, monkeypatch):
    """Before anything is written."""
    cache = make(2, 4, policy=Drawn())
    for number in range(4):
        step(cache, 2, number)
    before = fingerprint(*state_of(cache))
    monkeypatch.setattr(DrawnState, "key_bias", WRONG[name])
    with pytest.raises(rf.ArgumentError, match=r"DrawnState.key_bias.*float32 \[36\] or \[1, 36\]"):
        with cache.chunk(2) as chunk:
            chunk.attend(0, *tensors(cache, 2, 9))
    monkeypatch.undo()
    assert fingerprint(*state_of(cache)) == before and cache.next_frame == 8
    step(cache, 2, 5)


@dataclasses.dataclass(frozen=True)
class MeansOfFew(rf.SinkPolicy):
    """One frame of the window stays; the sink frame is the mean of those that left in the chunk, and of the
    one that stayed."""

    def bind(self, spec):
        return MeansOfFewState(self, spec)


class MeansOfFewState(rf.SinkState):
    def leaving(self, opening, excess):
        return opening.window[: max(excess, len(opening.window) - 1)]

    def sources(self, leaving):
        return [list(leaving)] if leaving else None

    def evict(self, layer, k, v, plan):
        n, frames = self.spec.frame_tokens, [*plan.leaving, plan.leaving[-1] + 1]
        for x in (k, v):
            seen = [x[:, n * plan.slot_of(f) :][:, :n] for f in frames]
            x[:, :n] = torch.stack(seen).mean(0)


def test_a_sink_reads_frames_that_are_moved_over():
    """More frames leave than must, and are absorbed: the one that stays takes a slot of theirs."""
    cache, past, moved = make(1, 9, policy=MeansOfFew(), rope=None), [], 0
    sink = None
    for number, frames in enumerate((3, 2, 4, 3, 1, 3, 3, 2, 4, 3, 3, 1)):
        q, k, v = tensors(cache, frames, number)
        first = sum(len(x[0]) for x in past)
        keys, values = (
            [frame for x in past for frame in x[i]] + list(new.split(6, 1)) for i, new in enumerate((k, v))
        )
        with cache.chunk(frames) as chunk:
            moved += len(chunk.plan.moves)
            found = chunk.attend(0, q, k, v)
            gone = chunk.plan.leaving
        if gone:
            sink = [torch.stack(x[gone[0] : gone[-1] + 2]).mean(0) for x in (keys, values)]
        sink = sink or (keys[0], values[0])
        seen = range(max(1, first - 1), first + frames)
        k_seen, v_seen = (
            torch.cat([x, *(y[f] for f in seen)], 1).transpose(1, 2)
            for x, y in zip(sink, (keys, values), strict=True)
        )
        expected = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k_seen, v_seen)
        assert relative_l2(found, expected.transpose(1, 2)) < 1e-12
        past.append([list(x.split(6, 1)) for x in (k, v)])
    assert moved >= 2
