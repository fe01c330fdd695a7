"""The life of a chunk: how it ends, what that leaves behind, and what the hot path does not do."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rf_kernels as rf
from helpers.cache_case import make, state_of, step, tensors, write
from rf_kernels.testing import assert_equal_bits, fingerprint

POLICIES = [
    (torch.float64, rf.EMASink(0.9)),
    (torch.bfloat16, rf.EMASink(0.9)),
    (torch.bfloat16, rf.EMASink(0.9, state="float32")),
    (torch.bfloat16, rf.StaticSink(rephase=True)),
    (torch.bfloat16, rf.StaticSink()),
]


class Failed(Exception):
    pass


def streamed(chunks=4, **more):
    cache = make(2, 4, policy=rf.EMASink(0.9), layers=2, **more)
    for number in range(chunks):
        step(cache, 2, number)
    return cache


# ---- how a chunk ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, policy", POLICIES)
@pytest.mark.parametrize("by", ["exception", "rollback", "failed commit"])
def test_a_chunk_with_undo_is_taken_back_bit_for_bit(dtype, policy, by):
    cache, twin = (make(2, 4, policy=policy, dtype=dtype, layers=2, undo_frames=3) for _ in range(2))
    for number, frames in enumerate((1, 3, 2, 3, 3, 1)):
        before = fingerprint(*state_of(cache))
        # also in the middle: not every layer was reached
        reached = 1 + number % 2 if by != "failed commit" else 1
        chunk = cache.open(frames, undo=True)
        for layer in range(reached):
            chunk.attend(layer, *tensors(cache, frames, 77 + number))
        if by == "rollback":
            chunk.rollback()
        elif by == "failed commit":
            with pytest.raises(rf.ArgumentError, match=r"every layer written, found nothing in layers \[1\]"):
                chunk.commit()
        else:
            with pytest.raises(Failed), chunk:
                raise Failed
        assert fingerprint(*state_of(cache)) == before and not chunk.is_open
        for a, b in zip(step(cache, frames, number), step(twin, frames, number), strict=True):
            assert_equal_bits(a, b)
    assert fingerprint(*state_of(cache)) == fingerprint(*state_of(twin))


def test_an_untouched_chunk_is_as_if_it_had_never_been_opened():
    cache = streamed()
    before = fingerprint(*state_of(cache))
    with pytest.raises(Failed), cache.chunk(2):
        raise Failed
    with pytest.raises(rf.ArgumentError, match="rope_append"), cache.chunk(2) as chunk:
        chunk.attend(0, *(t[:, 1:] for t in tensors(cache, 2, 0)))
    with pytest.raises(rf.ArgumentError, match=r"nothing in layers \[0, 1\]"), cache.chunk(2):
        pass
    cache.open(2).rollback()
    assert fingerprint(*state_of(cache)) == before and cache.next_frame == 8
    step(cache, 1, 1)


@pytest.mark.parametrize("error", [Failed, KeyboardInterrupt, GeneratorExit])
def test_a_written_chunk_without_undo_closes_the_stream_until_reset(error):
    cache = streamed()
    with pytest.raises(error), cache.chunk(2) as chunk:
        chunk.attend(0, *tensors(cache, 2, 0))
        raise error
    uses = {
        "open": lambda: cache.open(1),
        "chunk": lambda: cache.chunk(1),
        "state_dict": cache.state_dict,
        "save": lambda: cache.save("nowhere"),
        "sink_state": lambda: cache.sink_state(0),
    }
    for use in uses.values():
        with pytest.raises(
            rf.StreamClosedError, match=rf"closed by an exception \({error.__name__}\) in the frames 8..10"
        ):
            use()
    with pytest.raises(rf.ArgumentError, match="ended by an exception"):
        chunk.attend(1, *tensors(cache, 2, 0))
    other = streamed()
    cache.load_state_dict(other.state_dict())  # a stream loaded is a stream again
    for a, b in zip(step(cache, 2, 9), step(other, 2, 9), strict=True):
        assert_equal_bits(a, b)
    cache.reset()
    step(cache, 2, 0)


def test_a_chunk_may_be_ended_inside_its_block():
    cache = streamed(undo_frames=2)
    before = fingerprint(*state_of(cache))
    with cache.chunk(2, undo=True) as chunk:
        write(chunk, 0)
        chunk.rollback()
    assert fingerprint(*state_of(cache)) == before and cache.next_frame == 8
    with cache.chunk(2) as chunk:
        write(chunk, 0)
        chunk.commit()
    with cache.chunk(2) as chunk:
        write(chunk, 0)
        cache.reset()
    assert cache.next_frame == 0 and not any(bool(t.any()) for t in state_of(cache))


@pytest.mark.parametrize("where", ["eviction", "append"])
def test_an_interrupted_op_counts_as_written(monkeypatch, where):
    """Whatever it was about to write: nobody knows how far it came."""
    cache = streamed()

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    name = {"eviction": "rf_kernels.cache.sinks.ema_evict", "append": "rf_kernels.cache.chunk.rope_append"}[
        where
    ]
    chunk = cache.open(2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(name, interrupted)
        chunk.attend(0, *tensors(cache, 2, 3))
    assert chunk.written
    with pytest.raises(rf.ArgumentError, match="undo=True"):
        chunk.rollback()
    if where == "eviction":
        with pytest.raises(rf.ArgumentError, match="eviction was not interrupted"):
            chunk.attend(0, *tensors(cache, 2, 3))
    chunk.mark_written()


def test_every_forward_of_a_chunk_has_the_same_plan():
    """However many forwards: the sink is fused once, and the last forward's keys and values stay."""
    many, once = streamed(), streamed()
    for number in range(4, 8):
        with many.chunk(2) as several, once.chunk(2) as single:
            write(several, number, forwards=5)
            for layer in range(2):
                single.attend(layer, *tensors(once, 2, number * 1000 + 400 + layer))
    assert fingerprint(*state_of(many)) == fingerprint(*state_of(once))


