"""Every policy against its rule in float64 over all past raw keys and values, for streams with evictions; and
what holds for all: a chunk is taken back, a stream saved and gone on with."""

import copy
import dataclasses

import pytest
import torch

import rf_kernels as rf
from helpers import policy_rules as rules
from helpers.cache_case import make, state_of, step, tensors
from reward_forcing import policies
from rf_kernels.reference.streaming import rotate, token_positions
from rf_kernels.testing import assert_equal_bits, fingerprint, relative_l2


@dataclasses.dataclass(frozen=True)
class Case:
    policy: rf.SinkPolicy
    rule: object
    sizes: tuple = ((3, 6), (3, 5))
    lengths: tuple = ((3,) * 13, (2, 3, 1, 3, 2, 3, 1, 2, 3, 3, 1, 2, 3, 2))
    cuts: tuple = ()  # numbers of the chunks that begin a shot
    jump: float = 0.0
    place: object = None


def of(function, *arguments, **more):
    return lambda told: function(told, *arguments, **more)


CUTS = (4, 9)
CASES = {
    "static": Case(rf.StaticSink(rephase=True), rules.static),
    "static, absolute": Case(rf.StaticSink(), of(rules.static, rephase=False)),
    "static, large": Case(rf.StaticSink(rephase=True), rules.static, sizes=((9, 6), (6, 4))),
    "steady": Case(policies.parse("steady"), of(rules.steady, alpha=0.99, held=(0,))),
    "two rates": Case(policies.TwoRateMemory(), of(rules.two_rates, 0.01, 0.1), sizes=((5, 7), (2, 4))),
    "two rates, adaptive": Case(
        policies.TwoRateMemory(0.05, 0.15, adaptive=True), of(rules.two_rates, 0.05, 0.15, adaptive=True)
    ),
    "strided": Case(policies.StridedMemory(2), of(rules.strided, 2), sizes=((4, 10), (3, 4))),
    "strided, taps": Case(
        policies.StridedMemory(2, taps=(0.1, 0.2, 0.3, 0.2, 0.4)),
        of(rules.strided, 2, taps=(0.1, 0.2, 0.3, 0.2, 0.4)),
        sizes=((4, 10), (2, 8)),
        lengths=((6, *(8,) * 12), (2, *(8,) * 12)),
    ),
    "cyclic": Case(policies.CyclicSink(), of(rules.cyclic, 6), sizes=((3, 6), (4, 5))),
    "cyclic, long bank": Case(policies.CyclicSink(8), of(rules.cyclic, 8), sizes=((3, 4), (6, 5))),
    "ahead": Case(policies.PlacedSink(ahead=2.5), of(rules.placed, ahead=2.5), sizes=((1, 6), (2, 5))),
    "identity": Case(policies.PlacedSink(at=0.0), of(rules.placed, at=0.0)),
    "shots": Case(
        policies.PinnedShots(2, offset=8),
        of(rules.shots, 2, offset=8),
        sizes=((4, 6), (5, 5)),
        cuts=CUTS,
        jump=8,
    ),
    "regions": Case(
        policies.PinnedShots(2, span=21, where="shot"),
        of(rules.shots, 2, span=21, where="shot"),
        sizes=((4, 6), (3, 5)),
        cuts=CUTS,
    ),
    "rope cut": Case(
        policies.RopeCut(30, keep=1), of(rules.rope_cut, 30, 1), sizes=((0, 9), (2, 5)), cuts=CUTS, jump=30
    ),
    "log bias": Case(policies.LogBias(0.3), of(rules.log_bias, 0.3), sizes=((0, 9), (2, 5))),
    "random": Case(policies.RandomHistory(2, seed=3), of(rules.random_history, 2, 3), sizes=((0, 9), (2, 5))),
    "state": Case(
        policies.StateSlot(4), of(rules.state_slot, 4), sizes=((0, 10), (0, 7)), lengths=((4,) * 12,) * 2
    ),
}
GEOMETRIES = [{"grid": (2, 3), "heads": 2, "batch": 2}, {"grid": (3, 1), "heads": 3, "head_dim": 16}]


