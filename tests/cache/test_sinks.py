"""Sink policies: what the built-in ones absorb, that they are frozen, and that a stranger can write
another."""

import copy
import dataclasses

import pytest
import torch

import rf_kernels as rf
from helpers.cache_case import make, state_of, step, tensors, write
from rf_kernels.reference.streaming import rotate, softmax_attention, token_positions
from rf_kernels.testing import assert_equal_bits, fingerprint, relative_l2

# ---- the built-in ones -------------------------------------------------------------------------------------


def test_an_inspected_state_is_a_copy():
    cache = make(2, 2, dtype=torch.float32)
    for chunk in range(4):  # before and after the first frame leaves
        step(cache, 1, chunk)
        before = fingerprint(*state_of(cache))
        for t in cache.sink_state(0):
            assert bool(t.any())
            t.zero_()
        assert fingerprint(*state_of(cache)) == before


def test_held_frames_absorb_nothing():
    cache, free = (make(2, 3, policy=rf.EMASink(0.5, held=held)) for held in ((0,), ()))
    for chunk in range(6):
        step(cache, 1, chunk)
        step(free, 1, chunk)
    n = cache.spec.frame_tokens
    held, averaged = cache.sink_state(0)[0], free.sink_state(0)[0]
    assert_equal_bits(held[:, n:], averaged[:, n:])
    first = make(2, 3)
    step(first, 1, 0)
    assert relative_l2(held[:, :n], first.sink_state(0)[0]) < 1e-15
    assert relative_l2(averaged[:, :n], held[:, :n]) > 0.1


@pytest.mark.parametrize("given", [[0.9, 0.7], torch.tensor([0.9, 0.7], dtype=torch.float64)])
def test_a_policy_keeps_its_own_alphas(given):
    """What the caller does to a list or a tensor afterwards changes no stream, and no saved one."""
    policy = rf.EMASink(given)
    cache, twin = make(2, 3, policy=policy), make(2, 3, policy=rf.EMASink((0.9, 0.7)))
    assert policy == twin.sink and hash(policy) == hash(twin.sink)
    given[0] = 0.1
    assert policy.alpha == (0.9, 0.7)
    late = make(2, 3, policy=policy)
    for chunk in range(6):
        expected = step(twin, 1, chunk)[0]
        for each in (cache, late):
            assert_equal_bits(step(each, 1, chunk)[0], expected)
    assert cache.state_dict()["meta"] == twin.state_dict()["meta"]


@pytest.mark.parametrize("policy", [rf.NoSink, rf.StaticSink, rf.EMASink])
def test_policies_are_frozen_values(policy):
    assert policy() == policy() and repr(policy()).startswith(policy.__name__)
    for field in dataclasses.fields(policy):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(policy(), field.name, 0)


# ---- another one, from outside -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TwoRates(rf.SinkPolicy):
    """Every sink frame absorbs every frame that leaves, as the mean of its tokens, each at its own rate: a
    long and a short memory."""

    rates: tuple[float, ...] = (0.9, 0.4)
    rephase: bool = True

    def bind(self, spec):
        return TwoRatesState(self, spec)


class TwoRatesState(rf.SinkState):
    def __init__(self, policy, spec):
        super().__init__(policy, spec)
        for name in ("k_mean", "v_mean"):
            self.allocate(name, torch.promote_types(spec.dtype, torch.float32), tokens=spec.sink_frames)

    def sources(self, leaving):
        return [list(leaving) for _ in self.policy.rates] if leaving else None

    def evict(self, layer, k, v, plan):
        n = self.spec.frame_tokens
        for j, rate in enumerate(self.policy.rates):
            slot = slice(j * n, (j + 1) * n)
            k_mean, v_mean = (self.tensors[name][layer, :, j : j + 1] for name in ("k_mean", "v_mean"))
            if plan.first:
                k_mean.copy_(k[:, slot].mean(1, keepdim=True))
                v_mean.copy_(v[:, slot].mean(1, keepdim=True))
            for i, e in enumerate(plan.sources[j]):
                source = slice(plan.ring.slot(e) * n, (plan.ring.slot(e) + 1) * n)
                turned = self.turned(k[:, source], plan.turns[j, i])
                k_mean.lerp_(turned.to(k_mean.dtype).mean(1, keepdim=True), 1 - rate)
                v_mean.lerp_(v[:, source].to(v_mean.dtype).mean(1, keepdim=True), 1 - rate)
            k[:, slot] = self.turned(k_mean, plan.turns[j, -1]).to(k.dtype)
            v[:, slot] = v_mean.to(v.dtype)


