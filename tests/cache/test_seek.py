"""Chunks with a start of their own: what they attend, what they leave behind, and what is refused."""

import random

import pytest
import torch

import rf_kernels as rf
from helpers.cache_case import make, state_of, step, tensors, write
from rf_kernels.reference.streaming import StreamingReference
from rf_kernels.testing import assert_equal_bits, fingerprint, relative_l2

POLICIES = {
    "none": rf.NoSink(),
    "static": rf.StaticSink(rephase=True),
    "static, absolute": rf.StaticSink(),
    "ema": rf.EMASink(0.9),
    "ema, absolute": rf.EMASink(0.9, rephase=False),
}
GEOMETRIES = [{"grid": (2, 3), "heads": 2}, {"grid": (3, 1), "heads": 3, "head_dim": 16, "layers": 2}]
every_policy = pytest.mark.parametrize("name", POLICIES)


def sizes(name, choose=None):
    sink = 0 if name == "none" else 2 if choose is None else choose.randint(1, 4)
    return sink, 4 if choose is None else choose.randint(2, 7)


def seen(cache):
    """What later chunks can read."""
    n = cache.kv_tokens
    return [
        cache.k[:, :, :n],
        cache.v[:, :, :n],
        *(cache._sink.tensors.values() if cache._stream.left else ()),
    ]


def assert_same_stream(a, b):
    assert a._stream == b._stream and a.next_frame == b.next_frame
    for x, y in zip(seen(a), seen(b), strict=True):
        assert_equal_bits(x, y)


def a_start(choose, cache, number):
    if not cache.next_frame:
        return choose.choice([None, 0, 21, 1000])
    oldest = cache._stream.origin + cache._stream.oldest
    anywhere = choose.randint(oldest, cache.next_frame)
    return choose.choice([None, anywhere, oldest]) if number % 5 else oldest + 1 if number % 10 else anywhere


@pytest.mark.parametrize("seed, geometry", list(enumerate(GEOMETRIES)), ids=["2x3", "3x1"])
@every_policy
def test_streams_that_seek_match_the_plain_recomputation(seed, name, geometry):
    """Random starts and lengths, with evictions, in float64. Every chunk is first written and rolled back;
    every third is continued from a saved stream; two streams follow a reset."""
    choose = random.Random(f"{seed} {name}")
    sink_frames, window_frames = sizes(name, choose)
    frames_of = {"sink_frames": sink_frames, "window_frames": window_frames}
    cache = make(
        sink_frames, window_frames, policy=POLICIES[name], undo_frames=sum(frames_of.values()), **geometry
    )
    kind, rephase = name.split(",")[0], POLICIES[name].rephase

    def references():
        return [
            StreamingReference(grid=geometry["grid"], policy=kind, alpha=0.9, rephase=rephase, **frames_of)
            for _ in range(cache.spec.layers)
        ]

    reference, left = references(), 0
    for number in range(35):
        if number in (9, 21):
            cache.reset()
            reference = references()
        start = 0 if number == 32 else a_start(choose, cache, number) if number % 5 in (0, 1) else None
        begin = cache._stream.frames if start is None else start - cache._stream.origin
        begin = 0 if start == 0 or not cache.next_frame else begin
        most = window_frames + max(0, sink_frames - begin)
        frames = choose.randint(1, most) if start is None else 1
        before = fingerprint(*state_of(cache)), cache._stream
        chunk = cache.open(frames, start=start, undo=True)
        write(chunk, 7)
        chunk.rollback()
        assert (fingerprint(*state_of(cache)), cache._stream) == before
        with cache.chunk(frames, start=start) as chunk:
            left += len(chunk.plan.leaving)
            for one in reference:
                one.begin(frames, start)
            for forward in range(2):
                for layer, one in enumerate(reference):
                    q, k, v = tensors(cache, frames, 1000 * number + 10 * forward + layer)
                    assert relative_l2(chunk.attend(layer, q, k, v), one.attend(q, k, v)) < 1e-12
        assert cache.next_frame == reference[0].t_end
        if number % 3 == 0:
            state = cache.state_dict()
            stream = cache._stream
            step(cache, 1, 5)  # in the way
            cache.load_state_dict(state)
            assert cache._stream == stream
    assert left > 0


def go(cache, begin, end, version, start=None):
    """A chunk of the frames [begin, end), whose inputs depend on frame and version alone."""
    layers = range(cache.spec.layers)
    data = [[tensors(cache, 1, 1000 * version + 10 * f + i) for f in range(begin, end)] for i in layers]
    with cache.chunk(end - begin, start=start) as chunk:
        return [chunk.attend(i, *(torch.cat(x, 1) for x in zip(*data[i], strict=True))) for i in layers]


