"""A cache whose values are channels of its keys (``value_dims``): the bits of an ordinary cache that is given
a copy of them, and a block of multi-head latent attention (VideoMLA, arXiv 2605.30351) against the multi-head
attention that it absorbs."""

import copy
import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import rf_kernels as rf
from helpers.refusals import refused
from rf_kernels.reference.streaming import rotate, token_positions
from rf_kernels.testing import assert_equal_bits, max_error

TURNED, CHANNELS = 12, 20  # channels that RoPE turns, and the latent's; VideoMLA has 32 and 192
DIM, COLUMNS = TURNED + CHANNELS, slice(TURNED, TURNED + CHANNELS)
HEADS = 4
#: S, W, lengths of the chunks: frames leave in nearly all of them, one and several at once.
GEOMETRIES = {
    "one by one": (2, 4, [2, 2, *[1] * 12]),
    "uneven": (3, 5, [3, 2, 3, 1, 4, 2, 3, 5, 1, 2, 3, 3, 2]),
}
POLICIES = {
    "none": lambda S: (rf.NoSink(), 0),
    "static": lambda S: (rf.StaticSink(), S),
    "static, moving": lambda S: (rf.StaticSink(rephase=True), S),
    "ema": lambda S: (rf.EMASink(0.7), S),
    "ema, float32": lambda S: (rf.EMASink(0.7, state="float32"), S),
    "ema, published": lambda S: (rf.EMASink(0.7, state="published", held=(0,)), S),
}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES)
policies = pytest.mark.parametrize("policy", POLICIES)


def spec_of(geometry, policy, *, latent=True, dtype=torch.float64, **more):
    frames_sink, window, _ = GEOMETRIES[geometry]
    sink, frames_sink = POLICIES[policy](frames_sink)
    settings = {"layers": 1, "batch": 2, "undo_frames": window} | more
    spec = rf.CacheSpec(
        heads=1,
        head_dim=DIM,
        grid=(2, 2),
        sink_frames=frames_sink,
        window_frames=window,
        rope=rf.RoPE3D.wan(TURNED),
        dtype=dtype,
        device="cpu",
        value_dims=(COLUMNS.start, COLUMNS.stop) if latent else None,
        **settings,
    )
    return spec, sink


def cache_of(*args, **more):
    spec, sink = spec_of(*args, **more)
    return rf.SinkWindowCache(spec, sink=sink)


def inputs(spec, frames, seed):
    """Absorbed queries and the latent."""
    g = torch.Generator().manual_seed(seed)
    tokens = frames * spec.frame_tokens
    return [torch.randn(spec.batch, tokens, h, DIM, generator=g).to(spec.dtype) for h in (HEADS, 1)]


def beside(latent):
    """What an ordinary cache is given as values."""
    v = torch.zeros_like(latent)
    v[..., COLUMNS] = latent[..., COLUMNS]
    return v


def both(geometry, policy, dtype, **more):
    return [cache_of(geometry, policy, dtype=dtype, latent=x, **more) for x in (True, False)]


def assert_same(latent, ordinary):
    """Slots, sink and counters."""
    assert_equal_bits(latent.k, ordinary.k)
    assert_equal_bits(latent.v, ordinary.v[..., COLUMNS])
    (k, v), (k_other, v_other) = latent.sink_state(0), ordinary.sink_state(0)
    assert_equal_bits(k, k_other)
    assert_equal_bits(v, v_other[..., COLUMNS])
    assert_equal_bits(latent.skipped_tokens, ordinary.skipped_tokens)


def step(latent, ordinary, frames, seed, **options):
    """A committed chunk of two forwards in both."""
    with latent.chunk(frames, **options) as one, ordinary.chunk(frames, **options) as other:
        for forward in range(2):
            q, k = inputs(latent.spec, frames, 10 * seed + forward)
            out = one.attend(0, q, k)
            assert_equal_bits(out, other.attend(0, q, k, beside(k))[..., COLUMNS].contiguous())
        keys, values, *_ = one.kv(0)
        assert_equal_bits(values, other.kv(0).v[..., COLUMNS])
        assert values.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()
    return out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@policies
@geometries
def test_bits_of_an_ordinary_cache(geometry, policy, dtype):
    latent, ordinary = both(geometry, policy, dtype)
    for number, frames in enumerate(GEOMETRIES[geometry][2]):
        step(latent, ordinary, frames, number)
        assert_same(latent, ordinary)
    assert latent._stream.left


