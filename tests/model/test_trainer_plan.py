"""``train --plan`` against runs whose bytes are measured."""

import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import rf_kernels as rf
from helpers.training import CAUSAL, DISTILL, TEACHER
from reward_forcing.cli import main
from reward_forcing.models import BidirectionalWanModel
from reward_forcing.models.head_parallel import parallelize_heads
from reward_forcing.trainer import loop
from reward_forcing.trainer.data import WorldSource
from reward_forcing.trainer.distributed import heads_mesh, local, shard
from reward_forcing.trainer.draws import Draws
from reward_forcing.trainer.plan import plan

DMD = replace(DISTILL, frames=12, distill=replace(DISTILL.distill, objective="dmd", critic_steps=1))


def count(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_what_stays_is_what_a_run_holds(monkeypatch):
    caches, build = [], rf.SinkWindowCache

    def watched(*arguments, **options):
        caches.append(build(*arguments, **options))
        return caches[-1]

    draws, held = Draws(0), {}
    stage = loop.DistillStage(DMD, WorldSource(draws), draws)
    clip, zero_grad = torch.nn.utils.clip_grads_with_norm_, {}

    def clipped(parameters, *rest):
        zero_grad[len(zero_grad)] = count(p.grad for p in parameters)
        clip(parameters, *rest)

    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", clipped)
    monkeypatch.setattr(rf, "SinkWindowCache", watched)
    stage.step(0)
    gradients = dict(zip(("critic", "generator"), zero_grad.values(), strict=True))
    for name, trained in stage.networks.items():
        state = [t for values in trained.stepper.optimizer.state.values() for t in values.values()]
        average = [] if trained.average is None else trained.average.weights.values()
        parameters = count(trained.model.parameters())
        held[name] = [parameters, gradients[name], count(state), count(average)]
    held["teacher"] = [count(stage.distillation.teacher.parameters()), 0, 0, 0]
    planned = plan(DMD, 1, height=8, width=8)
    columns = ("parameters", "gradients", "optimizer", "average")
    assert {name: [e[c] for c in columns] for name, e in planned["networks"].items()} == held
    assert {planned["cache"]} == {cache.nbytes for cache in caches}


def test_shards_are_what_fsdp_makes():
    with fake_ranks(8):
        model = shard(BidirectionalWanModel(TEACHER.model))
        held = count(local(p) for p in model.parameters())
    assert plan(TEACHER, 8, height=8, width=8)["networks"]["teacher"]["parameters"] == held


@contextmanager
def fake_ranks(count):
    """A process group of one process, whose collectives send nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_ranks_that_share_a_sample_have_its_heads_in_the_cache(monkeypatch):
    caches, build = [], rf.SinkWindowCache
    monkeypatch.setattr(rf, "SinkWindowCache", lambda *a, **k: caches.append(build(*a, **k)) or caches[-1])
    config = replace(DMD, head_parallel=2, batch=2)
    with fake_ranks(4):
        draws = Draws(0)
        loop.DistillStage(config, WorldSource(draws), draws).step(0)
    planned = plan(config, 4, height=8, width=8)
    assert planned["samples_per_rank"] == 1 and {planned["cache"]} == {cache.nbytes for cache in caches}
    alone = plan(replace(config, head_parallel=1), 4, height=8, width=8)
    for name, entry in planned["networks"].items():
        assert entry["held"] == alone["networks"][name]["held"]  # parameters are sharded over all ranks
    with pytest.raises(rf.ArgumentError, match="head_parallel.*a divisor of 3 ranks, found 2"):
        plan(config, 3, height=8, width=8)


def allocated(run, path):
    """Peak of what the CPU allocator gave out in a run, above what it had given out before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.empty(16)
        run()
    profile.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in events]
    return max(totals) - totals[0]


@pytest.mark.heavy
@pytest.mark.usefixtures("one_thread")  # the CPU's attention takes working memory for each thread
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("config", "ranks"),
    [(TEACHER, 1), (CAUSAL, 1), (DMD, 1), (TEACHER, 2), (DMD, 2)],
    ids=lambda value: value if isinstance(value, int) else value.stage,
)
def test_activations_are_what_the_allocator_gives(config, ranks, checkpointing, tmp_path):
    """The plan's forwards and backwards on the CPU, seen from the allocator, which also sees what an op takes
    and gives back inside. On two ranks the model shares the sample by a real mesh."""
    from reward_forcing.trainer import plan as module

    config = replace(config, checkpointing=checkpointing, batch=1, head_parallel=ranks)
    for network in module.networks(config):
        planned = plan(config, ranks, height=32, width=32)["networks"][network.name]["activations"]
        model = network.kind(network.sizes)
        work = module._Work(config, model, 1, 32, 32, device="cpu")
        with fake_ranks(ranks) if ranks > 1 else nullcontext():
            if ranks > 1:
                parallelize_heads(model, heads_mesh(ranks))
            forward = work.prepare(network)
            measured = allocated(lambda n=network, f=forward: module._Work.run(n, f), tmp_path / "trace.json")
        inside = 2**20  # of the CPU's attention, whatever its sizes
        assert 0.98 * planned <= measured <= 1.1 * planned + inside, network.name
        if ranks > 1:
            alone = plan(replace(config, head_parallel=1), 1, height=32, width=32)["networks"]
            assert planned < 0.75 * alone[network.name]["activations"]


def test_the_command_line_prints_a_table_and_writes_json(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        "stage: distill\nbatch: 8\nframes: 9\n"
        "model: {dim: 32, ffn_dim: 64, num_heads: 2, num_layers: 1, in_dim: 8, out_dim: 8, text_len: 3}\n"
        "teacher_model: {dim: 64, ffn_dim: 64, num_heads: 2, num_layers: 2, in_dim: 8, out_dim: 8}\n"
    )
    command = ["train", "--plan", "--config", str(config), "--ranks", "1", "8", "--latent", "8", "8"]
    assert main([*command, "--json", str(tmp_path / "plan.json")]) == 0
    text = capsys.readouterr().out
    assert "1 ranks, 8 sample(s) a rank" in text and "8 ranks, 1 sample(s) a rank" in text
    one, eight = json.loads((tmp_path / "plan.json").read_text())
    assert one["networks"].keys() == {"generator", "critic", "teacher"}
    assert one["cache"] / eight["cache"] == pytest.approx(8, rel=0.05)
    assert 7.5 < one["networks"]["critic"]["optimizer"] / eight["networks"]["critic"]["optimizer"] <= 8
    with pytest.raises(SystemExit):
        main(["train", "--config", str(config)])
    assert "--out" in capsys.readouterr().err


def test_the_published_sizes():
    """Parameters of Wan2.1 as its files have them, counted without memory."""
    from reward_forcing.trainer.plan import networks, wan

    with torch.device("meta"):
        sizes = {n.name: sum(p.numel() for p in n.kind(n.sizes).parameters()) for n in networks(wan())}
    assert sizes == {"generator": 1_418_996_800, "critic": 1_418_996_800, "teacher": 14_288_491_584}
