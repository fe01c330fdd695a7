"""Nothing half done: every wrong call is one ``rf_kernels.ArgumentError`` that names op, argument, what was
expected and what came, before anything is written. The ops' calls are in tests/helpers/refusals.py, those of
the cache here."""

import copy
import time

import pytest
import torch

import rf_kernels as rf
from helpers import refusals
from helpers.promise_tools import draw, everything_of, make_cache, step
from helpers.refusals import refused
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
    """The entry behind the first sample's sources is the second sample's init, which would pass for a
    source."""
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
    world = refusals.World()
    policy = wrong if name.startswith("sink") and name != "sink_frames" else world.sink
    change = {name: wrong} if policy is world.sink else {}
    refused(lambda: rf.SinkWindowCache(rf.CacheSpec(**(world.cache | change)), sink=policy), name)


def test_the_right_configuration_passes():
    world = refusals.World()
    assert rf.SinkWindowCache(rf.CacheSpec(**world.cache), sink=world.sink).nbytes
    refused(lambda: rf.SinkWindowCache(world.cache, sink=world.sink), "spec")
    with pytest.raises(TypeError, match="sink"):
        rf.SinkWindowCache(rf.CacheSpec(**world.cache))


@pytest.mark.parametrize("name, wrong", values_of(refusals.POLICIES))
def test_wrong_policies(name, wrong):
    refused(lambda: rf.EMASink(**{name: wrong}), name)


@pytest.mark.parametrize("name, wrong", values_of(refusals.DMD_OPTIONS))
def test_wrong_options_of_the_gradient(name, wrong):
    refused(lambda: rf.DMDOptions(**{name: wrong}), name)


@pytest.mark.parametrize("name, wrong", values_of(refusals.ROPES))
def test_wrong_ropes(name, wrong):
    refused(lambda: rf.RoPE(**({"pairs": (2, 1, 1), "bases": (1e4,) * 3} | {name: wrong})), name)


@pytest.mark.parametrize("wrong", [0, 7, -2, 2.0, "8", None])
def test_wrong_head_dims_of_wan(wrong):
    refused(lambda: rf.RoPE3D.wan(wrong), "head_dim")


@pytest.mark.parametrize("wrong", [0.0, -1.0, "x", None, 10**400])
def test_wrong_bases_of_wan(wrong):
    found = refused(lambda: rf.RoPE3D.wan(8, base=wrong))
    assert found[2] in ("base", "bases")


def full_cache(**more):
    """A cache from whose window frames leave, whatever comes next."""
    cache = make_cache("compensated", dtype=torch.bfloat16, undo_frames=2, **more)
    for chunk in range(4):
        step(cache, 2, chunk)
    return cache


def ended_chunks():
    """(how it ended, the chunk, the caches that must not change)."""
    cache = full_cache()
    rolled_back = cache.open(1)
    rolled_back.rollback()
    yield "rolled back", rolled_back, cache
    with cache.chunk(2) as committed:
        for layer in range(2):
            committed.append(layer, *draw(cache, 2, layer))
    yield "committed", committed, cache
    voided = cache.open(1)
    cache.reset()
    yield "voided by a reset or load", voided, cache
    with pytest.raises(ZeroDivisionError), cache.chunk(1) as broken:
        broken.append(0, *draw(cache, 1, 0))
        raise ZeroDivisionError
    yield "ended by an exception (ZeroDivisionError)", broken, cache


@pytest.mark.parametrize("use", ["attend", "append", "kv", "commit", "rollback", "mark_written", "__enter__"])
def test_ended_chunks(use):
    for how, chunk, cache in ended_chunks():
        arguments = {"attend": (0, *draw(cache, 1, 0)), "append": (0, *draw(cache, 1, 0)), "kv": (0,)}.get(
            use, ()
        )
        before = everything_of(cache)
        refused(lambda use=use, chunk=chunk, arguments=arguments: getattr(chunk, use)(*arguments), "self")
        assert everything_of(cache) == before
        assert how in repr(chunk) and not chunk.is_open