class Reference:
    """The same rule in float64 over raw keys, by frame; no ring."""

    def __init__(self, cache):
        self.cache, self.grid = cache, cache.spec.grid
        self.frames, self.means, self.t_end = {}, {}, 0

    def begin(self, frames):
        spec = self.cache.spec
        self.t_begin, self.t_end = self.t_end, self.t_end + frames
        for e in sorted(f for f in self.frames if spec.sink_frames <= f < self.t_end - spec.window_frames):
            k, v = self.frames.pop(e)
            for j, rate in enumerate(self.cache.sink.rates):
                if j not in self.means:
                    first_k, first_v = self.frames.pop(j)
                    first_k = rotate(first_k, token_positions([j], self.grid))
                    self.means[j] = first_k.mean(1, keepdim=True), first_v.mean(1, keepdim=True)
                new = (
                    rotate(k, token_positions([j], self.grid)).mean(1, keepdim=True),
                    v.mean(1, keepdim=True),
                )
                self.means[j] = tuple(
                    rate * old + (1 - rate) * x for old, x in zip(self.means[j], new, strict=True)
                )

    def attend(self, q, k, v):
        n, spec = self.cache.spec.frame_tokens, self.cache.spec
        own = list(range(self.t_begin, self.t_end))
        for i, frame in enumerate(own):
            self.frames[frame] = k[:, i * n : (i + 1) * n], v[:, i * n : (i + 1) * n]
        shift = max(0, self.t_end - spec.sink_frames - spec.window_frames)
        keys = [
            rotate(m[0], torch.tensor([[shift, 0.0, 0.0]]).double()).repeat(1, n, 1, 1)
            for m in self.means.values()
        ]
        values = [m[1].repeat(1, n, 1, 1) for m in self.means.values()]
        keys += [rotate(x[0], token_positions([f], self.grid)) for f, x in self.frames.items()]
        values += [x[1] for x in self.frames.values()]
        return softmax_attention(
            rotate(q, token_positions(own, self.grid)), torch.cat(keys, 1), torch.cat(values, 1)
        )


@pytest.mark.parametrize("lengths", [[1] * 12, [2, 3, 1, 3, 3, 2], [3] * 5])
@pytest.mark.parametrize("window_frames", [3, 5])
def test_a_policy_of_a_stranger_streams(lengths, window_frames):
    cache = make(2, window_frames, policy=TwoRates(), batch=2)
    reference, fused = Reference(cache), 0
    for number, frames in enumerate(lengths):
        reference.begin(frames)
        with cache.chunk(frames) as chunk:
            fused += len(chunk.plan.leaving)
            for forward in range(2):
                q, k, v = tensors(cache, frames, 10 * number + forward)
                assert relative_l2(chunk.attend(0, q, k, v), reference.attend(q, k, v)) < 1e-12
    assert fused >= 5


def test_a_policy_of_a_stranger_is_taken_back_saved_and_copied(tmp_path):
    cache = make(2, 3, policy=TwoRates(), dtype=torch.bfloat16, layers=2, undo_frames=2)
    for number in range(5):
        step(cache, 2, number)
    before = fingerprint(*state_of(cache))
    with pytest.raises(ZeroDivisionError), cache.chunk(2, undo=True) as chunk:
        write(chunk, 9)
        assert fingerprint(*state_of(cache)) != before
        raise ZeroDivisionError
    assert fingerprint(*state_of(cache)) == before
    cache.save(tmp_path / "stream")
    other, copied = make(2, 3, policy=TwoRates(), dtype=torch.bfloat16, layers=2), copy.deepcopy(cache)
    other.load(tmp_path / "stream")
    expected = torch.stack(step(cache, 2, 10))
    for each in (other, copied):
        assert_equal_bits(torch.stack(step(each, 2, 10)), expected)
    with pytest.raises(rf.ArgumentError, match="meta.sink"):
        make(2, 3, policy=TwoRates((0.9, 0.5)), dtype=torch.bfloat16, layers=2).load(tmp_path / "stream")
    cache.reset()
    assert not any(bool(t.any()) for t in state_of(cache))


@pytest.mark.parametrize("wrong", [[[0]], [[], [99]], [[2] * 9, []]])
def test_sources_that_do_not_fit_are_refused(monkeypatch, wrong):
    """Before anything is uploaded: a slot that does not exist must not reach a device."""
    cache = make(2, 3, policy=TwoRates())
    for number in range(3):
        step(cache, 2, number)
    before = fingerprint(*state_of(cache), cache._buffers.ints)
    monkeypatch.setattr(TwoRatesState, "sources", lambda self, leaving: wrong)
    with pytest.raises(rf.ArgumentError, match="TwoRatesState.sources"):
        cache.open(2)
    assert fingerprint(*state_of(cache), cache._buffers.ints) == before
