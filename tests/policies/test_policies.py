"""Every policy against its rule in float64 over all past raw keys and values, for streams with evictions; and
what holds for all: a chunk is taken back, a stream saved and gone on with."""

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch

import rf_kernels as rf
from helpers import policy_rules as rules
from helpers.cache_case import attend as asked
from helpers.cache_case import make, state_of, step, tensors, text_of, write
from reward_forcing import policies
from rf_kernels.reference.streaming import rotate, token_positions
from rf_kernels.testing import assert_equal_bits, fingerprint, relative_l2

ROOT = Path(__file__).resolve().parents[2]
NAMES = dict(policies.NAMES)  # those that ship: a page adds one


@dataclasses.dataclass(frozen=True)
class Case:
    policy: rf.SinkPolicy
    rule: object
    sizes: tuple = ((3, 6), (3, 5))
    lengths: tuple = ((3,) * 13, (2, 3, 1, 3, 2, 3, 1, 2, 3, 3, 1, 2, 3, 2))
    cuts: tuple = ()  # numbers of the chunks that begin a shot
    jump: float = 0.0
    beside: object = None  # what it answers beside the attention


def of(function, *arguments, **more):
    return lambda told: function(told, *arguments, **more)


CUTS = (4, 9)
CHOOSING = (
    "routed",
    "routed, one",
    "important",
    "recall",
    "merged",
    "merged, absolute",
    "merged, with a bound",
    "patches",
    "patches, more of them",
)  # by scores of keys
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
    "important": Case(policies.ImportantTokens(2), of(rules.important, 2), sizes=((4, 6), (3, 5))),
    "merged": Case(policies.MergedTokens(2, 0.15), of(rules.merged, 2, 0.15), sizes=((4, 6), (3, 5))),
    "merged, absolute": Case(
        policies.MergedTokens(1, 0.15, rephase=False),
        of(rules.merged, 1, 0.15, False),
        sizes=((1, 6), (3, 5)),
    ),
    "merged, with a bound": Case(
        policies.MergedTokens(1, 0.1, most=1.5), of(rules.merged, 1, 0.1, most=1.5), sizes=((2, 4), (1, 5))
    ),
    "recall": Case(
        policies.RecalledFrames(2, 0.35, 0.3), of(rules.recalled, 2, 0.35, 0.3), sizes=((4, 6), (3, 5))
    ),
    "linear": Case(
        policies.LinearState(),
        rules.static,
        beside=lambda told, q, at, *x: rules.linear(told, q, at, "relu", told.S + told.W, *x),
    ),
    "linear, span": Case(
        policies.LinearState("softmax", span=13),
        of(rules.static, span=13),
        sizes=((3, 6), (1, 5)),
        beside=lambda told, q, at, *x: rules.linear(told, q, at, "softmax", 13, *x),
    ),
    "routed": Case(policies.RoutedFrames(3, 2), of(rules.routed, 3, 2), sizes=((4, 6), (3, 5))),
    "routed, one": Case(policies.RoutedFrames(1, 1), of(rules.routed, 1, 1), sizes=((1, 6), (2, 5))),
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
    "rolling": Case(
        policies.RollingAnchor(7),
        of(rules.rolling, 7),
        sizes=((2, 9), (3, 6)),
        lengths=((3,) * 13, (2, 4) * 7),
    ),
    "random, of the older": Case(
        policies.RandomHistory(1, seed=3, nearest=2),
        of(rules.random_history, 1, 3, nearest=2),
        sizes=((0, 9), (2, 7)),
    ),
    "random, of the sink": Case(
        policies.RandomHistory(None, seed=3, sink_frames=1),
        of(rules.random_history, None, 3, 1),
        sizes=((3, 6), (2, 5)),
    ),
    "short": Case(policies.ShortWindow(1), of(rules.short, 1), sizes=((2, 6), (3, 5))),
    "short, the chunk alone": Case(policies.ShortWindow(0), of(rules.short, 0), sizes=((0, 6), (1, 7))),
    "patches": Case(policies.ChangingPatches(3), of(rules.patches, 3, 0.33, 1, 1), sizes=((2, 4), (2, 9))),
    "patches, more of them": Case(
        policies.ChangingPatches(3, 0.6, 2, 2, rephase=True),
        of(rules.patches, 3, 0.6, 2, 2, rephase=True),
        sizes=((4, 9), (3, 5)),
    ),
    "state": Case(
        policies.StateSlot(4), of(rules.state_slot, 4), sizes=((0, 10), (0, 7)), lengths=((4,) * 12,) * 2
    ),
}


