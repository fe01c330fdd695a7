"""Nothing half done: every wrong call is one ``rf_kernels.ArgumentError`` that names op, argument, what was expected and what came,
before anything is written. The ops' calls are in tests/helpers/refusals.py, those of the cache here."""

import copy

import pytest
import torch
from helpers import refusals
from helpers.promise_tools import draw, everything_of, make_cache, step
from helpers.refusals import refused

import rf_kernels as rf
from rf_kernels.testing import fingerprint

ENTRIES = refusals.op_entries()


@pytest.mark.parametrize("function", sorted({entry[0] for entry in ENTRIES}))
def test_the_right_call_passes(function):
    getattr(rf, function)(**getattr(refusals.World(), function))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: "-".join(e[:3]))
def test_wrong_calls_of_ops(entry):
    function, argument, _, edit = entry
    world = refusals.World()
    call = dict(getattr(world, function))
    edit(call)
    tensors = [
        *world.tensors(),
        *(t for t in call.values() if isinstance(t, torch.Tensor) and t.is_cpu and not t.is_sparse),
    ]
    before = fingerprint(*tensors)
    found = refused(lambda: getattr(rf, function)(**call), argument)
    assert found[1] in (function, "dmd_gradient")
    assert fingerprint(*tensors) == before


#: Where naming the argument is not enough: what the text has to say of a call of the catalogue.
TEXTS = [
    ("rope_append", "slots", "beyond the cache", "6 for frame 1"),
    ("rope_append", "slots", "twice the same", "slot 2 for frames 0 and 1"),
    ("rope_append", "slots", "beyond the cache in the second sample", "9 for frame 1"),
    ("rope_append", "slots", "a number that does not divide N", "divides"),
    ("rope_append", "k_cache", "overlaps v_cache", "`v_cache`"),
    ("rope_append", "axes", "without angles", "no axes"),
    ("rope_append", "layout", "'interleaved'", "'adjacent'"),
    ("rope", "norm", "None, with weights", "weight"),
    ("ema_evict", "schedule", "count beyond E", "count of sink frame 0"),
]


@pytest.mark.parametrize("function, argument, what, text", TEXTS, ids=str)
def test_what_the_text_says(function, argument, what, text):
    (edit,) = [e[3] for e in ENTRIES if e[:3] == (function, argument, what)]
    call = dict(getattr(refusals.World(), function))
    edit(call)
    assert text in refused(lambda: getattr(rf, function)(**call))[0]


def test_a_count_above_the_sources_is_refused_wherever_it_would_read():
    """The entry behind the first sample's sources is the second sample's init, which would pass for a source."""
    call = refusals.World().ema_evict
    refusals.plan([[1, 0, 0], [1, 0, 0]], [[0, 2, 2], [1, 0, 0]])(call)
    call["turns"] = call["turns"][:, :2].contiguous()
    assert "count of sink frame 0" in refused(lambda: rf.ema_evict(**call), "schedule")[0]


def test_the_catalogue_is_large_and_has_no_doubles():
    names = [entry[:3] for entry in ENTRIES]
    assert len(set(names)) == len(names) >= 150


def values_of(table):
    return [pytest.param(name, x, id=f"{name}-{x!r}"[:60]) for name, wrong in table.items() for x in wrong]


@pytest.mark.parametrize("name, wrong", values_of(refusals.CONFIGURATIONS))
def test_wrong_configurations(name, wrong):
    refused(lambda: rf.SinkWindowCache(**(refusals.World().cache | {name.split(".")[0]: wrong})), name)


@pytest.mark.parametrize("name, wrong", values_of(refusals.POLICIES))
def test_wrong_policies(name, wrong):
    refused(lambda: rf.EMASink(**{name: wrong}), name)


@pytest.mark.parametrize("name, wrong", values_of(refusals.ROPES))
def test_wrong_ropes(name, wrong):
    refused(lambda: rf.RoPE(**({"pairs": (2, 1, 1), "bases": (1e4,) * 3} | {name: wrong})), name)


@pytest.mark.parametrize("wrong", [0, 7, -2, 2.0, "8", None])
def test_wrong_head_dims_of_wan(wrong):
    refused(lambda: rf.RoPE3D.wan(wrong), "head_dim")


