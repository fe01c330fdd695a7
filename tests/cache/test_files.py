"""Streams saved, loaded, copied, sent to another process, and reset."""

import copy
import multiprocessing
import pickle

import pytest
import torch

import rf_kernels as rf
from helpers.cache_case import make, state_of, step, tensors
from rf_kernels.testing import assert_equal_bits, fingerprint

POLICIES = [rf.EMASink(0.9), rf.EMASink(0.9, state="published"), rf.StaticSink(rephase=True), rf.StaticSink()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{type(p).__name__}-{p.rephase}")
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


@pytest.mark.parametrize("where", [".", "nowhere/stream.safetensors"])
def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path, where):
    with pytest.raises(OSError, match="rf_kernels.SinkWindowCache.save: "):
        make(2, 4).save(tmp_path / where)


def test_loading_checks_everything_first(tmp_path):
    cache = make(2, 4)
    for chunk in range(4):
        step(cache, 2, chunk)
    good = cache.state_dict()
    for other in (
        make(1, 5),
        make(2, 4, heads=3),
        make(2, 4, policy=rf.EMASink(0.5)),
        make(2, 4, policy=rf.StaticSink()),
        make(2, 4, dtype=torch.float32),
        make(2, 4, policy=rf.EMASink(rephase=False)),
        make(2, 4, rope=None),
    ):
        before = fingerprint(*state_of(other))
        with pytest.raises(rf.ArgumentError, match="load_state_dict: argument `meta"):
            other.load_state_dict(good)
        assert fingerprint(*state_of(other)) == before
    target = make(2, 4)
    for change in ({"next_frame": -1}, {"next_frame": 3}, {"version": 9}, {"format": "something else"}):
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


def test_a_path_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (None, 3, ["x"]):
        with pytest.raises(rf.ArgumentError, match="save: argument `path`"):
            make(2, 4).save(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_copy_is_a_cache_of_its_own_that_continues_the_stream(copied, dtype):
    cache = make(2, 4, policy=rf.EMASink((0.9, 0.7), held=(1,)), dtype=dtype, layers=2, undo_frames=2)
    fresh = copied(cache)
    for chunk in range(4):
        step(cache, 2, chunk)
    other, before = copied(cache), fingerprint(*state_of(cache))
    expected = torch.stack(step(copied(cache), 2, 7))
    assert_equal_bits(torch.stack(step(other, 2, 7)), expected)
    assert other.spec == cache.spec and other.sink == cache.sink and fresh.next_frame == 0
    assert fingerprint(*state_of(cache)) == before
    assert_equal_bits(torch.stack(step(cache, 2, 7)), expected)
    chunk = cache.open(2)
    with pytest.raises(rf.ArgumentError, match="expected no open chunk"):
        copied(cache)
    chunk.rollback()


def continued(cache, results):
    results.put([out.numpy() for out in step(cache, 2, 7)])


@pytest.mark.parametrize("chunks", [0, 3])
def test_a_cache_is_an_argument_of_a_spawned_process(chunks):
    cache = make(1, 3, policy=rf.EMASink(0.9), layers=2)
    for chunk in range(chunks):
        step(cache, 2, chunk)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=continued, args=(cache, results))
    process.start()
    found = results.get(timeout=120)
    process.join(timeout=120)
    assert process.exitcode == 0
    for ours, theirs in zip(step(cache, 2, 7), found, strict=True):
        assert_equal_bits(torch.from_numpy(theirs), ours)


def test_a_default_device_changes_nothing():
    """Models are built under ``torch.device("meta")``, and with a default device: host tensors must be on the
    host all the same."""
    inputs = [[tensors(make(2, 4), 2, 10 * chunk + layer) for layer in range(2)] for chunk in range(5)]
    results = []
    for default in ("cpu", "meta"):
        with torch.device(default):
            cache = make(2, 4, policy=rf.EMASink((0.9, 0.7)), layers=2)
            assert make(2, 4, policy=rf.EMASink(0.9), layers=2, device="meta").open(2).plan.slots.is_meta
            for data in inputs:
                with cache.chunk(2) as chunk:
                    results += [chunk.attend(layer, *qkv) for layer, qkv in enumerate(data)]
            cache.load_state_dict(cache.state_dict())
    assert len(results) == 20
    assert_equal_bits(torch.stack(results[:10]), torch.stack(results[10:]))


def test_reset_leaves_nothing_of_the_old_stream():
    cache, fresh = make(2, 3, policy=rf.EMASink(0.5)), make(2, 3, policy=rf.EMASink(0.5))
    for chunk in range(5):
        step(cache, 2, chunk)
    cache.reset()
    assert cache.next_frame == 0 and not any(bool(t.any()) for t in state_of(cache))
    for chunk in range(9):  # four frames leave, so the state is taken anew
        for a, b in zip(step(cache, 1, 50 + chunk), step(fresh, 1, 50 + chunk), strict=True):
            assert_equal_bits(a, b)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{type(p).__name__}-{p.rephase}")
def test_a_cache_born_in_inference_mode_goes_on_outside_of_it(policy):
    """Chunks, gradients, a rollback, reset and load."""
    with torch.inference_mode():
        born = make(2, 3, policy=policy, layers=2, undo_frames=2)
        for chunk in range(4):
            step(born, 2, chunk)
        state = born.state_dict()
    plain = make(2, 3, policy=policy, layers=2, undo_frames=2)
    for _ in range(2):
        born.load_state_dict(state)
        plain.load_state_dict(state)
        outs = []
        for cache in (born, plain):
            chunk = cache.open(2, undo=True)
            chunk.attend(0, *tensors(cache, 2, 5))
            chunk.rollback()
            with cache.chunk(2) as chunk:
                data = [x.requires_grad_() for x in tensors(cache, 2, 9)]
                outs.append(chunk.attend(0, *data))
                chunk.attend(1, *data).sum().backward()
        assert_equal_bits(outs[0].detach(), outs[1].detach())
        born.reset()
        assert not any(bool(t.any()) for t in state_of(born))