@dataclasses.dataclass(frozen=True)
class EveryOther(rf.SinkPolicy):
    """A stranger's: odd frames of the window leave first, each shot stands 5 positions further on, and
    what is older than the shot weighs half."""

    def bind(self, spec):
        return EveryOtherState(self, spec)


class EveryOtherState(rf.SinkState):
    weighs = True

    def positions(self, opening):
        if opening.begin:
            begin = opening.position(opening.begin - 1) + 1 + 5 * opening.cut
            return [begin + i for i in range(opening.end - opening.begin)]

    def leaving(self, opening, excess):
        return sorted(opening.window, key=lambda f: (f % 2 == 0, f))[:excess]

    def weights(self, opening, held):
        return [math.log(0.5) if f < opening.shot else 0.0 for f in held]


def every_other(told):
    window = []
    for begin, end in zip([0, *told.ends[:-1]], told.ends, strict=True):
        own = [f for f in range(begin, end) if f >= told.S]
        excess = max(0, len(window) + len(own) - told.W)
        odd, even = ([f for f in window if f % 2 == x] for x in (1, 0))
        window = sorted((odd + even)[excess:] + own)
    shot = told.cuts[-1] if told.cuts else 0
    seen = [f for f in (*range(told.S), *window) if f < told.begin]
    return [(told.at[f], told.k[f], told.v[f], math.log(0.5) * (f < shot)) for f in seen]


CASES["a stranger's"] = Case(EveryOther(), every_other, sizes=((2, 9), (1, 7)), cuts=CUTS, jump=5)
GEOMETRIES = [{"grid": (2, 3), "heads": 2, "batch": 2}, {"grid": (3, 1), "heads": 3, "head_dim": 16}]


def attention(q, own, seen, own_at, grid, dtype=torch.float64):
    """Softmax over what the rule says, and the chunk itself; queries and keys rotated here."""
    n = grid[0] * grid[1]
    entries = [(*x, 0.0)[:4] for x in seen]
    entries += [
        (p, own[0][:, i * n : (i + 1) * n], own[1][:, i * n : (i + 1) * n], 0.0) for i, p in enumerate(own_at)
    ]
    keys = torch.cat([k if p is None else rotate(k, token_positions([p], grid)) for p, k, _, _ in entries], 1)
    values = torch.cat([v for _, _, v, _ in entries], 1)
    # the operator takes the bias in float32
    weights = [torch.as_tensor(w, dtype=torch.float32).double() for *_, w in entries]
    bias = torch.cat([w.expand(k.shape[:2]) for w, (_, k, _, _) in zip(weights, entries, strict=True)], 1)
    q = rotate(q, token_positions(own_at, grid))
    q, keys, values = (x.to(dtype).transpose(1, 2) for x in (q, keys, values))
    bias = bias.to(dtype)[:, None, None]
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=bias).transpose(1, 2)


def own_positions(name, told, case):
    frames = told.end - told.begin
    if name != "state":
        return rules.jumping(told.begin, frames, told.cuts, case.jump)
    content = told.begin // frames * (frames - 1)
    return [content - (told.W - frames + 1), *range(content, content + frames - 1)]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_a_policy_is_its_rule(name, which):
    case, geometry = CASES[name], GEOMETRIES[which]
    S, W = case.sizes[which]
    cache = make(S, W, policy=case.policy, **geometry)
    left, n, grid = 0, cache.spec.frame_tokens, cache.spec.grid
    told = rules.Told(S, W, grid=grid)
    for number, frames in enumerate(case.lengths[which]):
        begin = told.ends[-1] if told.ends else 0
        cut = number in case.cuts
        told.ends.append(begin + frames)
        told.cuts += [begin] * cut
        told.text.append(text_of(cache, begin))
        seen, own_at = case.rule(told), own_positions(name, told, case)
        with cache.chunk(frames, cut=cut) as chunk:
            left += len(chunk.plan.leaving)
            for forward in range(2):
                q, k, v = tensors(cache, frames, 10 * number + forward)
                expected = attention(q, (k, v), seen, own_at, grid)
                chunk.tell(0, told.text[-1])
                assert relative_l2(chunk.attend(0, q, k, v), expected) < 1e-12
                if case.beside is not None:
                    assert relative_l2(chunk.beside(0, q), case.beside(told, q, own_at)) < 1e-12
        for i in range(frames):
            at = slice(i * n, (i + 1) * n)
            told.q[begin + i], told.k[begin + i], told.v[begin + i] = q[:, at], k[:, at], v[:, at]
            told.at[begin + i] = own_at[i]
    assert len(told.ends) >= 12 and left >= 5