@pytest.mark.parametrize("layer", [-1, 2, 0.0, "0", None, True])
def test_wrong_layers(layer):
    cache = full_cache()
    chunk = cache.open(1)
    before = everything_of(cache)
    for use in (chunk.attend, chunk.append):
        refused(lambda use=use: use(layer, *draw(cache, 1, 0)), "layer")
    refused(lambda: chunk.kv(layer), "layer")
    refused(lambda: chunk.kv(1), "layer")  # nothing has been written there
    assert everything_of(cache) == before


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
    "k: strided": lambda q, k, v: (q, refusals.strided(k), v),
    "v: None": lambda q, k, v: (q, k, None),
    "q: a list": lambda q, k, v: ([1], k, v),
    "k: sparse": lambda q, k, v: (q, k.to_sparse(), v),
}
OPTIONS = {
    "norm": ("none", 1),
    "eps": (-1.0, "x"),
    "k_weight": (torch.ones(3), torch.ones(32).double(), torch.ones(32, device="meta")),
    "q_weight": (torch.ones(2, 16),),
    "k_norm": (
        1.0,
        torch.nn.LayerNorm(32),
        torch.nn.RMSNorm(32, elementwise_affine=False),
        torch.nn.RMSNorm(32, eps=1e-3),
    ),
}


@pytest.mark.parametrize("first", [True, False], ids=["evicting", "repeated"])
@pytest.mark.parametrize("wrong", APPENDS)
def test_wrong_appends_leave_the_sink_alone(wrong, first):
    """Also when the append of this chunk would fuse leaving frames before it writes."""
    cache = full_cache()
    chunk = cache.open(2)
    inputs = draw(cache, 2, 9)
    if not first:
        chunk.append(1, *inputs)
    before, bad = everything_of(cache), APPENDS[wrong](*inputs)
    refused(lambda: chunk.append(1, *bad))
    refused(lambda: chunk.attend(1, *bad))
    leaf = [
        t.clone().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in bad
    ]
    refused(lambda: chunk.attend(1, *leaf))
    assert everything_of(cache) == before and chunk.written is not first
    chunk.append(1, *inputs)
    assert everything_of(cache) != before or not first


@pytest.mark.parametrize("name", ["q", "k", "v", "q_norm", "k_norm"])
def test_an_append_that_would_drop_a_gradient(name):
    cache = full_cache()
    chunk, before = cache.open(2), everything_of(cache)
    call = dict(zip("qkv", draw(cache, 2, 9), strict=True)) | {
        "q_norm": torch.ones(32),
        "k_norm": torch.ones(32),
    }
    call[name] = call[name].clone().requires_grad_()
    refused(lambda: chunk.append(0, **call), name.replace("norm", "weight"))
    assert everything_of(cache)[0] == before[0] and not chunk.written
    with torch.no_grad():
        chunk.append(0, **call)


@pytest.mark.parametrize(
    "change", [{"softmax_scale": 0.0}, {"softmax_scale": "x"}, {"softmax_scale": float("inf")}, {"q": 3}]
)
@pytest.mark.parametrize("grad", [False, True])
def test_what_the_attention_would_refuse_is_refused_before_the_append(change, grad):
    cache = full_cache()
    chunk, before = cache.open(2), everything_of(cache)
    q, k, v = (t.requires_grad_(grad) for t in draw(cache, 2, 9))
    if "q" in change:
        q, change = q.repeat(1, 1, 2, 1)[:, :, : change["q"]], {}
    refused(lambda: chunk.attend(0, q, k, v, **change), next(iter(change), "q"))
    assert everything_of(cache) == before and not chunk.written


@pytest.mark.parametrize("name, wrong", values_of(OPTIONS))
def test_wrong_options_of_an_append(name, wrong):
    cache = full_cache()
    chunk = cache.open(2)
    before = everything_of(cache)
    good = {"q_norm": torch.nn.RMSNorm(32, eps=1e-6).requires_grad_(False), "k_norm": torch.ones(32)}
    call = good | {name.replace("weight", "norm"): wrong}
    for use in (chunk.append, chunk.attend):
        with torch.no_grad():
            refused(lambda use=use: use(0, *draw(cache, 2, 9), **call), name)
            if name in ("norm", "eps") and wrong != -1.0:  # also where there is nothing to normalise
                refused(lambda use=use: use(0, *draw(cache, 2, 9), **{name: wrong}), name)
    assert everything_of(cache) == before


@pytest.mark.parametrize("where", ["k", "v", "k_state", "k_state_lo", "v_state", "other layer's state"])
def test_inputs_in_the_memory_of_the_cache(where):
    cache = full_cache()
    chunk = cache.open(2)
    q, k, v = draw(cache, 2, 9)
    layer = 1 if where.startswith("other") else 0
    named = {"k": cache.k, "v": cache.v, **cache._sink.tensors}
    inside = named["k_state" if where.startswith("other") else where][layer][:, : 2 * cache.spec.frame_tokens]
    before = everything_of(cache)
    refused(lambda: chunk.append(0, q, k, inside))
    refused(lambda: chunk.attend(0, q, inside, v))
    assert everything_of(cache) == before


