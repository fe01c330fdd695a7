"""The body of ema_evict's CUDA kernel (csrc/ema_evict/kernel.h), run lane by lane on the host: the code that
launch.cu compiles for the GPU, bit for bit against the CPU backend. What only a GPU can show is not shown
here."""

import pytest
import torch

import rf_kernels as rf
from benchmarks import traffic
from helpers import host_lanes
from helpers.ema_evict_case import LAYOUTS, STATES, Case, equal
from helpers.host_lanes import DTYPES, Guarded, integers, pointers
from rf_kernels.ops.ema_evict import STATES as STATE_NUMBERS
from rf_kernels.testing import assert_equal_bits

COMBINATIONS = [(dtype, state) for dtype in DTYPES[:2] for state in STATES]
COMBINATIONS += [(dtype, "published") for dtype in DTYPES[2:]]
all_precisions = pytest.mark.parametrize(
    "dtype, state", COMBINATIONS, ids=[f"{str(d).removeprefix('torch.')}-{s}" for d, s in COMBINATIONS]
)
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="session")
def lanes(tmp_path_factory):
    return host_lanes.build("ema_evict_lanes", tmp_path_factory.mktemp("lanes"))


def run_lanes(lanes, case, *, threads=64, reverse=False, gap=0, offset=0, **changes):
    """A call on guarded copies: what it wrote (with the counter last), and the elements per access."""
    options = {"on_nonfinite": "skip", **case.options, **changes}
    caches = [t if t is None else Guarded(t, gap=gap, offset=offset) for t in (case.k, case.v)]
    states = [None if t is None else Guarded(t) for t in (case.k_state, case.k_lo, case.v_state)]
    written = [g and g.view for g in (*caches, *states)]
    k, v = written[0], written[0] if case.v is None else written[1]
    schedule, turns, skipped = options["schedule"], options["turns"], case.skipped.clone()
    alpha = torch.as_tensor(options["alpha"], dtype=torch.float64)
    n, pairs = options["frame_tokens"], turns.shape[-2]
    state = options["state"] if k.element_size() == 2 else "published"
    sizes = [DTYPES.index(k.dtype), STATE_NUMBERS[state], k.shape[0], k.shape[1] // n, schedule.shape[-2], n]
    sizes += [
        k.shape[2],
        k.shape[3],
        schedule.shape[-1] - 2,
        pairs,
        *(options["temporal"] if pairs else (0, 1, 2)),
    ]
    sizes += [*k.stride()[:3], *v.stride()[:3], schedule.stride(0) if schedule.ndim == 3 else 0]
    sizes += [turns.stride(0) if turns.ndim == 5 else 0, alpha.stride(0) if alpha.ndim else 0]
    sizes += [alpha.stride(1) if alpha.ndim == 2 else 0, options["on_nonfinite"] == "skip"]
    inputs = (schedule, turns, alpha, skipped)
    there = list(written)
    if case.v is None:  # as op.cpp hands keys alone over
        there[1], there[4] = there[0], there[2] if state == "float32" else there[3]
    width = lanes(integers(sizes), pointers([*there, *inputs]), threads, int(reverse))
    assert width > 0, "some lanes of a row came to a vote and others did not"
    for guarded in (*caches, *states):
        if guarded is not None:
            guarded.check()
    return [*(None if t is None else t.contiguous() for t in written), skipped], width


# a schedule of each of two samples
SEVERAL = [[[0, 3, 3, 6, 4], [1, 2, 5, 7, 0]], [[1, 0, 0, 0, 0], [0, 1, 4, 0, 0]]]


@all_precisions
@pytest.mark.parametrize("layout", LAYOUTS)
def test_body(lanes, layout, dtype, state):
    """Several sources, none, init, a plan per sample; 3 heads in units that 7 lanes share unevenly and 64
    leave idle."""
    case = Case(dtype, state, rope=LAYOUTS[layout], schedule=SEVERAL, window=6, n=3, seed=len(layout))
    expected = case.run()
    assert any(
        not torch.equal(a, b) for a, b in zip(case.tensors, expected[:5], strict=True) if a is not None
    )
    for threads, reverse in ((64, False), (7, True)):
        found, _ = run_lanes(lanes, case, threads=threads, reverse=reverse)
        equal(found, expected)


@all_precisions
@pytest.mark.parametrize("schedule", [SEVERAL, [[[0, 1, 3], [1, 1, 6]], [[0, 0, 0], [0, 1, 4]]]], ids=len)
@pytest.mark.parametrize("layout", ["adjacent", "half"])
def test_keys_alone(lanes, layout, schedule, dtype, state):
    """The bits that keys have beside values, of which nothing is written: in rows of any kind, and in those
    that are held (at most one source, pairs inside of a vector)."""
    case = Case(dtype, state, rope=LAYOUTS[layout], schedule=schedule, window=6, n=7)
    expected = case.run(on_nonfinite="propagate")
    case.v = case.v_state = None
    for threads, reverse in ((64, False), (5, True)):
        found, width = run_lanes(lanes, case, threads=threads, reverse=reverse, on_nonfinite="propagate")
        held = threads == 64 and layout == "adjacent" and len(schedule[0][0]) == 3
        assert width == (2 if held else 1) * 16 // dtype.itemsize
        equal([found[0], *found[2:4]], [expected[0], *expected[2:4]])
    case.k[0, 6 * 7 + 2, 1, 3] = NAN  # of one token: counted once
    assert int(run_lanes(lanes, case)[0][5]) == 1 == int(case.run()[5])
    equal(run_lanes(lanes, case)[0], case.run())


WIDTHS = {
    "wide": (dict(head_dim=16), dict(), True),
    "padded heads": (dict(head_dim=16), dict(gap=8), True),
    "odd head dim": (dict(head_dim=17, rope=rf.RoPE3D.wan(16)), dict(), False),
    "odd stride": (dict(head_dim=16), dict(gap=1), False),
    "shifted by one element": (dict(head_dim=16), dict(offset=1), False),
    "temporal pairs in the middle of a vector": (dict(rope=LAYOUTS["axis_half"]), dict(), False),
}


@all_precisions
@pytest.mark.parametrize("name", WIDTHS)
def test_access_width(lanes, name, dtype, state):
    """16 bytes where the layout, every address and every stride allow it, else elements; the same bits,
    guards whole."""
    options, memory, wide = WIDTHS[name]
    case = Case(dtype, state, **options)
    found, width = run_lanes(lanes, case, threads=5, **memory)
    assert width == (16 // dtype.itemsize if wide else 1)
    equal(found, case.run())


@all_precisions
def test_any_number_of_lanes_in_any_order(lanes, dtype, state):
    """No lane reads what another writes."""
    case = Case(dtype, state, rope=LAYOUTS["half"], batch=1, n=2, heads=5)
    expected = case.run()
    for threads, reverse in ((1, False), (2, True), (3, False), (32, True), (192, False)):
        equal(run_lanes(lanes, case, threads=threads, reverse=reverse)[0], expected)


@all_precisions
def test_nonfinite_tokens_are_skipped_by_all_lanes_and_counted_once(lanes, dtype, state):
    """One element of one lane decides for the row, K and V: the first, the last, NaN and both infinities."""
    n, heads, dim = 5, 3, 16
    for place, value in (((0, 0), NAN), ((heads - 1, dim - 1), INF), ((1, 7), -INF)):
        case = Case(dtype, state, schedule=SEVERAL, window=6, n=n, heads=heads, head_dim=dim)
        case.k[0, 3 * n + 1][place] = value  # source 3 of sample 0: the first of three
        case.k[0, 6 * n + 1][place] = value  # source 6: a second token of the same row
        case.v[0, 4 * n + 4][place] = value  # source 4: the last of three
        # K and V of one token: skipped once
        case.v[0, 5 * n + 2][place] = case.k[0, 5 * n + 2][place] = value
        case.v[1, 5 * n][place] = value  # no source in sample 1
        for threads, reverse in ((64, False), (7, True)):
            found, _ = run_lanes(lanes, case, threads=threads, reverse=reverse)
            assert found[-1].item() == 4
            equal(found, case.run())


@all_precisions
def test_nonfinite_elements_propagate(lanes, dtype, state):
    case = Case(dtype, state)
    case.k[0, 15, 1, 3], case.v[1, 17, 2, 15] = NAN, INF
    found, _ = run_lanes(lanes, case, threads=7, on_nonfinite="propagate")
    expected = case.run(on_nonfinite="propagate")
    assert expected[-1].item() == 0 and not expected[0][:, :10].isfinite().all()
    for a, b in zip(found, expected, strict=True):
        if a is not None:  # which NaN comes of two operands is the processor's choice
            assert torch.equal(a.isnan(), b.isnan())
            assert_equal_bits(
                a.masked_fill(a.isnan(), 0) if a.is_floating_point() else a, b.masked_fill(b.isnan(), 0)
            )


@all_precisions
def test_more_sources_than_a_group(lanes, dtype, state):
    """Sources 33 and on go in a second launch, which begins from the state that the first has stored."""
    case = Case(
        dtype,
        state,
        schedule=[[1, 40, *range(2, 42)], [0, 2, 42, 43, *[0] * 38]],
        window=42,
        n=2,
        batch=1,
        heads=1,
    )
    case.k[0, 2 * 35, 0, 5] = case.v[0, 2 * 36 + 1, 0, 0] = NAN
    found, _ = run_lanes(lanes, case, threads=3)
    assert found[-1].item() == 2
    equal(found, case.run())


@all_precisions
def test_alpha_per_frame_and_token(lanes, dtype, state):
    case = Case(dtype, state)
    for shape in ((2,), (2, 5)):
        alpha = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        equal(run_lanes(lanes, case, alpha=alpha)[0], case.run(alpha=alpha))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_state_without_temporal_pairs(lanes, dtype):
    """The key slot is then the state, as for values."""
    case = Case(dtype, "published", rope=LAYOUTS["none"])
    case.k_state = None
    equal(run_lanes(lanes, case, threads=7)[0], case.run())


def test_plans_that_nobody_has_checked(lanes):
    """On a GPU the schedule's values are not looked at: a source outside of the window is left out, a count
    is limited."""
    case = Case(torch.float32, "published", schedule=[[0, 9, 3, 1, 4], [0, -2, 5, 6, 2]])
    sane = Case(torch.float32, "published", schedule=[[0, 2, 3, 4, 0], [0, 0, 0, 0, 0]])
    turns = case.options["turns"].clone()
    turns[0, 1] = turns[0, 2]  # source 4 is the second of the sane plan
    found, _ = run_lanes(lanes, case, threads=7)
    equal(found, sane.run(turns=turns))
    case.options["schedule"][0, 3] = 7  # beyond the cache's 7 frame slots
    equal(run_lanes(lanes, case)[0], found)


@all_precisions
@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 0, 0], [3, 0, 2]], ids=str)
def test_bytes_moved_are_those_predicted(lanes, counts, dtype, state):
    """Every source and state element once, whatever the number of lanes; of a value slot that gets nothing,
    none."""
    slots = iter(range(3, 9))
    schedule = [
        [0, count, *(next(slots) for _ in range(count)), *[0] * (max(counts) - count)] for count in counts
    ]
    case = Case(dtype, state, schedule=schedule, n=2, window=6)
    shape = dict(batch=2, frame_tokens=2, heads=3, head_dim=16, dtype=dtype, state=state)
    for threads, memory in ((7, dict()), (64, dict(gap=1))):  # 16-byte accesses, elements
        lanes.moved_bytes()
        found, _ = run_lanes(lanes, case, threads=threads, on_nonfinite="propagate", **memory)
        assert lanes.moved_bytes() == traffic.ema_evict(**shape, counts=counts)["rows"]
        equal(found, case.run())