def attention(q, own, seen, own_at, grid):
    """Softmax over what the rule says, and the chunk itself; queries and keys rotated here."""
    n = grid[0] * grid[1]
    entries = [(*x, 0.0)[:4] for x in seen]
    entries += [
        (p, own[0][:, i * n : (i + 1) * n], own[1][:, i * n : (i + 1) * n], 0.0) for i, p in enumerate(own_at)
    ]
    keys = torch.cat([rotate(k, token_positions([p], grid)) for p, k, _, _ in entries], 1)
    values = torch.cat([v for _, _, v, _ in entries], 1)
    # the operator takes the bias in float32
    bias = torch.tensor([w for *_, w in entries], dtype=torch.float32).double().repeat_interleave(n)
    logits = torch.einsum("bqhd,bkhd->bhqk", rotate(q, token_positions(own_at, grid)), keys)
    weights = (logits / q.shape[-1] ** 0.5 + bias).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_a_policy_is_its_rule(name, which):
    case, geometry = CASES[name], GEOMETRIES[which]
    S, W = case.sizes[which]
    cache = make(S, W, policy=case.policy, **geometry)
    told, left, n, grid = rules.Told(S, W), 0, cache.spec.frame_tokens, cache.spec.grid
    for number, frames in enumerate(case.lengths[which]):
        begin = told.ends[-1] if told.ends else 0
        cut = number in case.cuts
        told.ends.append(begin + frames)
        told.cuts += [begin] * cut
        own_at = rules.jumping(begin, frames, told.cuts, case.jump)
        if name == "state":
            content = begin // frames * (frames - 1)
            own_at = [content - (W - frames + 1), *range(content, content + frames - 1)]
        seen = case.rule(told)
        with cache.chunk(frames, cut=cut) as chunk:
            left += len(chunk.plan.leaving)
            for forward in range(2):
                q, k, v = tensors(cache, frames, 10 * number + forward)
                expected = attention(q, (k, v), seen, own_at, grid)
                assert relative_l2(chunk.attend(0, q, k, v), expected) < 1e-12
        for i in range(frames):
            at = slice(i * n, (i + 1) * n)
            told.q[begin + i], told.k[begin + i], told.v[begin + i] = q[:, at], k[:, at], v[:, at]
            told.at[begin + i] = own_at[i]
    assert len(told.ends) >= 12 and left >= 5


@pytest.mark.parametrize("name", CASES)
def test_a_policy_is_taken_back_saved_and_copied(name, tmp_path):
    case = CASES[name]
    (S, W), lengths = case.sizes[0], case.lengths[0]
    geometry = {"policy": case.policy, "dtype": torch.bfloat16, "layers": 2}
    cache = make(S, W, undo_frames=S + W, **geometry)
    for number in range(6):
        with cache.chunk(lengths[number], cut=number in case.cuts) as chunk:
            step_into(chunk, number)
    before, stream = fingerprint(*state_of(cache)), cache._stream
    with pytest.raises(ZeroDivisionError), cache.chunk(lengths[6], cut=bool(case.cuts), undo=True) as chunk:
        step_into(chunk, 9)
        raise ZeroDivisionError
    assert (fingerprint(*state_of(cache)), cache._stream) == (before, stream)
    cache.save(tmp_path / "stream")
    other, copied = make(S, W, **geometry), copy.deepcopy(cache)
    other.load(tmp_path / "stream")
    for number in (6, 7):
        expected = torch.stack(step(cache, lengths[number], number))
        assert torch.isfinite(expected).all()
        for each in (other, copied):
            assert_equal_bits(torch.stack(step(each, lengths[number], number)), expected)


def step_into(chunk, seed):
    for layer in range(chunk.cache.spec.layers):
        chunk.attend(layer, *tensors(chunk.cache, chunk.frames, 100 * seed + layer))
