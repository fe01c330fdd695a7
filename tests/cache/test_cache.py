"""SinkWindowCache: what is attended and with which positions (against the float64 recomputation of the rule), chunk plans, undo,
saving, refusals, and what the hot path does not do."""

import copy
import pickle
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rf_kernels as rf
from rf_kernels.reference.streaming import StreamingReference
from rf_kernels.testing import assert_equal_bits, fingerprint, relative_l2

HALF = (torch.bfloat16, torch.float16)


def make(
    frames_sink,
    frames_window,
    *,
    policy=None,
    dtype=torch.float64,
    grid=(2, 3),
    heads=2,
    head_dim=32,
    layers=1,
    batch=1,
    **more,
):
    rope = more.pop("rope", rf.RoPE3D.wan(head_dim))
    return rf.SinkWindowCache(
        layers=layers, batch=batch, heads=heads, head_dim=head_dim, grid=grid, sink_frames=frames_sink,
        window_frames=frames_window, sink_policy=policy, rope=rope, dtype=dtype, **more,
    )  # fmt: skip


def tensors(cache, frames, seed, q_heads=None):
    generator = torch.Generator().manual_seed(seed)
    tokens = frames * cache.frame_tokens
    heads = (q_heads or cache.heads, cache.heads, cache.heads)
    return [torch.randn(cache.batch, tokens, h, cache.head_dim, generator=generator).to(cache.dtype) for h in heads]


def step(cache, frames, seed, forwards=2, commit=True):
    """One chunk with several forwards; the attention of each layer in the last forward."""
    plan = cache.begin(frames)
    for forward in range(forwards):
        outputs = []
        for layer in range(len(cache)):
            q, k, v = tensors(cache, frames, seed * 1000 + forward * 100 + layer)
            q = cache[layer].append(q, k, v, plan)
            outputs.append(rf.sink_window_attention(q, cache[layer].k, cache[layer].v, kv_tokens=plan.kv_tokens))
    if commit:
        cache.commit(plan)
    return outputs


def state_of(cache):
    return [cache.k, cache.v, cache.k_state, cache.k_state_lo, cache.v_state, cache.skipped_tokens]


@pytest.mark.parametrize("seed", range(12))
def test_streams_match_the_plain_recomputation(seed):
    """Random S, W, chunk lengths, grids, heads and policies, several forwards a chunk, in float64."""
    choose = random.Random(seed)
    sink_frames, window_frames = choose.randint(0, 4), choose.randint(1, 7)
    policy = choose.choice(["ema", "static"]) if sink_frames else "none"
    alpha = choose.choice([0.5, 0.9, 0.999])
    policies = {"ema": rf.EMASink(alpha), "static": rf.StaticSink(), "none": rf.NoSink()}
    grid, batch, heads = (choose.randint(1, 3), choose.randint(1, 3)), choose.randint(1, 2), choose.randint(1, 3)
    cache = make(sink_frames, window_frames, policy=policies[policy], grid=grid, batch=batch, heads=heads)
    reference = StreamingReference(
        grid=grid, sink_frames=sink_frames, window_frames=window_frames, policy=policy, alpha=alpha
    )
    evicted = 0
    for chunk in range(14):
        room = window_frames + max(0, sink_frames - cache.next_frame)
        frames = choose.randint(1, room)
        plan = cache.begin(frames)
        reference.begin(frames)
        evicted += len(plan.leaving)
        for forward in range(choose.randint(1, 3)):
            q, k, v = tensors(cache, frames, seed * 10_000 + chunk * 10 + forward)
            out = rf.sink_window_attention(
                cache[0].append(q, k, v, plan), cache[0].k, cache[0].v, kv_tokens=plan.kv_tokens
            )
            expected = reference.attend(q, k, v)
            assert relative_l2(out, expected) < 1e-12
        cache.commit(plan)
        assert cache.next_frame == reference.t_end and cache.kv_tokens == plan.kv_tokens
    assert evicted > 0


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("state", ["compensated", "float32", "published"])
def test_half_precision_states(dtype, state):
    """In bf16 and fp16 the sink that attention reads stays within the rounding of the slot (and, but for "published", the state far
    closer) of the float64 recursion over the same stored frames."""
    alpha, chunks = 0.99, 120
    cache = make(2, 4, policy=rf.EMASink(alpha, state=state), dtype=dtype)
    reference = StreamingReference(grid=(2, 3), sink_frames=2, window_frames=4, policy="ema", alpha=alpha)
    for chunk in range(chunks):
        plan = cache.begin(2)
        reference.begin(2)
        q, k, v = tensors(cache, 2, chunk)
        cache[0].append(q, k, v, plan)
        reference.attend(q, k, v)
        cache.commit(plan)
    k, v = cache.sink_state(0)
    n = cache.frame_tokens
    # Values are averaged as stored; the keys' state also carries the rounding of the rotated keys in the cache.
    v_reference = torch.cat([reference.sink_kv[j][1] for j in range(2)], 1)
    eps = torch.finfo(dtype).eps
    error = relative_l2(v, v_reference)
    assert error < (40 * eps if state == "published" else eps / 4), error
    if state != "published":
        assert relative_l2(cache.v[0][:, : 2 * n], v_reference) < eps