# A prompt has no position; the identity is one.
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("routed", "identity")])
def test_a_stream_may_begin_at_any_frame(name):
    """Attention sees differences of positions: a stream that begins at frame 7 is the same stream."""
    case, found = CASES[name], []
    for start in (0, 7):
        cache, outputs = make(*case.sizes[0], policy=case.policy), []
        for number, frames in enumerate(case.lengths[0]):
            origin = {} if number else {"start": start}
            with cache.chunk(frames, cut=number in case.cuts, **origin) as chunk:
                chunk.tell(0, text_of(cache, 9 * number))
                q, k, v = tensors(cache, frames, number)
                outputs.append(chunk.attend(0, q, k, v))
                if case.beside is not None:
                    outputs.append(chunk.beside(0, q))
        found.append(torch.cat(outputs, 1))
    assert relative_l2(*found) < 1e-12


@pytest.mark.parametrize("name", [name for name in CASES if name not in CHOOSING])
def test_a_policy_in_bfloat16_is_as_near_as_plain_attention(name):
    """Whose keys were rotated in float64 and rounded once. (Where scores choose, rounding chooses too.)"""
    case = CASES[name]
    (S, W), lengths = case.sizes[1], case.lengths[1]
    cache = make(S, W, policy=case.policy, dtype=torch.bfloat16, grid=(3, 4))
    told, n, grid, errors, beside = rules.Told(S, W, grid=(3, 4)), 12, (3, 4), [], []
    for number, frames in enumerate(lengths):
        begin = told.ends[-1] if told.ends else 0
        told.ends.append(begin + frames)
        told.cuts += [begin] * (number in case.cuts)
        seen, own_at = case.rule(told), own_positions(name, told, case)
        inputs = tensors(cache, frames, number)
        q, k, v = (x.double() for x in inputs)
        with cache.chunk(frames, cut=number in case.cuts) as chunk:
            found = chunk.attend(0, *inputs)
            if case.beside is not None:
                answer, exact = chunk.beside(0, inputs[0]).double(), case.beside(told, q, own_at)
                plain = case.beside(told, q, own_at, torch.bfloat16).double()
                beside.append((relative_l2(answer, exact), relative_l2(plain, exact)))
        expected = attention(q, (k, v), seen, own_at, grid)
        eager = attention(q, (k, v), seen, own_at, grid, torch.bfloat16)
        errors.append((relative_l2(found.double(), expected), relative_l2(eager.double(), expected)))
        for i in range(frames):
            at = slice(i * n, (i + 1) * n)
            told.k[begin + i], told.v[begin + i], told.at[begin + i] = k[:, at], v[:, at], own_at[i]
    for each in filter(None, (errors, beside)):
        ours, plain = (max(e) for e in zip(*each, strict=True))
        assert ours <= 2 * plain


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
        asked(chunk, layer, *tensors(chunk.cache, chunk.frames, 100 * seed + layer))


@pytest.mark.parametrize("name", ["log bias, a sink", "merged"])
def test_a_chunk_with_weights_has_gradients(name):
    """Also when later chunks have taken its slots, and through a checkpointed block."""
    policy, rule = {
        "log bias, a sink": (policies.LogBias(0.3), of(rules.log_bias, 0.3)),
        "merged": (policies.MergedTokens(1, 0.1), of(rules.merged, 1, 0.1)),
    }[name]
    cache = make(2, 5, policy=policy, grid=(2, 3))
    told, n = rules.Told(2, 5, grid=(2, 3)), 6
    for number in range(6):
        told.ends.append(told.begin + 3 if not told.ends else told.ends[-1] + 3)
        q, k, v = (x.requires_grad_() for x in tensors(cache, 3, number))
        own_at = list(range(told.begin, told.end))
        expected = attention(q, (k, v), rule(told), own_at, (2, 3))
        with cache.chunk(3) as chunk:
            if number % 2:
                found = chunk.attend(0, q, k, v)
            else:
                found = torch.utils.checkpoint.checkpoint(
                    lambda q, k, v, chunk=chunk: chunk.attend(0, q, k, v), q, k, v, use_reentrant=False
                )
        with torch.no_grad():
            step(copy.deepcopy(cache), 3, 99)
        grads = [torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (found, expected)]
        for a, b in zip(*grads, strict=True):
            assert relative_l2(a, b) < 1e-12
        for i, frame in enumerate(own_at):
            at = slice(i * n, (i + 1) * n)
            told.k[frame], told.v[frame], told.at[frame] = k[:, at].detach(), v[:, at].detach(), frame


