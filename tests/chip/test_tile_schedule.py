"""The schedule: every unit of work exactly once, on any number of CTAs, for the shapes of streaming
models."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

SMS = (1, 2, 7, 16, 78, 108, 114, 131, 132, 144, 160)
# (heads, tokens of a latent frame): Wan2.1 1.3B and 14B at 480p and 720p, heads sharded over 1, 2, 4 and 8
# GPUs.
HEADS = (12, 6, 3, 40, 20, 10, 5)
FRAME_TOKENS = (1560, 3600)
CHUNK_FRAMES = (3, 1)
CACHE_FRAMES = range(6, 22)


def check(plan, ctas, deterministic=False):
    """Coverage, ownership and what the absence of deadlock rests on. Returns the units that each range
    does."""
    segments, units = plan["segments"], plan["units"]
    ranges, tile, first, count, complete = segments.T
    assert plan["ranges"] <= ctas
    assert (count > 0).all() and (first >= 0).all() and (first + count <= units[tile]).all()
    # Every unit exactly once: the fragments of a tile lie end to end.
    order = np.lexsort((first, tile))
    t, f, c = tile[order], first[order], count[order]
    same = t[1:] == t[:-1]
    assert (f[1:][same] == (f + c)[:-1][same]).all()
    starts = np.r_[True, ~same]
    assert (f[starts] == 0).all() and np.array_equal(t[starts], np.arange(len(units)))
    assert np.array_equal((f + c)[np.r_[~same, True]], units)
    assert np.array_equal(complete.astype(bool), first + count == units[tile])
    # The fragments of a tile belong to ascending ranges, one each: the owner waits for higher ranges only.
    r = ranges[order]
    assert (r[1:][same] > r[:-1][same]).all()
    # In each range a fragment owed to another comes before any tile that is left incomplete, and there is one
    # of each at most.
    for mask in (first > 0, (first == 0) & ~complete.astype(bool)):
        assert np.unique(ranges[mask]).size == mask.sum()
    position = np.arange(len(segments))
    owed = np.full(plan["ranges"], -1)
    owed[ranges[first > 0]] = position[first > 0]
    waits = (first == 0) & (complete == 0)
    assert (position[waits] > owed[ranges[waits]]).all()
    if deterministic:
        assert complete.all() and (first == 0).all()
    return np.bincount(ranges, weights=count, minlength=plan["ranges"])


def shapes(sms):
    return itertools.product(HEADS, FRAME_TOKENS, CHUNK_FRAMES, CACHE_FRAMES, sms)


def check_streaming(chip, head_dim, heads, frame, chunk, cache, sms):
    plan = chip.schedule(
        head_dim=head_dim, batch_heads=heads, q_tokens=chunk * frame, kv_tokens=cache * frame, ctas=sms
    )
    work = check(plan, sms)
    first, count, complete = plan["segments"].T[2:]
    # Two units at least in a fragment: less costs more in merging than it balances.
    assert (count[(first > 0) | (complete == 0)] >= 2).all()
    assert np.bincount(plan["segments"][:, 1]).max() <= 9  # an owner merges one after the other
    total, longest = plan["units"].sum(), work.max()
    # Level to the units that snapping moves and the one that is not worth a cut, or not cut where a nearly
    # full last wave leaves 5 % at most.
    assert longest <= -(-total // plan["ranges"]) + 3 or total >= 0.95 * longest * plan["ranges"]


@pytest.mark.parametrize("head_dim", [128, 64])
def test_streaming_shapes(chip, head_dim):
    for shape in itertools.product((12, 3, 40, 5), FRAME_TOKENS, CHUNK_FRAMES, (6, 9, 21), SMS):
        check_streaming(chip, head_dim, *shape)


@pytest.mark.heavy
def test_streaming_shapes_on_1_to_160_sms(chip):
    for shape in shapes(range(1, 161)):
        check_streaming(chip, 128, *shape)


@pytest.mark.parametrize("sms", SMS)
def test_small_and_odd(chip, sms):
    for heads, q, kv in itertools.product((1, 3), (1, 127, 128, 129, 1000), (1, 176, 177, 1409)):
        check(chip.schedule(head_dim=128, batch_heads=heads, q_tokens=q, kv_tokens=kv, ctas=sms), sms)


def whole_sequence(chip, frames, chunk, sink, window, heads, sms, frame=1560, **options):
    ends = [min(e, frames) * frame for e in range(chunk, frames + chunk, chunk)]
    tokens = frames * frame
    return chip.schedule(
        head_dim=128,
        batch_heads=heads,
        q_tokens=tokens,
        kv_tokens=tokens,
        chunk_ends=ends,
        num_sink_tokens=sink * frame,
        num_window_tokens=window * frame,
        ctas=sms,
        **options,
    )


@pytest.mark.parametrize("sms", SMS)
def test_whole_sequences(chip, sms):
    """Tiles of unequal cost: the costly ones come first, and what is cut levels the ranges."""
    for frames, chunk, sink, window, heads in (
        (21, 3, 3, 6, 12),
        (21, 1, 1, 5, 3),
        (20, 3, 0, 9, 5),
        (7, 2, 3, 0, 1),
        (21, 3, 3, 60, 2),
    ):
        plan = whole_sequence(chip, frames, chunk, sink, window, heads, sms)
        work = check(plan, sms)
        assert (np.diff(plan["units"]) <= 0).all()
        assert (
            work.max() <= -(-plan["units"].sum() // plan["ranges"]) + 2
            or plan["units"].sum() >= 0.95 * work.max() * plan["ranges"]
        )


@pytest.mark.parametrize("sms", SMS)
def test_deterministic_schedules_cut_nothing(chip, sms):
    check(
        chip.schedule(
            head_dim=128, batch_heads=12, q_tokens=4680, kv_tokens=14040, ctas=sms, deterministic=True
        ),
        sms,
        True,
    )
    check(whole_sequence(chip, 21, 3, 3, 6, 12, sms, deterministic=True), sms, True)


def test_query_tiles_cover_every_row_once_and_stay_in_their_chunk(chip):
    ends = [1, 130, 131, 390, 700]
    window = dict(num_sink_tokens=65, num_window_tokens=257)
    plan = chip.schedule(
        head_dim=128, batch_heads=3, q_tokens=700, kv_tokens=700, chunk_ends=ends, ctas=4, **window
    )
    seen = np.zeros((3, 700), int)
    for chunk, head, row, row_end in plan["place"]:
        assert row_end == ends[chunk] and row >= ([0, *ends])[chunk]
        seen[head, row : min(row + plan["tile_m"], row_end)] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("tile_n", [176, 128])
def test_visited_keys(chip, tile_n):
    """Every fragmentation of a range visits exactly the keys that the mask of the op lets through, each
    once."""
    for end, sink, window in (
        (1000, 0, 1000),
        (1, 0, 1),
        (900, 300, 400),
        (900, 500, 400),
        (200, 300, 50),
        (900, 177, 0),
        (1409, 1, 176),
        (880, 176, 352),
    ):
        allowed = np.zeros(end + 2 * tile_n, int)
        allowed[: min(sink, end)] = 1
        allowed[max(min(sink, end), end - window) : end] = 1
        for begin, stop in chip.key_intervals(end, sink, window):  # the rule that the other backends use
            assert allowed[begin:stop].all()
        assert sum(stop - begin for begin, stop in chip.key_intervals(end, sink, window)) == allowed.sum()
        whole = chip.visited_keys(end, sink, window, tile_n, 0, 1 << 20)
        for pieces in ([len(whole)], [1] * len(whole), [2] * (len(whole) // 2) + [len(whole) % 2]):
            seen, first = np.zeros_like(allowed), 0
            for count in pieces:
                visited = chip.visited_keys(end, sink, window, tile_n, first, count)
                assert len(visited) == count
                for row, valid in visited:
                    assert 0 < valid <= tile_n
                    seen[row : row + valid] += 1
                first += count
            assert np.array_equal(seen, allowed), (end, sink, window, pieces)


@pytest.mark.parametrize("tile_n", [176, 128])
def test_no_more_key_tiles_than_the_keys_need(chip, tile_n):
    """A sink that touches its window is one interval with it: two would have two tiles that are not full."""
    for end, sink, window, intervals in (
        (1000, 600, 400, 1),
        (1000, 600, 399, 2),
        (1000, 600, 401, 1),
        (1000, 1200, 7, 1),
        (1000, 0, 300, 1),
        (1000, 300, 0, 1),
    ):
        keys = chip.key_intervals(end, sink, window)
        assert len(keys) == intervals
        units = sum(-(-(stop - begin) // tile_n) for begin, stop in keys)
        assert len(chip.visited_keys(end, sink, window, tile_n, 0, 1 << 20)) == units


def test_speedups_of_the_schedule(chip):
    """The idealised gain over one tile per CTA on an H100's 132 SMs, at the three shapes that the design is
    for."""
    for q_tokens, heads, at_least in ((4680, 12, 1.18), (1560, 12, 1.65), (4680, 3, 1.17)):
        plan = chip.schedule(head_dim=128, batch_heads=heads, q_tokens=q_tokens, kv_tokens=14040, ctas=132)
        tiles, units = len(plan["units"]), int(plan["units"][0])
        one_tile_per_cta = -(-tiles // 132) * units
        assert one_tile_per_cta / check(plan, 132).max() >= at_least


# ---- the cache of schedules --------------------------------------------------------------------------------


def asked(cache, shape):
    heads, queries, keys, chunk_ends, ctas, deterministic = shape
    return cache.get(heads, queries, keys, list(chunk_ends), ctas, deterministic)


SHAPES = [
    (heads, 390, keys, ends, ctas, deterministic)
    for heads in (1, 12)
    for keys, ends in ((390, ()), (390, (130, 260, 390)), (390, (130, 390)), (780, ()))
    for ctas in (7, 132)
    for deterministic in (False, True)
]


def test_a_schedule_is_planned_once_for_each_shape_and_machine(chip):
    """Every argument tells shapes apart, and each gets what the planner gives."""
    cache = chip.ScheduleCache()
    first, again = ([asked(cache, s) for s in SHAPES] for _ in range(2))
    assert first == again and all(right for _, right in first)
    assert len({place for place, _ in first}) == len(SHAPES) == len(cache)


def test_the_cache_of_schedules_is_bounded_and_safe_among_threads(chip):
    cache, most = chip.ScheduleCache(), chip.ScheduleCache.max_entries
    shapes = [(1 + i % 400, 390, 390, (), 132, False) for i in range(4000)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda s: (asked(cache, s)[1], len(cache)), shapes))
    assert all(right and size <= most for right, size in answers)
    assert 0 < len(cache) <= most < 400