@every_policy
@pytest.mark.parametrize(
    "written, start, end", [(6, 4, 6), (6, 2, 4), (5, 1, 3), (6, 0, 3), (4, 3, 6), (6, 5, 8)]
)
@pytest.mark.parametrize("origin, dtype", [(0, torch.bfloat16), (21, torch.float32)])
def test_a_seek_gives_the_bits_of_the_stream_that_had_those_frames(origin, written, start, end, name, dtype):
    """Where nothing had left: rewriting the end, the middle with frames behind it, the sink, from the start,
    and overlapping a frame; then on, far enough for the sink to absorb what was written."""
    geometry = {"dtype": dtype, "layers": 2, "policy": POLICIES[name]}
    sought, plain = (make(*((0, 6) if name == "none" else (2, 4)), **geometry) for _ in range(2))
    first = origin or None
    written, start, end = (x + origin for x in (written, start, end))
    go(sought, origin, written, 0, start=first)
    if start > origin:
        go(plain, origin, start, 0, start=first)
    ends = [end, end + 2, end + 5, end + 6, end + 10]
    for begin, end in zip([start, *ends], ends, strict=False):
        found = go(sought, begin, end, 1, start=begin)
        expected = go(plain, begin, end, 1, start=begin)
        for a, b in zip(found, expected, strict=True):
            assert_equal_bits(a, b)
    assert_same_stream(sought, plain)


@every_policy
def test_the_same_start_again_is_the_same_chunk(name):
    """While it is open, the chunk itself; after its commit, one of the same bits that absorbs nothing
    twice."""
    cache, twin = (
        make(*sizes(name), policy=POLICIES[name], dtype=torch.bfloat16, layers=2) for _ in range(2)
    )
    for number in range(7):
        start = number * 2
        expected = step(twin, 2, number)
        chunk = cache.open(2, start=start)
        assert cache.open(2, start=start) is chunk
        write(chunk, 99)
        chunk.commit()
        for _ in range(2):
            with cache.chunk(2, start=start) as chunk:
                found = write(chunk, number)
        for a, b in zip(found, expected, strict=True):
            assert_equal_bits(a, b)
        assert_same_stream(cache, twin)


@pytest.mark.parametrize("origin", [21, 20])
@every_policy
def test_a_stream_may_begin_anywhere(origin, name):
    """Its slots and its sink are those of a stream from 0; only the positions lie further."""
    late, early = (make(*sizes(name), policy=POLICIES[name]) for _ in range(2))
    for number in range(6):
        found, expected = (
            step(each, 2, number) if number else go(each, 0, 2, 3, start)
            for each, start in ((late, origin), (early, None))
        )
        assert relative_l2(found[0], expected[0]) < 1e-12
        assert late.next_frame == origin + early.next_frame and late._stream.held == early._stream.held
    n = late.kv_tokens
    assert_equal_bits(late.v[:, :, :n], early.v[:, :, :n])
    assert relative_l2(late.k[:, :, :n], early.k[:, :, :n]) > 0.1


def test_what_cannot_be_done_is_refused_and_changes_nothing():
    cache = make(2, 4, policy=rf.EMASink(0.9), undo_frames=1)
    refused = [(2, -1), (2, 1.0), (2, True), (2, "3"), (2, 2**53)]
    for frames, start in refused:
        with pytest.raises(rf.ArgumentError, match="argument `start`: expected an integer in"):
            cache.open(frames, start=start)
    go(cache, 5, 7, 0, start=5)
    for number in range(5):
        step(cache, 2, number)
    assert cache.next_frame == 17
    before = fingerprint(*state_of(cache)), cache._stream
    cases = [
        (
            18,
            2,
            r"`start`: expected 13..17, or 0 to start over, found 18, and the frames before it were never",
        ),
        (12, 2, r"`start`: .* found 12, and the frames between the sink and 13 have left the window"),
        (
            6,
            1,
            r"`start`: .* found 6, and the sink has absorbed later frames, which cannot be undone .*loaded",
        ),
        (3, 2, r"`start`: .* found 3, before the stream's first frame"),
        (14, 5, r"`frames`: expected at most 4 frames \(chunk starts at frame 14, window of 4\), found 5"),
        (0, 7, r"`frames`: expected at most 6 frames \(chunk starts at frame 0, window of 4\), found 7"),
    ]
    for start, frames, message in cases:
        with pytest.raises(rf.ArgumentError, match=r"SinkWindowCache.open: argument " + message):
            cache.open(frames, start=start)
    with pytest.raises(
        rf.ArgumentError, match="`undo`: expected at most undo_frames = 1 frames, found 1, and 1"
    ):
        cache.open(1, start=15, undo=True)
    with cache.chunk(2, start=15) as chunk:
        for again in ({"frames": 2}, {"frames": 1, "start": 15}, {"frames": 2, "start": 14}):
            with pytest.raises(rf.ArgumentError, match="still open"):
                cache.open(**again)
        with pytest.raises(rf.ArgumentError, match="`undo`: expected that of the open chunk"):
            cache.open(2, start=15, undo=True)
        chunk.rollback()
    assert (fingerprint(*state_of(cache)), cache._stream) == before