def test_wrong_chunks():
    cache = full_cache()
    before = everything_of(cache)
    for frames in (0, -1, 5, 2**40, 1.0, True, None, "2", [1]):
        refused(lambda frames=frames: cache.open(frames), "frames")
    refused(lambda: cache.chunk(3, undo=True), "undo")
    for path in (None, 3, b"x".hex, ["x"]):
        refused(lambda path=path: cache.save(path), "path")
        refused(lambda path=path: cache.load(path), "path")
    assert everything_of(cache) == before
    chunk = cache.open(1)
    before = everything_of(cache)
    for call in (
        lambda: cache.open(1),
        lambda: cache.chunk(1, undo=True),
        cache.state_dict,
        lambda: cache.save("nowhere"),
        lambda: copy.copy(cache),
    ):
        refused(call, "self")
    chunk.append(1, *draw(cache, 1, 0))
    before = everything_of(cache)
    refused(chunk.rollback, "self")
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


# ---- under torch.compile -----------------------------------------------------------------------------------

# One wrong call for each way of finding out: in Python, of the C++ checks while tracing, and of values while
# running.
COMPILED = [
    ("rope", "axes", lambda c: c.update(axes=[0.5])),
    ("rope", "weight", lambda c: c.update(weight=c["weight"][:3])),
    ("rope_append", "v_cache", lambda c: c.update(v_cache=c["v_cache"].half())),
    ("rope_append", "layout", lambda c: c.update(layout="other")),
    ("ema_evict", "k_state_lo", lambda c: c.update(k_state_lo=None)),
    ("sink_window_attention", "kv_tokens", lambda c: c.update(kv_tokens=4.7)),
    ("sink_window_attention", "kv_tokens", lambda c: c.update(kv_tokens=10)),
    ("sink_window_attention", "kv_tokens", lambda c: c.pop("kv_tokens")),
    ("sink_window_attention", "v", lambda c: c.update(v=c["v"][:, :3])),
    ("dmd_gradient", "real", lambda c: c.update(real=c["real"][:, :1])),
    ("dmd_loss", "weight", lambda c: c.update(weight=c["weight"][:1].repeat(5))),
]


@pytest.mark.parametrize("function, argument, edit", COMPILED)
def test_what_tracing_can_find_is_an_argument_error(function, argument, edit):
    world = refusals.World()
    call = getattr(world, function)
    edit(call)
    before = fingerprint(*world.tensors())
    torch._dynamo.reset()
    refused(lambda: torch.compile(lambda c: getattr(rf, function)(**c), backend="aot_eager")(call), argument)
    torch._dynamo.reset()
    whole = torch.compile(lambda c: getattr(rf, function)(**c), backend="aot_eager", fullgraph=True)
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=f"argument `{argument}`"
    ):  # fullgraph: Dynamo's own type, our text
        whole(call)
    assert fingerprint(*world.tensors()) == before


@pytest.mark.parametrize("fullgraph", [False, True])
def test_what_only_the_values_tell_keeps_its_text(fullgraph):
    call = refusals.World().rope_append
    call["slots"] = torch.tensor([1, 99], dtype=torch.int32)
    torch._dynamo.reset()
    with pytest.raises(
        RuntimeError, match=r"rf_kernels\.rope_append: argument `slots`: expected .+, found 99"
    ):
        torch.compile(lambda c: rf.rope_append(**c), backend="aot_eager", fullgraph=fullgraph)(call)


def test_sizes_that_vary_are_checked_at_run_time():
    q = torch.zeros(1, 8, 1, 8)
    torch._dynamo.reset()
    attend = torch.compile(
        lambda n: rf.sink_window_attention(q, q, q, kv_tokens=n), fullgraph=True, backend="aot_eager"
    )
    for n in (3, 4, 5):
        attend(n)
    with pytest.raises(RuntimeError, match=r"argument `kv_tokens`: expected 0 to T = 8, .+ found 9"):
        attend(9)


def test_slots_of_many_frames_are_checked_in_linear_time():
    """100,000 frames: minutes where the check grows with their square."""
    frames = 100_000
    call = {name: torch.zeros(1, frames, 1, 2) for name in ("q", "k", "v", "k_cache", "v_cache")}
    slots = torch.arange(frames, dtype=torch.int32)
    began = time.perf_counter()
    rf.rope_append(**call, slots=slots, norm=None)
    slots[-1] = 5
    refused(lambda: rf.rope_append(**call, slots=slots, norm=None), "slots")
    assert time.perf_counter() - began < 2