def absorbed(S, W, alpha, raw, begin, end):
    """The sink before a chunk [begin, end) is seen, by the recursion over raw frames."""
    sink = {j: raw[j] for j in range(min(S, end))}
    for e in range(S, end - W if S else 0):
        sink[(e - S) % S] = alpha * sink[(e - S) % S] + (1 - alpha) * raw[e]
    return sink


@pytest.mark.parametrize("policy", ["none", "static, moving", "ema"])
@geometries
def test_a_block_of_latent_attention_is_the_multi_head_attention_that_it_absorbs(geometry, policy):
    """With up-projections, in float64: heads of 10 + 12 channels, keys and values apart, every key rotated at
    its own position in every forward, no slots and no ring."""
    g = torch.Generator().manual_seed(5)
    nope, value_dim = 10, 14
    up_k = torch.randn(CHANNELS, HEADS, nope, generator=g, dtype=torch.float64)
    up_v = torch.randn(CHANNELS, HEADS, value_dim, generator=g, dtype=torch.float64)
    cache = cache_of(geometry, policy)
    spec, scale = cache.spec, (nope + TURNED) ** -0.5
    n, S, W = spec.frame_tokens, spec.sink_frames, spec.window_frames
    alpha = 0.7 if policy == "ema" else 1.0
    raw, end, worst = {}, 0, 0.0
    for frames in GEOMETRIES[geometry][2]:
        begin, end = end, end + frames
        tokens = frames * n
        q_turned = torch.randn(spec.batch, tokens, HEADS, TURNED, generator=g, dtype=torch.float64)
        q_nope = torch.randn(spec.batch, tokens, HEADS, nope, generator=g, dtype=torch.float64)
        latent = torch.randn(spec.batch, tokens, 1, DIM, generator=g, dtype=torch.float64)
        with cache.chunk(frames) as chunk:
            q = torch.cat([q_turned, torch.einsum("bthd,chd->bthc", q_nope, up_k)], -1)
            out = chunk.attend(0, q, latent, softmax_scale=scale)
        found = torch.einsum("bthc,chd->bthd", out, up_v)

        raw |= {begin + i: latent[:, i * n : (i + 1) * n, 0] for i in range(frames)}
        sink = absorbed(S, W, alpha, raw, begin, end)
        shift = max(0, end - S - W)
        seen = [(j + shift, x) for j, x in sink.items()]
        seen += [(f, raw[f]) for f in range(max(S, end - W), end)]
        grid = tuple(spec.grid)
        k_turned = torch.cat(
            [rotate(x[:, :, None, :TURNED], token_positions([at], grid)) for at, x in seen], 1
        ).expand(-1, -1, HEADS, -1)
        c = torch.cat([x[..., COLUMNS] for _, x in seen], 1)
        keys = torch.cat([k_turned, torch.einsum("bmc,chd->bmhd", c, up_k)], -1)
        queries = torch.cat([rotate(q_turned, token_positions(list(range(begin, end)), grid)), q_nope], -1)
        logits = torch.einsum("bthd,bmhd->bhtm", queries, keys) * scale
        values = torch.einsum("bmc,chd->bmhd", c, up_v)
        expected = torch.einsum("bhtm,bmhd->bthd", logits.softmax(-1), values)
        worst = max(worst, max_error(found, expected) / float(expected.abs().max()))
    assert worst < 1e-12