def test_a_sink_that_has_absorbed_nothing_may_be_written_again():
    """A static sink, re-phased or not: its frames are what they were."""
    for name in ("static", "static, absolute"):
        sought, plain = (make(2, 3, policy=POLICIES[name], dtype=torch.bfloat16) for _ in range(2))
        go(sought, 0, 2, 0)
        for begin in range(2, 12, 2):
            go(sought, begin, begin + 2, 0)
        go(plain, 0, 1, 0)
        for begin in range(1, 10, 2):
            for a, b in zip(
                go(sought, begin, begin + 2, 1, begin), go(plain, begin, begin + 2, 1), strict=True
            ):
                assert_equal_bits(a, b)
        assert_same_stream(sought, plain)


def test_a_saved_stream_rewrites_what_the_sink_has_absorbed():
    cache, twin = (make(2, 4, policy=rf.EMASink(0.9)) for _ in range(2))
    go(cache, 0, 2, 0)
    saved = cache.state_dict()
    for begin in range(2, 12, 2):
        go(cache, begin, begin + 2, 0)
    cache.load_state_dict(saved)
    for begin in range(1, 13, 2):
        go(cache, begin, begin + 2, 1, start=begin)
    go(twin, 0, 1, 0)
    for begin in range(1, 13, 2):
        go(twin, begin, begin + 2, 1)
    assert_same_stream(cache, twin)


def test_starting_over_leaves_nothing_of_the_old_stream_to_be_read():
    """Also a policy of one's own, and what it counts."""
    cache, fresh = (make(1, 2, policy=rf.EMASink(0.5)) for _ in range(2))
    for number in range(5):
        q, k, v = tensors(cache, 1, number)
        k[0, 0, 0, 0] = torch.nan
        with cache.chunk(1) as chunk:
            chunk.append(0, q, k, v)
    assert int(cache.skipped_tokens) > 0
    for number in range(5):
        start = 0 if number == 0 else None
        for a, b in zip(
            go(cache, number, number + 1, 2, start), go(fresh, number, number + 1, 2), strict=True
        ):
            assert_equal_bits(a, b)
    assert_same_stream(cache, fresh)
    assert int(cache.skipped_tokens) == 0


@pytest.mark.parametrize("start, frames", [(6, 2), (5, 2), (7, 1), (8, 2)])
def test_backward_through_a_chunk_that_seeks(start, frames):
    """Gradients of a rewritten chunk against autograd through the plain recomputation, also once the next
    chunk has begun."""
    cache = make(2, 4, policy=rf.EMASink(0.9))
    reference = StreamingReference(grid=(2, 3), sink_frames=2, window_frames=4, policy="ema", alpha=0.9)
    for begin in range(0, 9, 3):
        q, k, v = tensors(cache, 3, begin)
        with cache.chunk(3) as chunk:
            chunk.attend(0, q, k, v)
        reference.begin(3)
        reference.attend(q, k, v)
    ours, theirs = ([x.requires_grad_() for x in tensors(cache, frames, 40)] for _ in range(2))
    with cache.chunk(frames, start=start) as chunk:
        out = chunk.attend(0, *ours)
    reference.begin(frames, start)
    expected = reference.attend(*theirs)
    assert relative_l2(out, expected) < 1e-12
    step(cache, 1, 60)
    for x in (out, expected):
        x.sin().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert relative_l2(a.grad, b.grad) < 1e-12