WRONG = {
    "too few": ("leaving", lambda self, opening, excess: opening.window[: excess - 1], "at least 2 of"),
    "not there": ("leaving", lambda self, opening, excess: [0, 1], "at least 2 of the frames"),
    "twice": ("leaving", lambda self, opening, excess: opening.window[:1] * 2, "at least 2 of the frames"),
    "a shift short": ("shifts", lambda self, opening: [1], "2 numbers"),
    "no number": ("shifts", lambda self, opening: [None, 1], "2 numbers"),
    "NaN": ("weights", lambda self, opening, held: [float("nan")] * len(held), "numbers below"),
    "one position": ("positions", lambda self, opening: [3.0], "one number, or 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_rule_must_not_say_is_refused(name, monkeypatch):
    """Before anything is written."""
    rule, says, expected = WRONG[name]
    cache = make(2, 4, policy=policies.LogBias(rephase=True))
    for number in range(4):
        step(cache, 2, number)
    before = fingerprint(*state_of(cache), cache._buffers.ints)
    monkeypatch.setattr(type(cache._sink), rule, says)
    with pytest.raises(rf.ArgumentError, match=f"{type(cache._sink).__name__}.*{expected}"):
        cache.open(2)
    monkeypatch.undo()
    assert fingerprint(*state_of(cache), cache._buffers.ints) == before and cache.next_frame == 8
    step(cache, 2, 5)


def test_reset_sink_is_refused_where_the_slots_do_not_tell():
    cache = make(3, 4, policy=policies.CyclicSink())
    cache.reset_sink()  # nothing has been rewritten yet
    for number in range(5):
        step(cache, 2, number)
    with pytest.raises(rf.ArgumentError, match="a sink that its slots tell, found CyclicSink"):
        cache.reset_sink()


def test_a_chunk_of_many_noise_levels_is_committed_in_part():
    """Six noisy frames in one query, two of which are finished: the next chunk starts two frames on."""
    cache, told = make(2, 9, policy=rf.StaticSink(rephase=True), grid=(2, 3)), rules.Told(2, 9, grid=(2, 3))
    for number in range(12):
        told.ends = [*told.ends[:-1], 2 * number, 2 * number + 6] if number else [6]
        q, k, v = tensors(cache, 6, number)
        own_at = list(range(told.begin, told.end))
        expected = attention(q, (k, v), rules.static(told), own_at, (2, 3))
        with cache.chunk(6, start=2 * number) as chunk:
            assert relative_l2(chunk.attend(0, q, k, v), expected) < 1e-12
        for i, frame in enumerate(own_at):
            at = slice(6 * i, 6 * (i + 1))
            told.k[frame], told.v[frame], told.at[frame] = k[:, at], v[:, at], frame


def test_a_full_window_begins_anew_with_an_overlap():
    """CausVid: the last frames go through once more, as the first of another stream."""
    cache, fresh = (make(0, 9, policy=rf.NoSink(), dtype=torch.float32) for _ in range(2))
    for number in range(3):
        step(cache, 3, number)
    for number, start in ((7, 0), (8, None), (9, None)):
        with cache.chunk(3, start=start) as chunk:
            found = torch.stack(write(chunk, number))
        assert_equal_bits(found, torch.stack(step(fresh, 3, number)))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("steady", rf.EMASink(0.99, held=(0,))),
        ("steady:held=0/1,alpha=0.5", rf.EMASink(0.5, held=(0, 1))),
        ("ema:0.9", rf.EMASink(0.9)),
        ("static:rephase=false", rf.StaticSink()),
        ("two-rates:long=0.02,adaptive=true", policies.TwoRateMemory(0.02, adaptive=True)),
        ("shots:where=shot,span=21", policies.PinnedShots(where="shot", span=21)),
        ("identity", policies.PlacedSink(at=0.0)),
        ("ahead:ahead=none,at=3", policies.PlacedSink(at=3)),
    ],
)
def test_policies_have_names(text, expected):
    assert policies.parse(text, alpha=0.999) == expected


def test_every_policy_is_on_the_page():
    page = (ROOT / "docs/policies.md").read_text()
    missing = [name for name in NAMES if f"`{name}" not in page]
    used = {type(case.policy) for case in CASES.values()} | {rf.NoSink}
    assert not missing and {cls for cls, _ in NAMES.values()} <= used