# ---- bytes and the hot path --------------------------------------------------------------------------------


def test_bytes_are_known_before_they_are_allocated():
    here, planned = (
        make(3, 6, layers=2, undo_frames=3, dtype=torch.bfloat16, device=d) for d in ("cpu", "meta")
    )
    assert here.nbytes == planned.nbytes > 0


def test_bytes_are_those_of_every_tensor():
    cache = make(2, 3, policy=rf.EMASink(), layers=2, undo_frames=3, dtype=torch.bfloat16)
    holders = [vars(cache), vars(cache._buffers), cache._undo, cache._sink.tensors]
    storages = {
        t.untyped_storage().data_ptr(): t for h in holders for t in h.values() if isinstance(t, torch.Tensor)
    }
    assert len(storages) == 16
    assert cache.nbytes == sum(t.untyped_storage().nbytes() for t in storages.values())


class Watch(TorchDispatchMode):
    """Counts the calls that a stream must not make: host reads, concatenations, allocations, copies of the
    cache."""

    FORBIDDEN = (
        "aten::item",
        "aten::_local_scalar_dense",
        "aten::cat",
        "aten::stack",
        "aten::clone",
        "aten::copy_",
        "aten::roll",
        "aten::_to_copy",
        "aten::nonzero",
        "aten::equal",
        "aten::is_nonzero",
        "aten::contiguous",
    )

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

    def addresses():
        plan = cache._buffers.views(3)
        return [
            t.data_ptr() for t in (*state_of(cache), *cache._slots[0], plan[0], plan[1], plan[3], plan[4])
        ]

    def stream(chunks):
        for _ in range(chunks):
            with cache.chunk(3) as chunk:
                for _ in range(2):
                    for layer in range(2):
                        chunk.attend(layer, *data)
        return addresses()

    before = stream(4)
    with Watch() as watch:
        assert stream(1000) == before
    assert not [name for name in watch.calls if name in Watch.FORBIDDEN], watch.calls
    # outputs of the ops apart, which the dispatcher does not see
    assert not watch.allocating, watch.allocating
    ops = {name: count for name, count in watch.calls.items() if name.startswith("rf_kernels::")}
    assert ops == {
        "rf_kernels::rope_append": 4000,
        "rf_kernels::rope_append_check": 2000,
        "rf_kernels::ema_evict": 2000,
        "rf_kernels::sink_window_attention": 4000,
    }


@pytest.mark.parametrize("evicts", [False, True])
@pytest.mark.parametrize("under_grad", [False, True])
def test_an_input_that_does_not_fit_is_named_itself(under_grad, evicts):
    """And not the cache or the chunk, which the op sees as arguments of its own."""
    cache = make(2, 4, policy=rf.EMASink(0.9), dtype=torch.float32)
    for number in range(3 if evicts else 1):
        step(cache, 2, number)
    before = fingerprint(*state_of(cache))
    good = tensors(cache, 2, 9)
    cases = [
        ([x.bfloat16() for x in good], "q", "torch.float32, the cache's dtype, found torch.bfloat16"),
        ([good[0].bfloat16(), *good[1:]], "q", "torch.float32, the cache's dtype, found torch.bfloat16"),
        ([x[:, 1:] for x in good], "q", "12 tokens: 2 frames of 6, found 11"),
        ([torch.cat((x, x), 1) for x in good], "q", "12 tokens: 2 frames of 6, found 24"),
        ([torch.cat((x, x)) for x in good], "q", "1 samples, found 2"),
        ([x.repeat(1, 1, 2, 1) for x in good], "k", "2 heads, found 4"),
        ([x[..., :16] for x in good], "q", "a head dim of 32, found 16"),
    ]
    for data, name, message in cases:
        if under_grad:
            data[0] = data[0].detach().requires_grad_()
        chunk = cache.open(2)
        for call in (chunk.attend, chunk.append)[: 1 if under_grad else 2]:
            with pytest.raises(rf.ArgumentError, match=f"rope_append: argument `{name}`: expected {message}"):
                call(0, *data)
        chunk.rollback()
    assert fingerprint(*state_of(cache)) == before
