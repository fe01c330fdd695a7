"""``integrations.wan.patch`` on stand-ins with the family's interfaces."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import rf_kernels as rf
from helpers import family_case as family
from rf_kernels.integrations import wan

T = family.TOKENS


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


CASES = [
    (family.SelfForcing, {"local_attn_size": 6}, 6, 3),
    (family.SelfForcing, {"local_attn_size": 6, "sink_size": 1}, 6, 2),
    (family.SelfForcing, {"local_attn_size": 7, "sink_size": 2}, 7, 3),
    (family.SelfForcing, {"local_attn_size": -1}, 18, 3),
    (family.RewardForcing, {"local_attn_size": 9, "sink_size": 3}, 9, 3),
    (family.RewardForcing, {"local_attn_size": 4, "sink_size": 1, "compression_alpha": 0.5}, 4, 1),
    (family.LongLive, {"local_attn_size": 9, "sink_size": 3}, 9, 3),
]


@pytest.mark.parametrize("kind, options, room, chunk", CASES)
def test_patched_stream_agrees(kind, options, room, chunk):
    model, x = family.Model(kind, **options), family.video(18)
    wanted, wanted_indices = family.stream(model, family.kv_cache(model, room), x, chunk)
    caches = family.kv_cache(model, room)
    memory = [(c["k"], c["v"]) for c in caches]
    unpatch = wan.patch(model)
    found, indices = family.stream(model, caches, x, chunk)
    assert distance(found, wanted) < 1e-12
    assert indices == wanted_indices
    assert all(
        c["k"] is k and c["v"] is v and k.any() and v.any() for c, (k, v) in zip(caches, memory, strict=True)
    )
    unpatch()
    assert torch.equal(family.stream(model, family.kv_cache(model, room), x, chunk)[0], wanted)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_window_smaller_than_the_cache():
    """In training the cache holds a whole clip. Reward Forcing's sink is then attended beside the window."""
    for kind, sink in ((family.SelfForcing, 0), (family.RewardForcing, 2)):
        model = family.Model(kind, local_attn_size=6, sink_size=sink)
        for block in model.blocks:
            block.self_attn.max_attention_size = 6 * T
        x = family.video(18)
        wanted, _ = family.stream(model, family.kv_cache(model, 18), x, 2)
        wan.patch(model)
        assert distance(family.stream(model, family.kv_cache(model, 18), x, 2)[0], wanted) < 1e-12


def test_the_family_can_be_named():
    model = family.Model(family.InfiniteForcing, local_attn_size=6, sink_size=1)
    x = family.video(12)
    wanted, _ = family.stream(model, family.kv_cache(model, 6), x, 1)
    wan.patch(model, family="infinite_forcing")
    assert distance(family.stream(model, family.kv_cache(model, 6), x, 1)[0], wanted) < 1e-12


