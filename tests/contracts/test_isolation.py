"""Streams never meet: many caches in one process, interleaved at every step, with exceptions in the middle of
a chunk, resets and reuse. Each stream's values are a tag of its own, so that any other number is a leak; and
every bit is that of the stream alone."""

import random
import threading

import pytest
import torch

import rf_kernels as rf
from helpers.promise_tools import POLICIES, make_cache, seen_of, tensors_of
from rf_kernels.testing import fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")


class ModelFailed(Exception):
    """What a model may raise between two layers."""


def tagged(cache, frames, seed, tag):
    """Random q and k; every value is the tag."""
    g = torch.Generator().manual_seed(seed)
    spec = cache.spec
    size = (spec.batch, frames * spec.frame_tokens, spec.heads, spec.head_dim)
    q, k = (torch.randn(size, generator=g).to(spec.dtype) for _ in range(2))
    return q, k, torch.full(size, tag, dtype=spec.dtype)


def tolerance(dtype):
    """Means of equal numbers: the weights of the softmax sum to 1 within some roundings, and an average with
    alpha = 0.9 holds up to 1 / (1 - 0.9) of them. Neighbouring tags are a quarter apart."""
    return 12 * torch.finfo(dtype).eps


def forward(chunk, seed, tag, fail_after=None):
    """All layers once, giving way before each; raises after layer ``fail_after``."""
    cache = chunk.cache
    for layer in range(cache.spec.layers):
        yield None
        q, k, v = tagged(cache, chunk.frames, seed + layer, tag)
        q = chunk.append(layer, q, k, v)
        k, v, tokens, _ = chunk.kv(layer)
        out, lse = rf.sink_window_attention(q, k, v, kv_tokens=tokens, return_lse=True)
        worst = float((out.double() / tag - 1).abs().max())
        assert worst <= tolerance(cache.spec.dtype), (
            f"stream {tag}: a value a factor {worst} away from its tag"
        )
        yield fingerprint(out, lse)
        if layer == fail_after:
            raise ModelFailed


def session(number, events):
    """One user: chunks, failures, resets. Yields None where another user may come in between, and
    fingerprints of all results."""
    choose = random.Random(number)
    policy = choose.choice(sorted(POLICIES))
    dtype = choose.choice([torch.float32, torch.bfloat16, torch.float16])
    cache = make_cache(policy, dtype=dtype, window_frames=choose.randint(3, 5), undo_frames=3)
    tag = float(torch.tensor(0.02 * 1.25**number).to(dtype))
    for event in range(events):
        yield None
        kind = choose.choice(["chunk"] * 5 + ["rollback", "retry", "refused", "reset", "abandon"])
        frames, seed = choose.randint(1, 3), 1000 * number + 10 * event
        if kind == "reset":
            cache.reset()
            assert not any(bool(t.any()) for t in (cache.k, cache.v, *cache._sink.tensors.values()))
            tag = -tag
            continue
        chunk = cache.open(frames, undo=kind == "rollback")
        if kind in ("rollback", "retry", "abandon"):
            before = fingerprint(*seen_of(cache))
            try:
                yield from forward(chunk, seed, tag, fail_after=choose.randint(0, cache.spec.layers - 1))
            except ModelFailed:
                pass
            if kind == "rollback":
                chunk.rollback()
                assert fingerprint(*seen_of(cache)) == before
                continue
            if kind == "abandon":  # the user goes; the next one takes the cache over
                cache.reset()
                tag = -tag
                continue
        if kind == "refused":
            q, k, v = tagged(cache, frames, seed, tag)
            with pytest.raises(rf.ArgumentError):
                chunk.append(cache.spec.layers - 1, q, k.double(), v)
        for i in range(2):
            yield from forward(chunk, seed + i, tag)
        chunk.commit()
        spec = cache.spec
        window = cache.v[:, :, min(spec.sink_frames * spec.frame_tokens, cache.kv_tokens) : cache.kv_tokens]
        assert bool((window == tag).all())
        if cache.kv_tokens:
            fused = cache.sink_state(0)[1].double()
            assert bool(((fused / tag - 1).abs() <= tolerance(dtype)).all())
        yield fingerprint(*tensors_of(cache))


def alone(number, events):
    return [x for x in session(number, events) if x is not None]


def check_interleaved(numbers, events, seed):
    expected = {n: alone(n, events) for n in numbers}
    running = {n: session(n, events) for n in numbers}
    found = {n: [] for n in numbers}
    choose = random.Random(seed)
    while running:
        number = choose.choice(list(running))
        try:
            result = next(running[number])
        except StopIteration:
            del running[number]
        else:
            if result is not None:
                found[number].append(result)
    assert found == expected


def test_64_interleaved_streams():
    check_interleaved(range(64), events=4, seed=0)


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(2))
def test_64_long_interleaved_streams(seed):
    check_interleaved(range(64), events=30, seed=seed)


@pytest.mark.heavy
def test_streams_on_threads_of_their_own():
    numbers = range(16)
    expected = {n: alone(n, 12) for n in numbers}
    found = {}

    def work(number):
        found[number] = alone(number, 12)

    threads = [threading.Thread(target=work, args=(n,)) for n in numbers]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == expected


def test_a_number_of_another_stream_is_noticed():
    """The check itself: one value of a neighbour in a valid slot."""
    cache = make_cache("static", layers=1)
    with cache.chunk(1) as chunk:
        list(forward(chunk, 0, 70.0))
    cache.v[0, 0, 0] = 70.0 * 1.25
    with pytest.raises(AssertionError, match="away from its tag"), cache.chunk(1) as chunk:
        list(forward(chunk, 1, 70.0))