def full_cache(**more):
    """A cache from whose window frames leave, whatever comes next."""
    cache = make_cache("compensated", dtype=torch.bfloat16, undo_frames=2, **more)
    for chunk in range(4):
        step(cache, 2, chunk)
    return cache


def plans_that_are_no_good(cache):
    """(what it is, plan): none of them is the open plan of ``cache``."""
    rolled_back = cache.begin(1)
    cache.rollback(rolled_back)
    other = full_cache()
    committed = other.begin(2)
    for layer in range(2):
        other[layer].append(*draw(other, 2, layer), committed)
    other.commit(committed)
    copied = copy.copy(cache.begin(1))
    cache.reset()
    for chunk in range(4):
        step(cache, 2, chunk)
    return {
        "rolled back": rolled_back,
        "of another cache": other.begin(2),
        "of another cache, committed": committed,
        "from before a reset": copied,
        "None": None,
        "an integer": 3,
        "a dict": {},
    }


@pytest.mark.parametrize("use", ["append", "commit", "rollback"])
@pytest.mark.parametrize("with_open_plan", [False, True])
def test_wrong_plans(use, with_open_plan):
    cache = full_cache()
    plans = plans_that_are_no_good(cache)
    if with_open_plan:
        plans["a copy of the open one"] = copy.copy(cache.begin(1))
    q, k, v = draw(cache, 1, 0)
    calls = {"append": lambda plan: cache[0].append(q, k, v, plan), "commit": cache.commit, "rollback": cache.rollback}
    before = everything_of(cache)
    for name, plan in plans.items():
        refused(lambda plan=plan: calls[use](plan), "plan")
        assert everything_of(cache) == before, name


APPENDS = {
    "q: a token missing": lambda q, k, v: (q[:, 1:], k, v),
    "k: a token missing": lambda q, k, v: (q, k[:, 1:], v),
    "v: a token missing": lambda q, k, v: (q, k, v[:, 1:]),
    "a token missing everywhere": lambda q, k, v: (q[:, 1:], k[:, 1:], v[:, 1:]),
    "k: another head dim": lambda q, k, v: (q, k[..., :8], v),
    "k: another number of heads": lambda q, k, v: (q, k[:, :, :1], v),
    "q: float32": lambda q, k, v: (q.float(), k, v),
    "all float32": lambda q, k, v: (q.float(), k.float(), v.float()),
    "v: float16": lambda q, k, v: (q, k, v.half()),
    "k: int32": lambda q, k, v: (q, k.int(), v),
    "q: on meta": lambda q, k, v: (q.to("meta"), k, v),
    "v: on meta": lambda q, k, v: (q, k, v.to("meta")),
    "q: batch of 2": lambda q, k, v: (q.repeat(2, 1, 1, 1), k, v),
    "q: requires grad": lambda q, k, v: (q.clone().requires_grad_(), k, v),
    "v: requires grad": lambda q, k, v: (q, k, v.clone().requires_grad_()),
    "k: strided": lambda q, k, v: (q, refusals.strided(k), v),
    "v: None": lambda q, k, v: (q, k, None),
    "q: a list": lambda q, k, v: ([1], k, v),
    "k: sparse": lambda q, k, v: (q, k.to_sparse(), v),
}
OPTIONS = {
    "norm": ("none", 1),
    "eps": (-1.0, "x"),
    "k_weight": (torch.ones(3), torch.ones(32).double(), torch.ones(32, device="meta"), 1.0),
    "q_weight": (torch.ones(2, 16), torch.ones(32).requires_grad_()),
}


@pytest.mark.parametrize("first", [True, False], ids=["evicting", "repeated"])
@pytest.mark.parametrize("wrong", APPENDS)
def test_wrong_appends_leave_the_sink_alone(wrong, first):
    """Also when the append of this chunk would fuse leaving frames before it writes."""
    cache = full_cache()
    plan = cache.begin(2)
    inputs = draw(cache, 2, 9)
    if not first:
        cache[1].append(*inputs, plan)
    before = everything_of(cache)
    refused(lambda: cache[1].append(*APPENDS[wrong](*inputs), plan))
    assert everything_of(cache) == before
    cache[1].append(*inputs, plan)
    assert everything_of(cache) != before or not first