def test_shots_at_positions_of_their_own():
    """LongLive 2.0: an offset for each shot, whole or not, and a temporal scale."""
    model, x = family.Model(family.LongLive2, local_attn_size=6, sink_size=1), family.video(14)

    def run():
        def options(start):
            return {"temporal_offset": start // (6 * T) * 4.5, "t_scale": 0.75}

        return family.stream(model, family.kv_cache(model, 6), x, 2, options=options)[0]

    wanted = run()
    wan.patch(model)
    assert distance(run(), wanted) < 1e-12


@pytest.mark.parametrize("sink", [0, 2])
def test_a_window_that_changes_over_the_denoising_steps(sink):
    """LongLive's schedule: forwards of one chunk attend different numbers of frames."""
    model, x = family.Model(family.LongLive, local_attn_size=8, sink_size=sink), family.video(16)

    def run():
        forwards = iter(range(1000))

        def options(start):
            for block in model.blocks:
                block.self_attn.max_attention_size = (4, 8, 6)[next(forwards) % 3] * T
            return {}

        return family.stream(model, family.kv_cache(model, 9), x, 2, options=options)[0]

    wanted = run()
    wan.patch(model)
    assert distance(run(), wanted) < 1e-12


def pinned_stream(model, cuts, chunks=10, window=6):
    """LongLive 2.0 pins the chunk of a scene cut: it stays when it is the oldest, until another is pinned."""
    caches, x, outs = family.kv_cache(model, 2 + window), family.video(2 * chunks), []
    for cache in caches:
        cache |= {"pinned_start": torch.tensor([-1]), "pinned_len": torch.tensor([0])}
    for i in range(chunks):
        clip = x[:, 2 * i * T : 2 * (i + 1) * T]
        outs.append(family.stream(model, caches, clip, 2, first=2 * i)[0])
        for cache in caches if i in cuts else ():
            cache["pinned_start"].fill_(int(cache["local_end_index"]) - 2 * T)
            cache["pinned_len"].fill_(2 * T)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("cuts", [(1,), (2, 3), (4, 7), (5, 6)])
def test_pinned_chunks(cuts):
    model = family.Model(family.LongLive2, local_attn_size=8, sink_size=2)
    wanted, without = pinned_stream(model, cuts), pinned_stream(model, ())
    assert distance(without, wanted) > 1e-4
    wan.patch(model)
    assert distance(pinned_stream(model, cuts), wanted) < 1e-12
    assert distance(pinned_stream(model, ()), without) < 1e-12


def test_pinned_chunks_that_are_refused():
    model = family.Model(family.LongLive2, local_attn_size=9, sink_size=2)
    wan.patch(model)
    with pytest.raises(rf.ArgumentError, match="argument `kv_cache`.*whole chunks"):
        pinned_stream(model, (3,), window=7)
    model.requires_grad_(True)
    with torch.no_grad():
        pinned_stream(model, (3,), chunks=4)
    with pytest.raises(rf.ArgumentError, match="argument `kv_cache`.*under grad"):
        pinned_stream(model, (3,))


@pytest.mark.parametrize("kind", [family.SelfForcing, family.RewardForcing])
def test_other_tables_of_rotations(kind):
    """A temporal scale, and a frequency lowered as RIFLEx does."""
    model, x = family.Model(kind, local_attn_size=6, sink_size=2), family.video(12)
    table = model.freqs.clone()
    frames = torch.arange(len(table)).double()
    for column, frequency in ((0, 0.7), (2, 0.004)):
        table[:, column] = torch.polar(torch.ones_like(frames), frames * frequency)
    model.freqs = table
    wanted, _ = family.stream(model, family.kv_cache(model, 6), x, 2)
    wan.patch(model)
    assert distance(family.stream(model, family.kv_cache(model, 6), x, 2)[0], wanted) < 1e-11
    model.freqs = table.to(torch.complex64)
    again, _ = family.stream(model, family.kv_cache(model, 6), x, 2)
    assert distance(again, wanted) < 1e-7
    for other in (2 * table, table.flip(0), table[:, 1:], table.real):
        model.freqs = other
        with pytest.raises(rf.ArgumentError, match="argument `freqs`"):
            family.stream(model, family.kv_cache(model, 6), x, 2)


@pytest.mark.parametrize("how", ["replaced", "zeroed", "none"])
def test_a_dictionary_is_used_for_the_next_stream(how):
    """Pipelines keep their dictionaries, and say so in the index tensors or by `current_start` alone."""
    model = family.Model(family.RewardForcing, local_attn_size=4, sink_size=1)
    wan.patch(model)
    caches = family.kv_cache(model, 4)
    family.stream(model, caches, family.video(9, seed=3), 1)
    for cache in caches:
        for name in ("global_end_index", "local_end_index"):
            if how == "replaced":
                cache[name] = torch.zeros_like(cache[name])
            elif how == "zeroed":
                cache[name].zero_()
    x = family.video(9)
    again, _ = family.stream(model, caches, x, 1)
    assert torch.equal(again, family.stream(model, family.kv_cache(model, 4), x, 1)[0])


def test_a_pipeline_zeroes_the_sink():
    """At a scene cut; an average, and a sink that moves along, are kept beside the slots."""
    model, x = family.Model(family.RewardForcing, local_attn_size=4, sink_size=1), family.video(12)

    def run():
        caches = family.kv_cache(model, 4)
        first, _ = family.stream(model, caches, x[:, : 7 * T], 1)
        for cache in caches:
            for name in ("k", "v"):
                cache[name][:, :T].zero_()
        return family.stream(model, caches, x[:, 7 * T :], 1, first=7)[0]

    wanted = run()
    wan.patch(model)
    assert distance(run(), wanted) < 1e-12


def test_nothing_is_read_on_the_host(monkeypatch):
    model, x = family.Model(family.RewardForcing, local_attn_size=6, sink_size=2), family.video(12)
    caches = family.kv_cache(model, 6)
    wan.patch(model)
    family.stream(model, caches, x[:, : 2 * T], 2)
    on_device = {id(t) for c in caches for t in c.values() if isinstance(t, torch.Tensor)}

    def guarded(name):
        own = getattr(torch.Tensor, name)

        def read(self, *args):
            assert id(self) not in on_device, name
            return own(self, *args)

        return read

    for name in ("item", "tolist", "__int__", "__bool__", "__index__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, guarded(name))
    for i in range(2, 12, 2):
        for _ in range(3):
            model(x[:, i * T : (i + 2) * T], caches, i * T)


class Calls(TorchDispatchMode):
    """The operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def rows_case(frames, steps, jump=None):
    """StreamDiffusionV2's loop: a first chunk in one row, repeated for a row a step, then staggered rows."""
    model = family.Model(family.StreamDiffusion, local_attn_size=5, sink_size=2)
    first, x = 2, family.video(frames)

    def run():
        for block in model.blocks:
            block.self_attn.queues = {}
        caches = family.kv_cache(model, 5)
        outs = [model(x[:, : first * T], caches, torch.tensor([0])) for _ in range(2)]
        for block in model.blocks:
            queues = getattr(block.self_attn, "queues", None)
            if queues:
                block.self_attn.queues = {i: dict(queues[0]) for i in range(steps)}
        for cache in caches:
            for name in ("k", "v"):
                cache[name] = cache[name].repeat(steps, 1, 1, 1)
            for name in ("global_end_index", "local_end_index"):
                cache[name] = cache[name].repeat(steps)
        starts, at = [first] * steps, first
        hidden = torch.zeros(steps, T, x.shape[2], dtype=x.dtype)
        for i in range(first, frames):
            if at == jump:
                at = 4
            starts = [at, *starts[:-1]]
            hidden = torch.cat([x[:, i * T : (i + 1) * T], hidden[:-1]])
            hidden = model(hidden, caches, torch.tensor(starts) * T)
            outs.append(hidden[-1:])
            at += 1
        ends = [c[n].tolist() for c in caches for n in ("global_end_index", "local_end_index")]
        return torch.cat(outs, 1), ends

    return model, run


@pytest.mark.parametrize("jump", [None, 9])
def test_rows_at_positions_of_their_own(jump):
    """One attention serves them."""
    model, run = rows_case(14, 3, jump)
    wanted, wanted_ends = run()
    wan.patch(model)
    with Calls() as calls:
        found, ends = run()
    assert distance(found, wanted) < 1e-12
    assert ends == wanted_ends
    assert calls.names.count("rf_kernels::sink_window_attention") == len(model.blocks) * (2 + 14 - 2)


# ---- gradients ---------------------------------------------------------------------------------------------
def rollout(model, room, chunks, chunk, exits, backward="end", frames_of_loss=None):
    """A training rollout: a forward without grad, one with it, one without on the result. Gradients of all
    parameters and of the input."""
    x = family.video(chunks * chunk).requires_grad_()
    model.requires_grad_(True)
    model.zero_grad()
    caches, losses = family.kv_cache(model, room), []
    for i in range(chunks):
        y, start = x[:, i * chunk * T : (i + 1) * chunk * T], i * chunk * T
        with torch.no_grad():
            for _ in range(exits):
                model(y, caches, start)
        y = model(y, caches, start)
        with torch.no_grad():
            model(y, caches, start)
        losses.append((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum())
        if backward == "late" and i:
            losses[i - 1].backward(retain_graph=True)
    if backward == "late":
        losses[-1].backward()
    else:
        sum(losses).backward()
    return [p.grad.clone() for p in model.parameters()] + [x.grad]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "kind, sink", [(family.SelfForcing, 0), (family.RewardForcing, 2), (family.LongLive, 2)]
)
def test_gradients_of_a_rollout(kind, sink, checkpointed):
    """Those of the unpatched modules, which train under checkpoints: gradients also reach the chunks that
    wrote the cached keys and values."""
    model = family.Model(kind, local_attn_size=6, sink_size=sink)
    for block in model.blocks:
        block.self_attn.max_attention_size = 6 * T
    model.checkpointed = True
    wanted = rollout(model, 8, 4, 2, exits=1)
    model.checkpointed = checkpointed
    wan.patch(model)
    for a, b in zip(rollout(model, 8, 4, 2, exits=1), wanted, strict=True):
        assert distance(a, b) < 1e-9


def test_backward_after_the_next_chunk_and_after_evictions():
    """A graph that is gone does not hinder the next chunk's; what is evicted in between does not matter."""
    model = family.Model(family.SelfForcing, local_attn_size=4)
    wan.patch(model)
    plain = rollout(model, 4, 6, 2, exits=1)
    model.checkpointed = True
    for a, b in zip(rollout(model, 4, 6, 2, exits=1), plain, strict=True):
        assert distance(a, b) < 1e-9
    late = rollout(model, 4, 6, 2, exits=1, backward="late")
    assert all(torch.isfinite(g).all() for g in late)


def test_a_detached_dictionary_is_constant():
    """Trainers cut the graph of the cache with `cache["k"] = cache["k"].detach()`."""
    model = family.Model(family.SelfForcing, local_attn_size=-1)
    wan.patch(model)
    caches, x = family.kv_cache(model, 4), family.video(4).requires_grad_()
    model(x[:, : 2 * T], caches, 0)
    for cache in caches:
        cache["k"], cache["v"] = cache["k"].detach(), cache["v"].detach()
    model(x[:, 2 * T :], caches, 2 * T).sum().backward()
    assert not x.grad[:, : 2 * T].any() and x.grad[:, 2 * T :].any()


# ---- refusals ----------------------------------------------------------------------------------------------
def test_refusals():
    with pytest.raises(rf.ArgumentError, match="argument `model`.*causal self-attention"):
        wan.patch(torch.nn.Linear(2, 2))
    with pytest.raises(rf.ArgumentError, match="argument `family`"):
        wan.patch(torch.nn.Linear(2, 2), family="other")
    model = family.Model(family.SelfForcing)
    caches, x = family.kv_cache(model, 4), family.video(6)
    model(x[:, : 2 * T], caches, 0)
    wan.patch(model)
    with pytest.raises(rf.ArgumentError, match="patched"):
        wan.patch(model)
    with pytest.raises(rf.ArgumentError, match="argument `kv_cache`.*empty"):
        model(x[:, : 2 * T], caches, 0)
    caches = family.kv_cache(model, 4)
    with pytest.raises(rf.ArgumentError, match="argument `current_start`.*frame 4"):
        for i in (0, 2, 4):
            model(x[:, i * T : (i + 2) * T], caches, i * T)
    with pytest.raises(rf.ArgumentError, match="argument `x`.*whole frames"):
        model(x[:, : 2 * T - 1], family.kv_cache(model, 4), 0)


def test_arguments_that_are_not_understood():
    model, x = family.Model(family.RollingForcing, local_attn_size=4), family.video(2)
    with pytest.raises(rf.ArgumentError, match=r"argument `family`.*\['updating_cache'\]"):
        wan.patch(model)
    wan.patch(model, family="self_forcing")
    model(x, family.kv_cache(model, 4), 0, updating_cache=False)
    with pytest.raises(rf.ArgumentError, match="argument `updating_cache`.*False"):
        model(x, family.kv_cache(model, 4), 0, updating_cache=True)
    model = family.Model(family.LongLive2, local_attn_size=4)
    wan.patch(model)
    with pytest.raises(rf.ArgumentError, match="argument `method`"):
        model(x, family.kv_cache(model, 4), 0, method="ntk")


def test_a_patched_model_can_be_copied():
    model = family.Model(family.SelfForcing, local_attn_size=4)
    wan.patch(model)
    twin, x = copy.deepcopy(model), family.video(8)
    for block in twin.blocks:
        block.self_attn.v.weight.data.mul_(2)
    a, b = (family.stream(m, family.kv_cache(m, 4), x, 2)[0] for m in (model, twin))
    assert not torch.equal(a, b)


@pytest.mark.heavy
def test_a_patched_model_can_be_compiled():
    """Block by block, as its servers do it; the graph breaks at the attention alone."""
    model, x = family.Model(family.RewardForcing, local_attn_size=4, sink_size=1), family.video(9)
    wan.patch(model)
    wanted, _ = family.stream(model, family.kv_cache(model, 4), x, 1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in model.blocks:
        block.compile(backend="eager")
    found, _ = family.stream(model, family.kv_cache(model, 4), x, 1)
    assert distance(found, wanted) < 1e-14
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert breaks and all("SelfAttention._cached" in reason for reason in breaks)
    torch._dynamo.reset()


def test_a_forward_without_a_cache_is_the_modules_own():
    model = family.Model(family.SelfForcing)
    x = family.video(2)
    attention = model.blocks[0].self_attn
    wanted = attention(x, None, torch.tensor([[2, *family.GRID]]), model.freqs, None)
    wan.patch(model)
    assert torch.equal(attention(x, None, torch.tensor([[2, *family.GRID]]), model.freqs, None), wanted)


def test_a_sharded_model_streams_and_trains():
    """Parameters that are gathered for a block's forward alone (`fully_shard`), also in recomputations."""
    model, x = family.Model(family.SelfForcing, local_attn_size=6), family.video(6)
    model.checkpointed = True
    wan.patch(model)
    wanted, _ = family.stream(model, family.kv_cache(model, 6), x, 2)
    grads = rollout(model, 6, 3, 2, exits=1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for module in (model.blocks[0].self_attn.norm_q, *model.blocks, model):
            fully_shard(module, mesh=mesh)
        with torch.no_grad():
            assert distance(family.stream(model, family.kv_cache(model, 6), x, 2)[0], wanted) < 1e-14
        for a, b in zip(rollout(model, 6, 3, 2, exits=1), grads, strict=True):
            assert distance(a.full_tensor() if hasattr(a, "full_tensor") else a, b) < 1e-12
    finally:
        dist.destroy_process_group()