ONE_SOURCE = {
    "one each": [[0, 1, 3], [1, 1, 5]],
    "one and none": [[1, 0, 0], [0, 1, 4]],
    "none": [[0, 0, 0], [1, 0, 0]],
}


@all_precisions
@pytest.mark.parametrize("name", ONE_SOURCE)
@pytest.mark.parametrize("layout", ["adjacent", "adjacent_tail", "none", "all_adjacent"])
def test_rows_in_registers(lanes, layout, name, dtype, state):
    """One source a sink frame, pairs inside of a vector: several tokens a block. Here a block that is full,
    and one with a single token; alpha differs from token to token."""
    rope = LAYOUTS.get(layout) or rf.RoPE((8,), (1e4,), "adjacent")
    case = Case(dtype, state, rope=rope, schedule=ONE_SOURCE[name], heads=6, n=7)
    case.options["alpha"] = torch.rand(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    case.k[0, 3 * 7 + 1, 2, 7] = NAN  # source 3: skipped where it is one
    case.v[0, 3 * 7 + 6, 5, 15] = INF
    for on_nonfinite in ("skip", "propagate"):
        expected = case.run(on_nonfinite=on_nonfinite)
        lanes.moved_bytes()
        found, width = run_lanes(lanes, case, threads=0, on_nonfinite=on_nonfinite, reverse=name == "none")
        assert width == 2 * 16 // dtype.itemsize
        if on_nonfinite == "skip":
            equal(found, expected)
        else:  # which NaN comes of two operands is the processor's choice
            for a, b in zip(found, expected, strict=True):
                if a is not None:
                    assert_equal_bits(*(x.nan_to_num() if x.is_floating_point() else x for x in (a, b)))


@pytest.mark.parametrize("threads", [0, 7], ids=["held", "not held"])
def test_a_held_row_reads_nothing_twice(lanes, threads):
    """With the check for non-finite tokens: bytes as predicted, which a row that is not held exceeds."""
    case = Case(torch.bfloat16, "compensated", schedule=[[0, 1, 3], [0, 1, 4]], n=2, heads=16)  # no idle lane
    lanes.moved_bytes()
    run_lanes(lanes, case, threads=threads)
    shape = dict(batch=2, frame_tokens=2, heads=16, head_dim=16, dtype=torch.bfloat16, state="compensated")
    predicted = traffic.ema_evict(**shape, counts=[1, 1])["rows"]
    assert (lanes.moved_bytes() == predicted) == (threads == 0)