@pytest.mark.parametrize("name, wrong", values_of(OPTIONS))
def test_wrong_options_of_an_append(name, wrong):
    cache = full_cache()
    plan = cache.begin(2)
    before = everything_of(cache)
    good = {"q_weight": torch.ones(32), "k_weight": torch.ones(32)}
    refused(lambda: cache[0].append(*draw(cache, 2, 9), plan, **(good | {name: wrong})), name)
    assert everything_of(cache) == before


@pytest.mark.parametrize("where", ["k", "v", "k_state", "k_state_lo", "v_state", "other layer's state"])
def test_inputs_in_the_memory_of_the_cache(where):
    cache = full_cache()
    plan = cache.begin(2)
    q, k, v = draw(cache, 2, 9)
    layer = 1 if where.startswith("other") else 0
    inside = getattr(cache, "k_state" if where.startswith("other") else where)[layer][:, : 2 * cache.frame_tokens]
    before = everything_of(cache)
    refused(lambda: cache[0].append(q, k, inside, plan))
    refused(lambda: cache[0].append(q, inside, v, plan))
    assert everything_of(cache) == before


def test_wrong_chunks():
    cache = full_cache()
    before = everything_of(cache)
    for frames in (0, -1, 5, 2**40, 1.0, True, None, "2", [1]):
        refused(lambda frames=frames: cache.begin(frames), "frames")
    refused(lambda: cache.begin(3, undo=True), "undo")
    assert everything_of(cache) == before
    plan = cache.begin(1)
    before = everything_of(cache)
    for call in (
        lambda: cache.begin(1),
        lambda: cache.begin(1, undo=True),
        cache.state_dict,
        lambda: cache.save("nowhere"),
    ):
        refused(call, "self")
    refused(lambda: cache.commit(plan), "plan")
    cache[1].append(*draw(cache, 1, 0), plan)
    before = everything_of(cache)
    refused(lambda: cache.commit(plan), "plan")
    refused(lambda: cache.rollback(plan), "plan")
    assert everything_of(cache) == before


def states_that_do_not_fit(good):
    """Saved streams with one thing wrong."""
    meta, tensors = good["meta"], good["tensors"]

    def with_meta(**change):
        return {"meta": meta | change, "tensors": tensors}

    def with_tensor(name, x):
        return {"meta": meta, "tensors": tensors | {name: x}}

    yield from (
        None,
        3,
        [],
        {},
        {"meta": meta},
        {"tensors": tensors},
        {"meta": 1, "tensors": tensors},
        {"meta": meta, "tensors": []},
    )
    yield from (with_meta(**{name: "x"}) for name in meta)
    yield from (with_meta(next_frame=x) for x in (-1, 1, 2.0, True, None))
    yield from (with_meta(state_ready=x) for x in (False, 1, None))
    for name, t in tensors.items():
        wrong = [
            t.to("meta"),
            t.to_sparse(),
            t[1:],
            t[None],
            t.int() if t.is_floating_point() else t.double(),
            None,
            t.tolist(),
        ]
        yield from (with_tensor(name, x) for x in wrong)
        yield {"meta": meta, "tensors": {n: x for n, x in tensors.items() if n != name}}
    yield with_tensor("more", torch.zeros(1))


def test_saved_streams_that_do_not_fit():
    cache = full_cache()
    good = cache.state_dict()
    before = everything_of(cache)
    count = 0
    for state in states_that_do_not_fit(good):
        refused(lambda state=state: cache.load_state_dict(state))
        assert everything_of(cache) == before
        count += 1
    assert count >= 60
    own = {"meta": good["meta"], "tensors": good["tensors"] | {"k": cache.k[:, :, : cache.kv_tokens]}}
    refused(lambda: cache.load_state_dict(own), "tensors.k")
    assert everything_of(cache) == before
    cache.load_state_dict(good)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1])
def test_files_that_are_cut_off(tmp_path, length):
    cache = full_cache()
    path = tmp_path / "stream.safetensors"
    cache.save(path)
    path.write_bytes(path.read_bytes()[:length])
    before = everything_of(cache)
    refused(lambda: cache.load(path), "path")
    assert everything_of(cache) == before