@pytest.mark.parametrize("recomputed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("policy", ["none", "ema"])
def test_gradients(policy, recomputed):
    """The latent's gradient is that of its keys and that of its values; backward after its slots are gone."""
    results = []
    for latent in (True, False):
        cache = cache_of("uneven", policy, latent=latent)
        grads = []
        for number, frames in enumerate([3, 2, 3, 2, 3, 4]):
            q, k = (x.requires_grad_() for x in inputs(cache.spec, frames, number))
            weight = torch.linspace(0.5, 1.5, DIM, dtype=torch.float64).requires_grad_()
            with cache.chunk(frames) as chunk:

                def block(q, k, chunk=chunk, weight=weight, values=() if latent else (beside,)):
                    out = chunk.attend(0, q, k, *(f(k) for f in values), q_norm=weight, norm="head")
                    return out if not values else out[..., COLUMNS]

                out = checkpoint(block, q, k, use_reentrant=False) if recomputed else block(q, k)
            grads.append((out.square().sum(), (q, k, weight)))
        results.append([torch.autograd.grad(loss, leaves) for loss, leaves in grads])
    for ours, theirs in zip(*(itertools.chain(*r) for r in results), strict=True):
        assert max_error(ours, theirs) < 1e-12 * max(1.0, float(theirs.abs().max()))


def test_rows_are_those_of_caches_alone():
    """Rows at different frames, one attention for all of them."""
    spec, sink = spec_of("uneven", "ema", batch=3, dtype=torch.bfloat16)
    rows = rf.SinkWindowRows(spec, sink=sink)
    alone = [cache_of("uneven", "ema", batch=1, dtype=torch.bfloat16) for _ in range(3)]
    for number in range(14):
        taking = [i for i in range(3) if number % (i + 1) == 0]
        with rows.chunk(2, rows=taking) as batch:
            q, k = (x.repeat_interleave(2, 0)[: len(taking)] for x in inputs(spec, 2, number))
            out = batch.attend(0, q, k, deterministic=True)
            assert out.shape[-1] == CHANNELS
            for i, row in enumerate(taking):
                with alone[row].chunk(2) as chunk:
                    assert_equal_bits(out[i : i + 1], chunk.attend(0, q[i : i + 1], k[i : i + 1]))
    for row, cache in enumerate(alone):
        assert_equal_bits(rows.k[:, row], cache.k[:, 0])
    again = copy.deepcopy(rows)
    assert_equal_bits(again.v, rows.v)
    assert rows.nbytes == sum(cache.nbytes for cache in alone)


@pytest.mark.parametrize("policy", ["static, moving", "ema"])
def test_streams_are_saved_copied_rolled_back_and_sought(policy, tmp_path):
    latent, ordinary = both("uneven", policy, torch.bfloat16)
    for number, frames in enumerate([3, 2, 3, 2, 4, 3]):
        step(latent, ordinary, frames, number)
    latent.save(tmp_path / "stream.safetensors")
    assert set(latent.state_dict()["tensors"]) < set(ordinary.state_dict()["tensors"])
    other = cache_of("uneven", policy, dtype=torch.bfloat16)
    other.load(tmp_path / "stream.safetensors")
    assert_same(other, ordinary)
    assert_same(copy.deepcopy(latent), ordinary)

    before = [t.clone() for t in (latent.k, *latent._sink.tensors.values())]
    with pytest.raises(ZeroDivisionError), latent.chunk(4, undo=True) as chunk:
        chunk.attend(0, *inputs(latent.spec, 4, 99))
        assert not torch.equal(latent.k, before[0])
        raise ZeroDivisionError
    for now, then in zip((latent.k, *latent._sink.tensors.values()), before, strict=True):
        assert_equal_bits(now, then)
    step(other, copy.deepcopy(ordinary), 2, 51)
    step(latent, ordinary, 2, 50, start=latent.next_frame - 1)
    assert_same(latent, ordinary)
    for cache in (latent, ordinary):
        cache.k[:, :, :3] = 0.5
        if cache is ordinary:
            cache.v[..., COLUMNS][:, :, :3] = 0.5
        cache.reset_sink()
    step(latent, ordinary, 3, 52)
    assert_same(latent, ordinary)
    latent.reset()
    assert not latent.k.any() and not latent.v.any()


def test_memory_of_the_caller():
    spec, sink = spec_of("uneven", "ema", layers=2)
    tokens = spec.ring.length * spec.frame_tokens
    memory = [torch.full((2, tokens, 1, DIM + 3), float("nan"), dtype=torch.float64) for _ in range(2)]
    cache = rf.SinkWindowCache(spec, sink=sink, k=[m[..., :DIM] for m in memory])
    own = rf.SinkWindowCache(spec, sink=sink)
    for c in (cache, own):
        c.reset()
        for number, frames in enumerate([3, 2, 3, 2, 4, 3]):
            with c.chunk(frames) as chunk:
                for layer in range(2):
                    chunk.attend(layer, *inputs(spec, frames, number))
    for layer in range(2):
        assert_equal_bits(memory[layer][..., :DIM], own.k[layer])
        assert_equal_bits(cache.v[layer], own.v[layer])
        assert bool(memory[layer][..., DIM:].isnan().all())


def test_bytes():
    """No slots and no state for values."""
    for policy, states in (("none", 0), ("ema", 1), ("ema, float32", 2)):
        sizes = []
        for latent in (True, False):
            spec, sink = spec_of("uneven", policy, latent=latent, dtype=torch.bfloat16, undo_frames=0)
            sizes.append(rf.SinkWindowCache(spec, sink=sink).nbytes)
        slot = 2 * spec.frame_tokens * spec.batch * DIM
        assert sizes[1] - sizes[0] == slot * (spec.ring.length + states * spec.sink_frames)


def test_compiled():
    latent, ordinary = both("uneven", "ema", torch.float32)

    def block(chunk, layer, q, k):
        return chunk.attend(layer, q * 2, k).sum(-1)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for number in range(6):
        q, k = inputs(latent.spec, 3, number)
        with torch.no_grad(), latent.chunk(3) as one, ordinary.chunk(3) as other:
            found = compiled(one, 0, q, k)
            out = other.attend(0, q * 2, k, beside(k))[..., COLUMNS].contiguous()
            assert_equal_bits(found, out.sum(-1))


def test_append_for_attention_of_ones_own():
    latent, ordinary = both("uneven", "ema", torch.float64)
    for number in range(5):
        q, k = inputs(latent.spec, 3, number)
        with latent.chunk(3) as one, ordinary.chunk(3) as other:
            assert_equal_bits(one.append(0, q, k), other.append(0, q, k, beside(k)))
        assert_same(latent, ordinary)


@pytest.mark.parametrize(
    "wrong", [(0, 4), (12, 33), (20, 20), (20, 12), (12,), (12, True), 12, (12.0, 32), "ab"]
)
def test_value_dims_that_do_not_fit(wrong):
    spec, _ = spec_of("uneven", "ema")
    fields = {name: getattr(spec, name) for name in ("layers", "batch", "heads", "head_dim", "grid", "rope")}
    fields |= {"sink_frames": 1, "window_frames": 3, "dtype": spec.dtype, "device": "cpu"}
    refused(lambda: rf.CacheSpec(**fields, value_dims=wrong), "value_dims")
    assert rf.CacheSpec(**fields | {"rope": None}, value_dims=(0, 4)).value_dim == 4


@pytest.mark.parametrize("latent", [True, False])
@pytest.mark.parametrize("use", ["attend", "append", "rows", "compiled"])
def test_values_where_they_are_none_of_their_own_and_none_where_they_are(use, latent):
    spec, sink = spec_of("uneven", "ema", latent=latent)
    q, k = inputs(spec, 3, 0)
    arguments = (0, q, k, beside(k)) if latent else (0, q, k)
    cache = rf.SinkWindowRows(spec, sink=sink) if use == "rows" else rf.SinkWindowCache(spec, sink=sink)
    chunk = cache.chunk(3)
    if use == "compiled":
        call = torch.compile(lambda *x: chunk.attend(*x), backend="eager")
    else:
        call = chunk.append if use == "append" else chunk.attend
    refused(lambda: call(*arguments), "v")
    assert not cache.k.any()
    chunk.rollback()


def test_what_does_not_serve_a_latent_refuses():
    class Rewrites(rf.SinkState):
        def evict(self, layer, k, v, plan):
            v[:] = 0

    class Policy(rf.SinkPolicy):
        def bind(self, spec):
            return Rewrites(self, spec)

    spec, sink = spec_of("uneven", "ema")
    refused(lambda: rf.SinkWindowCache(spec, sink=Policy()), "sink")
    refused(lambda: Policy().bind(spec), "sink")
    slots = spec.zeros(spec.ring.length * spec.frame_tokens)
    refused(lambda: rf.SinkWindowCache(spec, sink=sink, k=slots, v=slots.clone()), "v")
    refused(lambda: rf.SinkWindowCache(spec, sink=sink, v=slots), "k")
    ordinary = cache_of("uneven", "ema", latent=False)
    state = rf.SinkWindowCache(spec, sink=sink).state_dict()
    refused(lambda: ordinary.load_state_dict(state), "meta.value_dims")
    refused(
        lambda: rf.SinkWindowCache(spec, sink=sink).load_state_dict(ordinary.state_dict()), "meta.value_dims"
    )