@every_policy
def test_kept_frames_move_to_a_prefix(name):
    """Every way in which a full ring can be turned, cut back to every length."""
    sink, window = sizes(name)
    moved = 0
    for turned in range(window):
        for kept in range(window):
            cache = make(sink, window, policy=POLICIES[name], undo_frames=window)
            kind, rephase = name.split(",")[0], POLICIES[name].rephase
            reference = StreamingReference(
                grid=(2, 3), policy=kind, alpha=0.9, rephase=rephase, sink_frames=sink, window_frames=window
            )
            at = sink + window + turned
            plan = [(1, None)] * at + [(1, at - window + kept), (1, None), (min(2, window), None)]
            for number, (frames, start) in enumerate(plan):
                data = tensors(cache, frames, number)
                reference.begin(frames, start)
                with cache.chunk(frames, start=start, undo=True) as chunk:
                    assert relative_l2(chunk.attend(0, *data), reference.attend(*data)) < 1e-12
                    moved += len(chunk.plan.moves)
    assert moved >= window


def test_a_stream_file_with_slots_of_its_own(tmp_path):
    """Saved after a seek; and what no such stream can be is refused."""
    cache, other = (make(2, 4, policy=rf.EMASink(0.9), layers=2) for _ in range(2))
    for number in range(5):
        step(cache, 2, number)
    step_at = [(1, 8), (2, 9), (1, 10), (3, 10)]
    with cache.chunk(1, start=7) as chunk:
        write(chunk, 70)
    good = cache.state_dict()
    cache.save(tmp_path / "stream")
    other.load(tmp_path / "stream")
    assert other._stream == cache._stream and other.next_frame == 8
    for frames, start in step_at:
        with cache.chunk(frames, start=start) as ours, other.chunk(frames, start=start) as theirs:
            for a, b in zip(write(ours, start), write(theirs, start), strict=True):
                assert_equal_bits(a, b)
    assert good["meta"]["version"] == 3
    listed = good["meta"]["stream"]
    before = fingerprint(*state_of(other)), other._stream
    for change in (
        {"held": [*listed["held"][:-1], 99]},
        {"held": [*listed["held"][:-1], listed["held"][-2]]},
        {"held": listed["held"][::-1]},
        {"held": listed["held"][:-1]},
        {"held": None},
        {"held": [0, 1, 2.0, "3", 4, 5]},
        {"frames": 3},
        {"origin": -1},
        {"origin": 1},
        {"left": 1},
        {"offsets": listed["offsets"][:-1]},
        {"offsets": [*listed["offsets"][:-1], "0"]},
        {"offsets": [*listed["offsets"][:-1], float("nan")]},
        {"phase": "x"},
        {"more": 0},
    ):
        state = {"meta": good["meta"] | {"stream": listed | change}, "tensors": good["tensors"]}
        with pytest.raises(rf.ArgumentError, match="load_state_dict: argument `"):
            other.load_state_dict(state)
    for meta in (
        good["meta"] | {"stream": None},
        good["meta"] | {"version": 2},
        {**good["meta"], "version": 4},
    ):
        if meta["version"] != 2:
            with pytest.raises(rf.ArgumentError, match="load_state_dict: argument `meta"):
                other.load_state_dict({"meta": meta, "tensors": good["tensors"]})
    assert (fingerprint(*state_of(other)), other._stream) == before


@pytest.mark.parametrize("seed, geometry", list(enumerate(GEOMETRIES)), ids=["2x3", "3x1"])
@every_policy
def test_positions_of_their_own(seed, geometry, name):
    """An offset per shot, whole and broken, also inside the sink and the window; evictions, a chunk that
    starts further back, a sink taken again, and a saved stream."""
    sink, window = sizes(name)
    cache = make(sink, window, policy=POLICIES[name], **geometry)
    kind, rephase = name.split(",")[0], POLICIES[name].rephase
    reference = [
        StreamingReference(
            grid=geometry["grid"],
            policy=kind,
            alpha=0.9,
            rephase=rephase,
            sink_frames=sink,
            window_frames=window,
        )
        for _ in range(cache.spec.layers)
    ]
    shots = [0, 8, 8, 8, 16.5, 16.5, 16.5, 16.5, -3, -3, -3, 0]
    for number, offset in enumerate(shots):
        start = cache.next_frame - (number == 9)
        frames, position = 1 + (number + seed) % 2, start + offset
        with cache.chunk(frames, start=start, position=position) as chunk:
            assert cache.open(frames, start=start, position=position) is chunk
            for layer, one in enumerate(reference):
                one.begin(frames, start, position)
                data = tensors(cache, frames, 10 * number + layer)
                assert relative_l2(chunk.attend(layer, *data), one.attend(*data)) < 1e-12
        if number == 6:
            cache.load_state_dict(cache.state_dict())
        if number == 7:
            cache.reset_sink()
    with pytest.raises(rf.ArgumentError, match="argument `position`: expected a number"):
        cache.open(1, position="x")
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(rf.ArgumentError, match="argument `position`: expected a number within"):
            cache.open(1, position=wrong)
