"""Rows of one memory: each has the bits of the row alone, whatever the others do, and one attention serves
them."""

import copy
import dataclasses
import pickle
import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rf_kernels as rf
from helpers.cache_case import make
from rf_kernels.testing import assert_equal_bits, fingerprint


@dataclasses.dataclass(frozen=True)
class Fading(rf.SinkPolicy):
    """Older frames weigh less, and the newest queries are kept."""

    def bind(self, spec):
        return FadingState(self, spec)


class FadingState(rf.SinkState):
    weighs = observes = True

    def __init__(self, policy, spec):
        super().__init__(policy, spec)
        self.allocate("seen", tokens=1)

    def weights(self, opening, held):
        return [-0.1 * (opening.end - frame) for frame in held]

    def observe(self, layer, q, k, v, plan):
        self.tensors["seen"][layer] = q[:, -1:, :: q.shape[2] // self.spec.heads]


#: Sink frames and policy.
POLICIES = {
    "none": (0, rf.NoSink()),
    "static": (2, rf.StaticSink()),
    "static, moving": (2, rf.StaticSink(rephase=True)),
    "ema": (2, rf.EMASink(0.9)),
    "ema, absolute": (1, rf.EMASink(0.9, rephase=False)),
    "fading": (1, Fading()),
}


def make_rows(batch, name="ema", *, memory=False, **more):
    """Rows, and a cache for each of them alone."""
    frames_sink, policy = POLICIES.get(name, (2, name))
    alone = [make(frames_sink, 4, policy=policy, undo_frames=4, **more) for _ in range(batch)]
    spec = dataclasses.replace(alone[0].spec, batch=batch)
    slots = {}
    if memory:
        # room behind the slots, and rows that lie the other way round in memory
        tokens = spec.ring.length * spec.frame_tokens
        room = torch.full((2, spec.layers, tokens + 5, batch, spec.heads, spec.head_dim), 7.0).to(spec.dtype)
        k, v = room[:, :, :tokens].transpose(2, 3)
        slots = {"k": k, "v": list(v)}
    return rf.SinkWindowRows(spec, sink=policy, **slots), alone


def inputs(rows, samples, frames, seed, q_heads=None):
    spec, generator = rows.spec, torch.Generator().manual_seed(seed)
    heads = (q_heads or spec.heads, spec.heads, spec.heads)
    size = frames * spec.frame_tokens
    return [torch.randn(samples, size, h, spec.head_dim, generator=generator).to(spec.dtype) for h in heads]


def weights(spec, *heads):
    """Of q and k."""
    generator = torch.Generator().manual_seed(5)
    sizes = [h * spec.head_dim for h in heads or (spec.heads, spec.heads)]
    return [(1 + 0.2 * torch.randn(size, generator=generator)).to(spec.dtype) for size in sizes]


def forward(batch, seed, **options):
    return [
        batch.attend(layer, *inputs(batch._owner, len(batch.chunks), batch.frames, seed + layer), **options)
        for layer in range(batch._owner.spec.layers)
    ]


def assert_same_stream(row, alone):
    assert row._stream == alone._stream and row.next_frame == alone.next_frame
    for (k, v), (k_alone, v_alone) in zip(row._slots, alone._slots, strict=True):
        for x, y in ((k, k_alone), (v, v_alone)):
            assert_equal_bits(x[:, : row.kv_tokens], y[:, : row.kv_tokens])
    if row._stream.left:
        for name, x in row._sink.tensors.items():
            assert_equal_bits(x, alone._sink.tensors[name])


class Server:
    """Rows that begin, seek, repeat, go back, reset and end at random, and each of them once more, alone."""

    def __init__(self, seed, name, tmp_path, **more):
        self.choose, self.number = random.Random(f"{seed} {name}"), seed * 100_000
        self.rows, self.alone = make_rows(4, name, layers=2, grid=(1, 3), **more)
        self.open = [None] * 4
        self.file, self.seen = tmp_path / "row", set()

    def both(self, row):
        return self.rows[row], self.alone[row]

    def begin(self, row):
        choose, (cache, _) = self.choose, self.both(row)
        what = choose.random()
        start = None
        if what < 0.1:
            for c in self.both(row):
                c.reset()
            self.seen.add("reset")
        elif what < 0.2 and cache.next_frame:
            cache.save(self.file)
            step = cache.open(1)  # gone on, and taken back to what was saved
            for layer in range(2):
                step.attend(layer, *inputs(self.rows, 1, 1, 3))
            step.commit()
            cache.load(self.file)
            self.seen.add("load")
        if not cache.next_frame:
            start = choose.choice([None, 0, 21])
        elif choose.random() < 0.3:
            start = choose.randint(cache._stream.origin + cache._stream.oldest, cache.next_frame)
            self.seen.add("seek")
        undo, position = choose.random() < 0.3, choose.choice([None, None, 8])
        frames = choose.choice([1, 2])
        try:
            chunks = [c.open(frames, start=start, position=position, undo=undo) for c in self.both(row)]
        except rf.ArgumentError:  # the sink has absorbed, or no room for undo
            return
        plan = chunks[0].plan
        self.seen |= {f"fill {len(plan.after.held)}", "frames leave" if plan.leaving else "none leaves"}
        self.open[row] = chunks

    def tick(self):
        choose = self.choose
        for row in range(4):
            if self.open[row] is None and choose.random() < 0.7:
                self.begin(row)
        for frames in (1, 2):
            ready = [i for i in range(4) if self.open[i] and self.open[i][0].frames == frames]
            part = choose.sample(ready, choose.randint(0, len(ready)))
            if choose.random() < 0.5:
                part.sort()
            if part:
                self.forward(part, frames)
        for row in range(4):
            if self.open[row] and choose.random() < 0.5:
                self.end(row)

    def forward(self, part, frames):
        batch = self.rows.batch([self.open[i][0] for i in part])
        assert batch.rows == tuple(part)
        self.number += 10
        q_norm, k_norm = weights(self.rows.spec, 4, 2)
        options = {"q_norm": q_norm, "k_norm": k_norm, "deterministic": True}
        for layer in range(2):
            q, k, v = inputs(self.rows, len(part), frames, self.number + layer, q_heads=4)
            out = batch.attend(layer, q, k, v, **options)
            for i, row in enumerate(part):
                data = [x[i : i + 1] for x in (q, k, v)]
                assert_equal_bits(out[i : i + 1], self.open[row][1].attend(layer, *data, **options))
        self.seen |= {f"{len(part)} rows", "in order" if part == sorted(part) else "in another order"}

    def end(self, row):
        cache, alone = self.both(row)
        chunks = self.open[row]
        assert chunks[0].written == chunks[1].written
        if not all(chunks[0]._appended) or (chunks[0].undo and self.choose.random() < 0.5):
            for chunk in chunks:
                chunk.rollback()
            self.seen.add("rollback")
        else:
            for chunk in chunks:
                chunk.commit()
        assert_same_stream(cache, alone)
        self.open[row] = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", POLICIES)
def test_rows_have_the_bits_of_the_row_alone(name, dtype, tmp_path):
    """Any subset of the rows in any order, at different fill, with seeks, resets, rollbacks and loads."""
    server = Server(1, name, tmp_path, dtype=dtype, memory=dtype == torch.bfloat16)
    for _ in range(60):
        server.tick()
    wanted = {"reset", "load", "seek", "rollback", "in order", "in another order"}
    wanted |= {
        "frames leave",
        "none leaves",
        "1 rows",
        "2 rows",
        "3 rows",
        "fill 1",
        f"fill {server.rows.spec.ring.length}",
    }
    assert wanted <= server.seen


@pytest.mark.parametrize("part", [[0, 1, 2, 3], [1, 3], [2, 0], [3, 0, 2]])
def test_one_attention_for_all_rows_and_no_read_of_the_device(part):
    """Rows in step or at equal distances in ascending order: one call of each op, and no copy."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    rows, _ = make_rows(4)
    for i in range(4):  # each with a fill of its own
        with rows.chunk(i + 1, rows=[i]) as batch:
            forward(batch, i)
    batch = rows.chunk(2, rows=part)
    forward(batch, 50)
    names = []
    data = inputs(rows, len(part), 2, 7)
    with torch.no_grad(), Calls():
        batch.attend(0, *data)
    assert names.count("rf_kernels::sink_window_attention") == 1
    assert not [n for n in names if "scalar_dense" in n or "item" in n]
    if part == sorted(part):
        assert names.count("rf_kernels::rope_append") == 1
        assert not [n for n in names if n.startswith(("aten::copy", "aten::cat", "aten::index", "aten::new"))]


# ---- refusals, and what they leave -------------------------------------------------------------------------


def state_of(rows):
    tensors = [rows.k, rows.v, *(t for row in rows for t in row._sink.tensors.values())]
    return fingerprint(*tensors), [(row.next_frame, row._chunk, row._broken) for row in rows]


def test_what_does_not_go_together_is_refused():
    rows, alone = make_rows(3)
    other, _ = make_rows(3)
    a, b = rows[0].open(2), rows[1].open(1)
    ended = rows[2].open(1)
    ended.rollback()
    cases = [
        ([a, a], "at most one chunk of a row"),
        ([a, b], r"equal numbers of frames, found \[2, 1\]"),
        ([a, ended], r"chunks\[1\].*an open chunk"),
        ([alone[0].open(2)], r"chunks\[0\].*of these rows"),
        ([other[0].open(2)], r"chunks\[0\].*of these rows"),
        ([a, "b"], r"chunks\[1\]"),
        ([], "at least one open chunk"),
    ]
    before = state_of(rows)
    for chunks, text in cases:
        with pytest.raises(rf.ArgumentError, match=text):
            rows.batch(chunks)
    for given, text in [
        ({"rows": [2, 2]}, "each once"),
        ({"rows": []}, "at least one row"),
        ({"rows": [3]}, r"a row 0\.\.2, found 3"),
        ({"rows": [True]}, "True"),
        ({"rows": 2}, "row numbers, or None"),
        ({"rows": [2], "start": [0, 0]}, "one, or one for each of the 1 rows"),
        ({"rows": [2, 0]}, r"still open.*\(row 0\)"),  # and row 2 is not left open
        ({"rows": [2], "start": -1}, "start"),
    ]:
        with pytest.raises(rf.ArgumentError, match=text):
            rows.chunk(2, **given)
    with pytest.raises(rf.ArgumentError, match="row"):
        rows[3]
    assert state_of(rows) == before
    for wrong, argument in ((None, "spec"), (rows.spec, "sink")):
        with pytest.raises(rf.ArgumentError, match=argument):
            rf.SinkWindowRows(wrong, sink=None)
    memory = torch.zeros(1, 3, 36, 2, 32, dtype=torch.float64)
    with pytest.raises(rf.ArgumentError, match="memory apart from"):
        rf.SinkWindowRows(rows.spec, sink=rf.EMASink(), k=memory, v=memory)


@pytest.mark.parametrize("part", [[0, 1, 2], [2, 0]])
def test_a_refused_forward_writes_nothing_in_any_row(part):
    """Also where rows have to evict first, and where several calls of an op serve the rows."""
    rows, _ = make_rows(3)
    for i in range(4):
        with rows.chunk(2) as batch:
            forward(batch, i)
    batch = rows.chunk(2, rows=part)
    good = inputs(rows, len(part), 2, 9)
    before = state_of(rows)
    state = rows[part[1]]._sink.tensors["k_state"][0]
    aliased = torch.as_strided(state, good[0].shape, (0, *good[0].stride()[1:]))
    for change, text in [
        (lambda x: x[:-1], f"{len(part)} samples"),
        (lambda x: torch.cat([x, x]), f"{len(part)} samples"),
        (lambda x: x[:, :-1], "12 tokens"),
        (lambda x: x.float(), "float64, the cache's dtype"),
        (lambda x: x[..., :-1], "a head dim of 32"),
        (lambda x: x[0], "samples"),
        (lambda x: None, "samples"),
        (lambda x: aliased, "memory apart from the sink's state"),
    ]:
        for i, name in enumerate("qkv"):
            data = list(good)
            data[i] = change(data[i])
            with pytest.raises(rf.ArgumentError, match=f"`{name}`.*{text}"):
                batch.attend(0, *data)
    for more in ({"layer": 1}, {"softmax_scale": -1.0}, {"q_norm": torch.ones(3, dtype=torch.float64)}):
        layer = more.pop("layer", 0)
        with pytest.raises(rf.ArgumentError):
            batch.attend(layer, *good, **more)
    assert state_of(rows) == before and not any(chunk.written for chunk in batch.chunks)
    forward(batch, 9)
    batch.chunks[1].commit()
    with pytest.raises(rf.ArgumentError, match=rf"committed \(row {part[1]}\)"):
        batch.attend(0, *good)


@pytest.mark.parametrize("undo", [False, True])
def test_a_row_that_fails_leaves_the_others_usable(undo):
    rows, alone = make_rows(3, rf.EMASink(0.9, on_nonfinite="raise"))

    def go_on(part, number, **more):
        data = inputs(rows, 3, 1, number)
        if number == 2:
            data[2][1, 3] = float("nan")
        data = [x[part] for x in data]
        with rows.chunk(1, rows=part, **more) as batch:
            out = batch.attend(0, *data)
            for i, row in enumerate(part):
                if row != 1 or not rows[1].next_frame:
                    with alone[row].chunk(1) as chunk:
                        assert_equal_bits(out[i : i + 1], chunk.attend(0, *(x[i : i + 1] for x in data)))

    for number in range(6):
        go_on([0, 1, 2], number)
    with pytest.raises(rf.NonFiniteError, match=r"frames \[2\].*\(row 1\)"):
        go_on([0, 1, 2], 6, undo=undo)  # frame 2 leaves
    assert [row.next_frame for row in rows] == [7, 6, 7] and not any(row._chunk for row in rows)
    go_on([2, 0], 7)
    if undo:
        assert rows[1].kv_tokens == 36  # as before the chunk
    else:
        with pytest.raises(rf.StreamClosedError, match=r"\(row 1\)"):
            go_on([0, 1, 2], 8)
        with pytest.raises(rf.StreamClosedError, match=r"\(row 1\)"):
            pickle.dumps(rows)
    rows[1].reset(), alone[1].reset()
    go_on([0, 1, 2], 9)
    for row, one in zip(rows, alone, strict=True):
        assert_same_stream(row, one)

    with pytest.raises(KeyboardInterrupt), rows.chunk(1, rows=[0, 2]) as batch:
        batch.attend(0, *inputs(rows, 2, 1, 10))
        raise KeyboardInterrupt
    for row in (0, 2):
        with pytest.raises(rf.StreamClosedError, match="KeyboardInterrupt"):
            rows[row].open(1)
    go_on([1], 11)


def test_how_a_batch_ends():
    rows, _ = make_rows(3)
    with rows.chunk(2, undo=True) as batch:
        forward(batch, 1)
        batch.chunks[0].rollback()
    assert [row.next_frame for row in rows] == [0, 2, 2]
    with pytest.raises(rf.ArgumentError, match="open chunk"):
        batch.commit()
    with pytest.raises(rf.ArgumentError, match=r"commit.*nothing in layers \[0\].*\(row 0\)"):
        rows.chunk(1, rows=[0, 2]).commit()
    assert [row.next_frame for row in rows] == [0, 2, 2]
    a, b = rows[0].open(1, undo=True), rows[1].open(1)
    batch = rows.batch([a, b])
    forward(batch, 2)
    with pytest.raises(rf.ArgumentError, match=r"rollback.*undo=True.*\(row 1\)"):
        batch.rollback()
    assert a.is_open and b.is_open
    b.commit()
    batch.rollback()
    assert [row.next_frame for row in rows] == [0, 3, 2]
    with rows.chunk(1, rows=[0, 2], start=[21, None], position=[0, 30]) as batch:
        assert [(c.first_frame, c.plan.position) for c in batch.chunks] == [(21, 0), (2, 30)]
        assert rows.chunk(1, rows=[0], start=21).chunks == batch.chunks[:1]  # the open one
        forward(batch, 3)


# ---- the rest of a cache -----------------------------------------------------------------------------------


def test_a_row_moves_to_another_place_and_copies_are_apart(tmp_path):
    rows, alone = make_rows(3, dtype=torch.bfloat16)
    for number in range(5):
        part = [0, 2] if number < 2 else [0, 1, 2]
        with rows.chunk(2, rows=part) as batch:
            forward(batch, number)
    rows[0].save(tmp_path / "row")
    alone[1].load(tmp_path / "row")  # a cache of one sample
    rows[1].load(tmp_path / "row")
    copies = [copy.deepcopy(rows), pickle.loads(pickle.dumps(rows))]
    before = state_of(rows)
    data = inputs(rows, 3, 2, 99)
    outs = []
    for each in copies:
        with each.chunk(2) as batch:
            outs.append(batch.attend(0, *data))
        assert each.nbytes == rows.nbytes
        assert each.k.untyped_storage().data_ptr() != rows.k.untyped_storage().data_ptr()
    assert state_of(rows) == before
    with rows.chunk(2) as batch:
        out = batch.attend(0, *data)
    for other in outs:
        assert_equal_bits(other, out)
    with alone[1].chunk(2) as chunk:
        assert_equal_bits(chunk.attend(0, *(x[1:2] for x in data)), out[1:2])
    planned = rf.SinkWindowRows(dataclasses.replace(rows.spec, device="meta"), sink=rows.sink)
    assert planned.nbytes == rows.nbytes > 0 and len(planned) == len(list(rows)) == 3


@pytest.mark.parametrize("part", [[0, 1, 2], [2, 0]])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_the_row_alone(part, checkpointed):
    """Backward comes after the rows have gone on. Values are those without grad."""
    rows, alone = make_rows(3)
    w = [x.requires_grad_() for x in weights(rows.spec)]
    for i in range(3):
        with torch.no_grad(), rows[i].chunk(i + 1) as a, alone[i].chunk(i + 1) as b:
            for chunk in (a, b):
                chunk.attend(0, *inputs(rows, 1, i + 1, i))

    def attend(chunk, *data):
        if checkpointed:
            return checkpoint(
                lambda *x: chunk.attend(0, *x[:3], q_norm=x[3], k_norm=x[4]), *data, use_reentrant=False
            )
        return chunk.attend(0, *data[:3], q_norm=data[3], k_norm=data[4])

    outs, wanted, leaves = [], [], []
    for number in range(3):
        data = [x.requires_grad_() for x in inputs(rows, len(part), 2, 20 + number)]
        leaves += data
        with rows.chunk(2, rows=part) as batch:
            with torch.no_grad():
                plain = (
                    attend(batch, *data, *w)
                    if not checkpointed
                    else batch.attend(0, *data, q_norm=w[0], k_norm=w[1])
                )
            outs.append(attend(batch, *data, *w))
            assert_equal_bits(plain, outs[-1].detach())
        for i, row in enumerate(part):
            with alone[row].chunk(2) as chunk:
                wanted.append(attend(chunk, *(x[i : i + 1] for x in data), *w))
    grads, expected = (
        torch.autograd.grad(sum((x * x.detach().roll(1, 1)).sum() for x in xs), [*leaves, *w])
        for xs in (outs, wanted)
    )
    for found, alone_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, alone_grad, rtol=1e-12, atol=1e-13)
    for row in part:
        assert_same_stream(rows[row], alone[row])


def test_attention_of_ones_own():
    rows, _ = make_rows(3)
    for i in range(3):
        with rows.chunk(i + 1, rows=[i]) as batch:
            forward(batch, i)
    for part in ([0, 1, 2], [2, 0]):
        with rows.chunk(1, rows=part) as batch:
            data = inputs(rows, len(part), 1, 8)
            rotated = batch.append(0, *data)
            out = batch.attend(0, *data)
            for i, chunk in enumerate(batch.chunks):
                past = chunk.kv(0)
                own = rf.sink_window_attention(
                    rotated[i : i + 1], past.k, past.v, kv_tokens=past.kv_tokens, deterministic=True
                )
                assert_equal_bits(own, out[i : i + 1])


def test_a_compiled_forward_serves_any_rows():
    """Compiled for one number of rows, for one row, and for any; then never again."""
    torch._dynamo.reset()
    eager, compiled = (make_rows(4, layers=2)[0] for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")

    def both(q, k, v, batch):
        for layer in range(2):
            q = batch.attend(layer, q, k, v)
        return q

    fast = torch.compile(both, fullgraph=True, backend=counter)
    for number, part in enumerate(([0, 1, 2], [3, 1], [2], [2, 0], [0, 1, 2, 3], [1, 2, 3], [0, 3])):
        with eager.chunk(2, rows=part) as a, compiled.chunk(2, rows=part) as b:
            data = inputs(eager, len(part), 2, number)
            assert_equal_bits(fast(*data, b), both(*data, a))
    assert 1 <= counter.frame_count <= 3
    fast, grads = torch.compile(both, backend="aot_eager"), []  # leaves its graph where a gradient is wanted
    for rows, function in ((eager, both), (compiled, fast)):
        q, k, v = inputs(rows, 2, 2, 99)
        with rows.chunk(2, rows=[1, 2]) as batch:
            grads += torch.autograd.grad(function(q.requires_grad_(), k, v, batch).sum(), q)
    assert_equal_bits(*grads)