def test_wan_shapes_of_a_plan():
    cache = make(3, 6, policy=rf.EMASink(), grid=(30, 52), heads=1, head_dim=128, dtype=torch.bfloat16, device="meta")
    assert cache.k.shape == (1, 1, 9 * 1560, 1, 128)
    ring = cache.ring
    assert [ring.slot(f) for f in range(12)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 3, 4, 5]
    assert list(ring.leaving(9, 12)) == [3, 4, 5] and list(ring.leaving(6, 9)) == []
    assert [ring.absorber(e) for e in (3, 4, 5, 6)] == [0, 1, 2, 0]
    assert ring.shift(9) == 0 and ring.shift(12) == 3
    assert ring.held(12) == [0, 1, 2, 6, 7, 8, 9, 10, 11]


def test_a_plan_whose_sink_was_fused_is_touched(monkeypatch):
    """Even if the append behind it never came."""
    cache = make(1, 2)
    for chunk in range(3):
        step(cache, 1, chunk)
    plan = cache.begin(1)

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("rf_kernels.cache.rope_append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache[0].append(*tensors(cache, 1, 3), plan)
    with pytest.raises(rf.ArgumentError, match="undo=True"):
        cache.rollback(plan)


@pytest.mark.parametrize("sink_frames, window_frames", [(0, 3), (2, 3), (3, 2)])
def test_held_frames_are_those_in_the_slots(sink_frames, window_frames):
    ring, slots = make(sink_frames, window_frames).ring, {}
    for frame in range(12):
        slots[ring.slot(frame)] = frame
        assert sorted(slots) == list(range(len(slots)))  # a prefix
        assert ring.held(frame + 1) == sorted(slots.values())


def test_bytes_are_known_before_they_are_allocated():
    here, planned = (make(3, 6, layers=2, undo_frames=3, dtype=torch.bfloat16, device=d) for d in ("cpu", "meta"))
    assert here.nbytes == planned.nbytes > 0


def test_bytes_are_those_of_every_tensor():
    cache = make(2, 3, policy=rf.EMASink(), layers=2, undo_frames=3, dtype=torch.bfloat16)
    holders = [vars(cache), vars(cache._buffers), cache._undo]
    storages = {t.untyped_storage().data_ptr(): t for h in holders for t in h.values() if isinstance(t, torch.Tensor)}
    del storages[cache._alpha.untyped_storage().data_ptr()]  # of the policy
    assert len(storages) == 16
    assert cache.nbytes == sum(t.untyped_storage().nbytes() for t in storages.values())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("state", ["compensated", "float32", "published"])
def test_keys_without_positions_are_averaged_as_values_are(dtype, state):
    cache = make(2, 3, policy=rf.EMASink(0.99, state=state), dtype=dtype, rope=None)
    for chunk in range(20):
        plan = cache.begin(2)
        q, k, _ = tensors(cache, 2, chunk)
        cache[0].append(q, k, k, plan)
        cache.commit(plan)
    assert_equal_bits(cache.k, cache.v)
    assert_equal_bits(*cache.sink_state(0))


def test_an_inspected_state_is_a_copy():
    cache = make(2, 2, dtype=torch.float32)
    for chunk in range(4):  # before and after the first frame leaves
        step(cache, 1, chunk)
        before = fingerprint(*state_of(cache))
        for t in cache.sink_state(0):
            assert bool(t.any())
            t.zero_()
        assert fingerprint(*state_of(cache)) == before


def test_queries_may_have_more_heads():
    cache = make(1, 3, heads=2)
    plan = cache.begin(2)
    q, k, v = tensors(cache, 2, 0, q_heads=6)
    rotated = cache[0].append(q, k, v, plan)
    assert rotated.shape == q.shape
    assert rf.sink_window_attention(rotated, cache[0].k, cache[0].v, kv_tokens=plan.kv_tokens).shape == q.shape


def test_held_frames_absorb_nothing():
    cache, free = (make(2, 3, policy=rf.EMASink(0.5, held=held)) for held in ((0,), ()))
    for chunk in range(6):
        step(cache, 1, chunk)
        step(free, 1, chunk)
    n = cache.frame_tokens
    held, averaged = cache.sink_state(0)[0], free.sink_state(0)[0]
    assert_equal_bits(held[:, n:], averaged[:, n:])
    first = make(2, 3)
    step(first, 1, 0)
    assert relative_l2(held[:, :n], first.sink_state(0)[0]) < 1e-15
    assert relative_l2(averaged[:, :n], held[:, :n]) > 0.1


def test_absolute_positions_without_rephasing():
    cache = make(2, 3, policy=rf.StaticSink(), rephase=False)
    step(cache, 2, 0)
    before = cache.k[0][:, : 2 * cache.frame_tokens].clone()
    for chunk in range(1, 5):
        step(cache, 3, chunk)
    assert_equal_bits(cache.k[0][:, : 2 * cache.frame_tokens], before)


def test_an_average_without_rephasing_stays_at_its_own_phase():
    """The state is that of a re-phased stream of the same frames; the slots are the state itself."""
    still, moved = (make(2, 3, policy=rf.EMASink(0.5), rephase=rephase) for rephase in (False, True))
    for chunk in range(9):
        for cache in (still, moved):
            plan = cache.begin(1)
            assert plan.shift == (max(0, plan.t_end - 5) if cache is moved else 0)
            cache[0].append(*tensors(cache, 1, chunk), plan)
            cache.commit(plan)
    tokens = 2 * still.frame_tokens
    for ours, theirs in zip(still.sink_state(0), moved.sink_state(0), strict=True):
        assert_equal_bits(ours, theirs)
    assert_equal_bits(still.k[0][:, :tokens], still.sink_state(0)[0])
    assert relative_l2(moved.k[0][:, :tokens], still.k[0][:, :tokens]) > 0.1


@pytest.mark.parametrize("grid", [(2, 3), (3, 2)])
def test_a_stream_of_absolute_positions_is_the_whole_sequence(grid):
    """A static sink that is not re-phased: chunk by chunk through the cache, or all at once with a sink and a window per chunk."""
    cache, frames, chunk = make(3, 4, policy=rf.StaticSink(), rephase=False, grid=grid), 12, 2
    q, k, v = (torch.randn(1, frames * 6, 2, 32, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
    rope, outputs = cache.rope, []
    for begin in range(0, frames, chunk):
        plan, part = cache.begin(chunk), slice(begin * 6, (begin + chunk) * 6)
        rotated = cache[0].append(q[:, part], k[:, part], v[:, part], plan)
        outputs.append(rf.sink_window_attention(rotated, cache[0].k, cache[0].v, kv_tokens=plan.kv_tokens))
        cache.commit(plan)
    angles, axes = rope.table([range(frames), *map(range, grid)], dtype=torch.float64)
    q, k = (rf.rope(x, angles=angles, axes=axes) for x in (q, k))
    ends = list(range(chunk * 6, frames * 6 + 1, chunk * 6))
    whole = rf.sink_window_attention(q, k, v, chunk_ends=ends, num_sink_tokens=3 * 6, num_window_tokens=4 * 6)
    assert relative_l2(torch.cat(outputs, 1), whole) < 1e-14


def test_without_rope_the_sink_is_the_plain_average():
    cache = make(1, 2, policy=rf.EMASink(0.5), rope=None)
    chunks = [tensors(cache, 1, i) for i in range(5)]
    for q, k, v in chunks:
        plan = cache.begin(1)
        assert_equal_bits(cache[0].append(q, k, v, plan), q)
        cache.commit(plan)
    expected = chunks[0][1]
    for i in (1, 2):
        expected = 0.5 * expected + 0.5 * chunks[i][1]
    assert_equal_bits(cache.k[0][:, : cache.frame_tokens], expected)


def test_static_sink_does_not_drift():
    """10,000 chunks: the state's bits never change, and the slot's error is that of one rounding."""
    cache = make(2, 2, policy=rf.StaticSink(), dtype=torch.bfloat16, grid=(1, 2), heads=1)
    reference = make(2, 2, policy=rf.StaticSink(), dtype=torch.float64, grid=(1, 2), heads=1)
    errors = []
    for chunk in range(10_000):
        q, k, v = tensors(cache, 2, chunk if chunk < 3 else 3)
        for each in (cache, reference):
            plan = each.begin(2)
            each[0].append(q.to(each.dtype), k.to(each.dtype), v.to(each.dtype), plan)
            each.commit(plan)
        if chunk == 2:
            state = cache.k_state.clone()
            reference.k_state[0].copy_(cache.k_state[0])  # from here on both turn the same stored keys
        if chunk >= 3 and chunk % 500 == 0:
            errors.append(relative_l2(cache.k[0][:, :4], reference.k[0][:, :4]))
    assert_equal_bits(cache.k_state, state)
    assert max(errors) < torch.finfo(torch.bfloat16).eps / 2


# ---- undo, saving, resetting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype,policy",
    [
        (torch.float64, rf.EMASink(0.9)),
        (torch.bfloat16, rf.EMASink(0.9)),
        (torch.bfloat16, rf.EMASink(0.9, state="float32")),
        (torch.bfloat16, rf.StaticSink()),
    ],
)
def test_rollback_returns_bit_for_bit(dtype, policy):
    cache, twin = (make(2, 4, policy=policy, dtype=dtype, layers=2, undo_frames=3) for _ in range(2))
    for chunk, frames in enumerate((1, 3, 2, 3, 3, 1)):
        before = fingerprint(*state_of(cache))
        plan = cache.begin(frames, undo=True)
        for layer in range(1 + chunk % 2):  # also after an exception in the middle: not every layer was reached
            q, k, v = tensors(cache, frames, 77 + chunk)
            cache[layer].append(q, k, v, plan)
        cache.rollback(plan)
        assert fingerprint(*state_of(cache)) == before
        ours, theirs = step(cache, frames, chunk), step(twin, frames, chunk)
        for a, b in zip(ours, theirs, strict=True):
            assert_equal_bits(a, b)
    assert fingerprint(*state_of(cache)) == fingerprint(*state_of(twin))


def test_an_untouched_plan_needs_no_undo():
    cache = make(1, 3)
    step(cache, 2, 0)
    before = fingerprint(*state_of(cache))
    cache.rollback(cache.begin(2))
    assert fingerprint(*state_of(cache)) == before and cache.next_frame == 2
    step(cache, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("policy", [rf.EMASink(0.9), rf.EMASink(0.9, state="published"), rf.StaticSink()])
@pytest.mark.parametrize("chunks", [1, 2, 6])
def test_a_saved_stream_continues_bit_for_bit(tmp_path, dtype, policy, chunks):
    cache, other = (make(2, 4, policy=policy, dtype=dtype, layers=2) for _ in range(2))
    for chunk in range(chunks):
        step(cache, 2, chunk)
    step(other, 3, 99)  # an old stream is in the way
    cache.save(tmp_path / "stream.safetensors")
    other.load(tmp_path / "stream.safetensors")
    assert other.next_frame == cache.next_frame
    for chunk in range(chunks, chunks + 5):
        for a, b in zip(step(cache, 2, chunk), step(other, 2, chunk), strict=True):
            assert_equal_bits(a, b)


def test_a_stream_of_any_length_is_loaded():
    """Empty, filling, just full, and one frame later."""
    for frames in range(9):
        cache, other = make(2, 4), make(2, 4)
        for chunk in range(frames):
            step(cache, 1, chunk)
        other.load_state_dict(cache.state_dict())
        for chunk in range(frames, frames + 3):
            for a, b in zip(step(cache, 1, chunk), step(other, 1, chunk), strict=True):
                assert_equal_bits(a, b)


def test_a_loaded_stream_does_not_report_again():
    policy = rf.EMASink(0.5, on_nonfinite="raise")
    cache, other = make(1, 2, policy=policy), make(1, 2, policy=policy)
    for chunk in range(4):
        plan = cache.begin(1)
        q, k, v = tensors(cache, 1, chunk)
        v[0, 2, 1, 5] = float("inf") if chunk == 1 else 0.0
        cache[0].append(q, k, v, plan)
        if chunk == 3:
            with pytest.raises(rf.NonFiniteError):
                cache.commit(plan)
        cache.commit(plan)
    other.load_state_dict(cache.state_dict())
    step(other, 1, 4)
    assert other.skipped_tokens.tolist() == [1] and other.next_frame == 5


def test_loading_checks_everything_first(tmp_path):
    cache = make(2, 4)
    for chunk in range(4):
        step(cache, 2, chunk)
    good = cache.state_dict()
    for other in (make(1, 5), make(2, 4, heads=3), make(2, 4, policy=rf.EMASink(0.5)), make(2, 4, policy=rf.StaticSink()),
                  make(2, 4, dtype=torch.float32), make(2, 4, rephase=False), make(2, 4, rope=None)):  # fmt: skip
        before = fingerprint(*state_of(other))
        with pytest.raises(rf.ArgumentError, match="load_state_dict: argument `meta"):
            other.load_state_dict(good)
        assert fingerprint(*state_of(other)) == before
    target = make(2, 4)
    for change in (
        {"next_frame": -1}, {"next_frame": 3}, {"state_ready": False}, {"version": 9}, {"format": "something else"},
    ):  # fmt: skip
        with pytest.raises(rf.ArgumentError):
            target.load_state_dict({"meta": good["meta"] | change, "tensors": good["tensors"]})
    for change in (
        {"k": good["tensors"]["k"][:, :, 1:]},
        {"v": good["tensors"]["v"].float()},
        {"more": torch.zeros(1)},
    ):
        with pytest.raises(rf.ArgumentError, match="tensors"):
            target.load_state_dict({"meta": good["meta"], "tensors": good["tensors"] | change})
    path = tmp_path / "stream.safetensors"
    cache.save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(rf.ArgumentError, match="readable stream file"):
        target.load(path)
    with pytest.raises(FileNotFoundError):
        target.load(tmp_path / "none")
    assert target.next_frame == 0 and not target.k.any()


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_copy_is_a_cache_of_its_own_that_continues_the_stream(copied, dtype):
    cache = make(2, 4, policy=rf.EMASink((0.9, 0.7), held=(1,)), dtype=dtype, layers=2, undo_frames=2)
    fresh = copied(cache)
    for chunk in range(4):
        step(cache, 2, chunk)
    other, view = copied(cache), copy.deepcopy(cache[1])  # a shallow copy of a view is a view of the same cache
    before = fingerprint(*state_of(cache))
    expected = torch.stack(step(copied(cache), 2, 7))
    for continued in (other, view._cache):
        assert_equal_bits(torch.stack(step(continued, 2, 7)), expected)
        assert continued[1].k.data_ptr() == continued.k[1].data_ptr()
    assert fingerprint(*state_of(cache)) == before
    assert_equal_bits(torch.stack(step(cache, 2, 7)), expected)
    assert view.k.data_ptr() == view._cache.k[1].data_ptr() and fresh.next_frame == 0
    plan = cache.begin(2)
    with pytest.raises(rf.ArgumentError, match="expected no open plan"):
        copied(cache)
    cache.rollback(plan)


def test_a_default_device_changes_nothing():
    """Models are built under ``torch.device("meta")``, and with a default device: host tensors must be on the host all the same."""
    inputs = [[tensors(make(2, 4), 2, 10 * chunk + layer) for layer in range(2)] for chunk in range(5)]
    results = []
    for default in ("cpu", "meta"):
        with torch.device(default):
            cache = make(2, 4, policy=rf.EMASink((0.9, 0.7)), layers=2)
            assert make(2, 4, policy=rf.EMASink(0.9), layers=2, device="meta").begin(2).slots.is_meta
            for chunk in inputs:
                plan = cache.begin(2)
                for layer, qkv in zip(cache, chunk, strict=True):
                    q = layer.append(*qkv, plan)
                    results.append(rf.sink_window_attention(q, layer.k, layer.v, kv_tokens=plan.kv_tokens))
                cache.commit(plan)
            cache.load_state_dict(cache.state_dict())
    assert len(results) == 20
    assert_equal_bits(torch.stack(results[:10]), torch.stack(results[10:]))


def test_reset_leaves_nothing_of_the_old_stream():
    cache, fresh = make(2, 3, policy=rf.EMASink(0.5)), make(2, 3, policy=rf.EMASink(0.5))
    for chunk in range(5):
        step(cache, 2, chunk)
    cache.reset()
    assert cache.next_frame == 0 and not any(bool(t.any()) for t in state_of(cache) if t is not None)
    for chunk in range(9):  # four frames leave, so the state is taken anew
        for a, b in zip(step(cache, 1, 50 + chunk), step(fresh, 1, 50 + chunk), strict=True):
            assert_equal_bits(a, b)


# ---- refusals ---------------------------------------------------------------------------------------------------------------


def test_wrong_calls_raise_and_change_nothing():
    cache, other = make(2, 4, layers=2, undo_frames=2), make(2, 4, layers=2)
    for chunk in range(4):
        step(cache, 2, chunk)
    stale = cache.begin(1)
    cache.rollback(stale)
    foreign = other.begin(1)
    before = fingerprint(*state_of(cache))

    def refused(match, call, *args, **kwargs):
        with pytest.raises(rf.ArgumentError, match=match):
            call(*args, **kwargs)
        assert fingerprint(*state_of(cache)) == before

    for frames in (0, -1, 5, 1.0, True, None, "2"):
        refused("begin: argument `frames`", cache.begin, frames)
    refused("begin: argument `undo`", cache.begin, 3, undo=True)
    q, k, v = tensors(cache, 1, 0)
    for plan, match in ((stale, "closed plan"), (foreign, "another cache"), (None, "NoneType"), (3, "int")):
        refused(match, cache[0].append, q, k, v, plan)
        refused(match, cache.commit, plan)
        refused(match, cache.rollback, plan)

    plan = cache.begin(1)
    refused("no open plan", cache.begin, 1)
    refused("no open plan", cache.state_dict)
    refused("an append in every layer", cache.commit, plan)
    # The plan evicts: what the append would refuse must be refused before the sink is touched.
    for bad in (
        (q[:, 1:], k, v), (q, k[:, 1:], v), (q, k, v[..., :8]), (q.float(), k, v), (q, k, v.float()), (q, k[:, :, :1], v),
    ):  # fmt: skip
        refused("rope_append: argument", cache[0].append, *bad, plan)
    refused("requires_grad", cache[0].append, q.clone().requires_grad_(), k, v, plan)
    refused("k_weight", cache[0].append, q, k, v, plan, k_weight=torch.ones(3, dtype=torch.float64))
    refused("norm", cache[0].append, q, k, v, plan, k_weight=torch.ones(64, dtype=torch.float64), norm="none")
    assert not plan.touched
    cache[0].append(q, k, v, plan)
    before = fingerprint(*state_of(cache))
    refused("undo=True", cache.rollback, plan)
    refused(r"none in layers \[1\]", cache.commit, plan)
    cache.reset()
    before = fingerprint(*state_of(cache))
    refused("before a reset or load", cache[0].append, q, k, v, plan)


@pytest.mark.parametrize(
    "change",
    [
        {"sink_frames": -1}, {"window_frames": 0}, {"layers": 0}, {"batch": 0}, {"heads": 0}, {"grid": (0, 2)}, {"grid": (2, 3, 4)},
        {"dtype": torch.int32}, {"sink_policy": rf.NoSink()}, {"rope": rf.RoPE3D.wan(128)}, {"undo_frames": 9},
        {"sink_policy": rf.EMASink(held=(2,))}, {"sink_policy": rf.EMASink([0.9, 0.9, 0.9])}, {"head_dim": 0}, {"layers": 1.5},
        {"rope": rf.RoPE(pairs=(4, 4, 4), bases=(1e4,) * 3, temporal_axis=1)},
    ],
)  # fmt: skip
def test_wrong_configurations_are_refused(change):
    good = {"layers": 1, "batch": 1, "heads": 1, "head_dim": 32, "grid": (2, 3), "sink_frames": 2, "window_frames": 3,
            "rope": rf.RoPE3D.wan(32), "dtype": torch.float32}  # fmt: skip
    rf.SinkWindowCache(**good)
    with pytest.raises(rf.ArgumentError, match="SinkWindowCache: argument"):
        rf.SinkWindowCache(**(good | change))


@pytest.mark.parametrize(
    "bad", [{"alpha": 1.5}, {"alpha": -0.1}, {"alpha": float("nan")}, {"state": "fp8"}, {"on_nonfinite": "ignore"}]
)
def test_wrong_policies_are_refused(bad):
    with pytest.raises(rf.ArgumentError, match="EMASink"):
        rf.EMASink(**bad)


# ---- non-finite frames ------------------------------------------------------------------------------------------------------


def run_with_poison(policy, poison):
    cache = make(1, 2, policy=policy)
    for chunk in range(8):
        plan = cache.begin(1)
        q, k, v = tensors(cache, 1, chunk)
        if chunk == 3 and poison:
            k[0, 2, 1, 5] = float("nan")
        cache[0].append(q, k, v, plan)
        try:
            cache.commit(plan)
        except rf.NonFiniteError as error:
            assert "1 tokens" in str(error) and "[3]" in str(error)
            cache.commit(plan)
    return cache


def test_a_nan_frame_leaves_no_trace_once_it_has_left():
    clean = run_with_poison(rf.EMASink(0.5), False)
    skip = run_with_poison(rf.EMASink(0.5), True)
    spread = run_with_poison(rf.EMASink(0.5, on_nonfinite="propagate"), True)
    assert skip.k.isfinite().all() and skip.skipped_tokens.tolist() == [1] and clean.skipped_tokens.tolist() == [0]
    assert not spread.k.isfinite().all()
    other_tokens = [t for t in range(skip.k.shape[2]) if t != 2]
    assert_equal_bits(skip.k[:, :, other_tokens], clean.k[:, :, other_tokens])
    assert_equal_bits(skip.v[:, :, other_tokens], clean.v[:, :, other_tokens])


def test_raise_mode_names_what_was_not_finite():
    cache = run_with_poison(rf.EMASink(0.5, on_nonfinite="raise"), True)
    assert cache.k.isfinite().all()
    make_again = make(1, 2, policy=rf.EMASink(0.5, on_nonfinite="raise"))
    step(make_again, 1, 0)


def test_a_reset_cache_reports_what_is_not_finite_again():
    cache = make(1, 2, policy=rf.EMASink(0.5, on_nonfinite="raise"))
    for _ in range(2):
        with pytest.raises(rf.NonFiniteError, match="1 tokens of the frames \\[1\\]"):
            for chunk in range(4):
                plan = cache.begin(1)
                q, k, v = tensors(cache, 1, chunk)
                v[0, 2, 1, 5] = float("inf") if chunk == 1 else 0.0
                cache[0].append(q, k, v, plan)
                cache.commit(plan)
        cache.reset()


# ---- what the hot path does not do ------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Counts the calls that a stream must not make: host reads, concatenations, allocations, copies of the cache."""

    FORBIDDEN = ("aten::item", "aten::_local_scalar_dense", "aten::cat", "aten::stack", "aten::clone", "aten::copy_", "aten::roll",
                 "aten::_to_copy", "aten::nonzero", "aten::equal", "aten::is_nonzero", "aten::contiguous")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.calls, self.allocating = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        self.calls[name] = self.calls.get(name, 0) + 1
        if name.startswith(("aten::empty", "aten::zeros", "aten::new_", "aten::full", "aten::ones")):
            self.allocating[name] = self.allocating.get(name, 0) + 1
        return out


def test_a_thousand_chunks_read_nothing_back_and_allocate_nothing():
    cache = make(3, 6, policy=rf.EMASink(), layers=2, grid=(1, 2), heads=1, dtype=torch.bfloat16)
    data = tensors(cache, 3, 0)
    pointers = [t.data_ptr() for t in state_of(cache)] + [cache[0].k.data_ptr()]

    def chunk():
        plan = cache.begin(3)
        for _ in range(2):
            for layer in range(2):
                q = cache[layer].append(*data, plan)
                rf.sink_window_attention(q, cache[layer].k, cache[layer].v, kv_tokens=plan.kv_tokens)
        cache.commit(plan)

    for _ in range(4):
        chunk()
    with Watch() as watch:
        for _ in range(1000):
            chunk()
    assert not [name for name in watch.calls if name in Watch.FORBIDDEN], watch.calls
    assert not watch.allocating, watch.allocating  # outputs of the ops apart, which the dispatcher does not see
    ops = {name: count for name, count in watch.calls.items() if name.startswith("rf_kernels::")}
    assert ops == {
        "rf_kernels::rope_append": 4000,
        "rf_kernels::rope_append_check": 2000,
        "rf_kernels::ema_evict": 2000,
        "rf_kernels::sink_window_attention": 4000,
    }
    assert pointers == [t.data_ptr() for t in state_of(cache)] + [cache[0].k.data_ptr()]
