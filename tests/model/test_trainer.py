"""The trainer: draws by counter, configuration, the optimizer step, rollouts, gradients, exact resume."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import rf_kernels as rf
from helpers.training import CAUSAL, DISTILL, ODE, PUBLISHED, STREAM, TEACHER, TINY, WORLD
from reward_forcing.config import ModelConfig
from reward_forcing.losses import warp_timesteps
from reward_forcing.models import BidirectionalWanModel, CausalWanModel
from reward_forcing.pipeline import StreamingPipeline
from reward_forcing.trainer import DistillConfig, OptimizerConfig, Rollout, TrainConfig, load, loop, train
from reward_forcing.trainer.config import RewardConfig, WanConfig, build
from reward_forcing.trainer.distributed import local, process_group
from reward_forcing.trainer.draws import Draws
from reward_forcing.trainer.loop import Trained
from reward_forcing.trainer.stages import FlowMatching, timesteps
from reward_forcing.trainer.step import Stepper, StoppedOnNonFinite, learning_rate


# ---- draws -------------------------------------------------------------------------------------------------
def test_a_draw_depends_on_its_name_alone():
    draws = Draws(5)
    whole = draws.normal("noise", 7, range(4), (2, 3))
    halves = [Draws(5).normal("noise", 7, part, (2, 3)) for part in ((0, 1), (2, 3))]
    assert torch.equal(whole, torch.cat(halves))
    others = [Draws(6).normal("noise", 7, [0], (2, 3)), draws.normal("noise", 8, [0], (2, 3))]
    others += [draws.normal("other", 7, [0], (2, 3)), draws.normal("noise", 7, [9], (2, 3))]
    assert all(not torch.equal(whole[:1], other) for other in others)
    many = draws.normal("noise", 0, range(2000), (8,))
    assert abs(many.mean()) < 0.03 and abs(many.std() - 1) < 0.03  # 16,000 draws: 4 standard errors
    assert sorted(set(draws.integers("n", 0, 4, range(200)))) == [0, 1, 2, 3]


# ---- configuration -----------------------------------------------------------------------------------------
YAML = """
stage: distill
model: {dim: 32, ffn_dim: 64, num_heads: 2, num_layers: 2, in_dim: 8, out_dim: 8}
optimizer: {lr: 1e-4, betas: [0, 0.99]}
stream: {denoising_step_list: [1000, 500]}
distill: {objective: dmd, critic: {lr: 3e-4}}
"""


def test_a_file_becomes_a_configuration(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    config = load(path)
    assert config.optimizer == OptimizerConfig(lr=1e-4, betas=(0.0, 0.99))  # YAML itself reads 1e-4 as text
    assert config.stream.denoising_step_list == (1000, 500) and config.distill.critic.lr == 3e-4


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("lr: 1e-4", "learning_rate: 1e-4", "optimizer.learning_rate.*nearest"),
        ("stage: distill", "stage: distil", "stage"),
        ("stage: distill", "", "stage.*expected a value"),
        ("lr: 1e-4", "lr: fast", "optimizer.lr.*float"),
        ("lr: 1e-4", "lr: 0", "lr.*above 0"),
        ("[0, 0.99]", "[0.9]", "optimizer.betas.*2 values"),
        ("num_layers: 2", "num_layers: 2.5", "model.num_layers.*int"),
        ("objective: dmd", "objective: gan", "objective"),
        ("stream: {", "stream: [", "YAML"),
    ],
)
def test_a_wrong_file_is_refused_by_key(tmp_path, old, new, text):
    path = tmp_path / "run.yaml"
    path.write_text(YAML.replace(old, new, 1))
    with pytest.raises(rf.ArgumentError, match=text):
        load(path)


def test_nearest_key_is_named():
    with pytest.raises(rf.ArgumentError, match="text_dropout"):
        build(TrainConfig, {"stage": "teacher", "model": {}, "text_drop": 0.1}, "")


def test_the_published_file_is_accepted_as_it_is(tmp_path):
    """Its keys and values as published (names of machines and prompts apart)."""
    path = tmp_path / "reward_forcing.yaml"
    path.write_text(PUBLISHED)
    config = load(path)
    assert (config.stage, config.distill.objective, config.distill.beta) == ("distill", "re_dmd", 2.0)
    assert config.model == ModelConfig.wan_1_3b() and config.frames == 21
    assert config.teacher_model == ModelConfig.wan_14b() and config.checkpointing
    assert config.compute == "bfloat16"
    assert (config.optimizer.lr, config.optimizer.betas) == (
        2e-6,
        (0.0, 0.999),
    ) and config.distill.critic.lr == 4e-7
    stream = config.stream
    assert (stream.chunk_frames, stream.sink_frames, stream.local_attn_size, stream.shift) == (3, 3, 9, 5.0)
    assert (config.accumulate, config.distill.critic_steps, config.steps) == (8, 5, 601)
    assert config.distill.real_guidance == 3.0 and stream.warp and config.ema == 0.99
    assert (
        stream.denoising_step_list == (1000, 750, 500, 250) and config.generator == "checkpoints/ode_init.pt"
    )
    assert (config.teacher, config.critic) == ("checkpoints/Wan2.1-T2V-14B", "checkpoints/Wan2.1-T2V-1.3B")
    assert config.reward == RewardConfig(
        "videoalign", "checkpoints/VideoReward", "checkpoints/Qwen2-VL-2B-Instruct"
    )
    assert config.wan == WanConfig("checkpoints/Wan2.1-T2V-1.3B-Diffusers", (60, 104), "静态")
    assert config.prompts == "prompts/vidprom_filtered_extended.txt"


def test_values_are_laid_over_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    changes = ["batch=8", "distill.critic.lr=1e-5", "optimizer.betas=[0.5, 0.9]"]
    changes += ["teacher_model.dim=64", "teacher_model.ffn_dim=64", "teacher_model.num_heads=2"]
    config = load(path, [*changes, "teacher_model.num_layers=1"])
    assert (config.batch, config.distill.critic.lr, config.optimizer.betas) == (8, 1e-5, (0.5, 0.9))
    assert config.teacher_model.dim == 64 and config.distill.objective == "dmd"
    for change, text in (
        ("bach=8", "bach.*nearest: batch"),
        ("optimizer.lr.x=1", "a key of a group"),
        ("distill.critic.rate=1", "distill.critic.rate.*nearest"),
        ("batch", "key=value"),
        ("batch=[", "a value in YAML"),
        ("reward.name=flow", "one of"),
        ("reward.name=videoalign", "checkpoint.*a folder"),
    ):
        with pytest.raises(rf.ArgumentError, match=text):
            load(path, [change])


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("beta: 2.0", "betta: 2.0", "betta.*nearest: beta"),
        ("rewardeddmd", "gan", "distribution_loss"),
        ("denoising_loss_type: flow", "denoising_loss_type: x0", "denoising_loss_type.*'flow'"),
        ("fake_name: Wan2.1-T2V-1.3B", "fake_name: Wan2.1-T2V-14B", "fake_name"),
    ],
)
def test_the_published_file_is_refused_by_key(tmp_path, old, new, text):
    path = tmp_path / "reward_forcing.yaml"
    path.write_text(PUBLISHED.replace(old, new, 1))
    with pytest.raises(rf.ArgumentError, match=text):
        load(path)


# ---- the optimizer step ------------------------------------------------------------------------------------
def _matching(config, seed=0):
    torch.manual_seed(seed)
    model = BidirectionalWanModel(config.model)
    draws = Draws(config.seed)
    from reward_forcing.trainer.data import WorldSource

    return model, FlowMatching(config, model, WorldSource(draws), draws)


def _micro(matching, samples):
    def run():
        loss = matching.loss(0, samples)
        loss.backward()
        return loss

    return run


def test_accumulation_is_one_large_batch():
    """Loss, norm, and every parameter's gradient as AdamW gets it: clipped once."""
    results = []
    for parts in ([[0, 1, 2, 3]], [[0], [1], [2], [3]]):
        model, matching = _matching(TEACHER)
        stepper = Stepper(model, OptimizerConfig(lr=1e-3, clip=0.1), 10)
        report = stepper(_micro(matching, part) for part in parts)
        moments = {name: stepper.optimizer.state[p]["exp_avg"] for name, p in model.named_parameters()}
        results.append((report.loss, report.grad_norm, moments))
    (loss, norm, one), (loss4, norm4, four) = results
    assert loss4 == pytest.approx(loss, rel=1e-6) and norm4 == pytest.approx(norm, rel=1e-6)
    assert norm > 0.1  # the clip acts
    for name in one:  # float32: a key's bias has a gradient of rounding alone, 1e-4 of the others
        assert (four[name] - one[name]).norm() <= 1e-5 * one[name].norm(), name
    together = [torch.cat([t.flatten() for t in moments.values()]) for moments in (one, four)]
    assert (together[1] - together[0]).norm() <= 1e-6 * together[0].norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    model, matching = _matching(TEACHER)
    trained = Trained(model, OptimizerConfig(), 10, average=0.9)
    trained.step([_micro(matching, [0])])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    average = {name: t.clone() for name, t in trained.average.weights.items()}

    def poisoned():
        loss = matching.loss(0, [0]) * bad
        loss.backward()
        return loss

    for _ in range(2):
        assert not trained.step([_micro(matching, [0]), poisoned]).applied
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(torch.equal(average[name], t) for name, t in trained.average.weights.items())
    assert trained.stepper.skipped == 2 and trained.step([_micro(matching, [0])]).applied
    for _ in range(2):
        trained.step([poisoned])
    with pytest.raises(StoppedOnNonFinite, match="third in a row"):
        trained.step([poisoned])


def test_learning_rate_schedule():
    config = OptimizerConfig(lr=1.0, warmup=4, schedule="cosine")
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[0] < rates[1] < rates[3] and rates[100] == pytest.approx(0.03) and max(rates) <= 1
    assert learning_rate(OptimizerConfig(lr=2.0), 50, 100) == 2.0


def test_timesteps_of_a_range_are_drawn_as_those_of_all():
    """Uniform before the shift, between the ends; the whole range is the integers themselves."""
    draws, shift = Draws(0), 3.3
    whole = timesteps(draws, "t", 0, range(400), shift=shift, min_step=0, max_step=1000)
    n = torch.tensor(draws.integers("t", 0, 1000, range(400)))
    assert torch.equal(whole, warp_timesteps(n, shift=shift, min_step=0, max_step=1000))
    part = timesteps(draws, "t", 0, range(400), shift=shift, low=400.0, high=800.0)
    assert 400 <= part.min() < 410 and 790 < part.max() < 800
    before = part / (shift - (shift - 1) * part / 1000)  # the shift, taken back
    ends = [t / (shift - (shift - 1) * t / 1000) for t in (400.0, 800.0)]
    torch.testing.assert_close(before, ends[0] + (ends[1] - ends[0]) * n / 1000, rtol=1e-5, atol=1e-3)


# ---- rollouts ----------------------------------------------------------------------------------------------
def _rollout(policy, dtype=torch.float64, frames=21, stream=STREAM, seed=0):
    torch.manual_seed(seed)
    model = CausalWanModel(TINY).to(dtype)
    for p in model.parameters():  # a fresh head would make every gradient but its own vanish
        torch.nn.init.normal_(p, std=0.15)
    stream = replace(stream, sink_policy=policy, sink_frames=0 if policy == "none" else stream.sink_frames)
    rollout = Rollout(StreamingPipeline(model, stream))
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, frames, 4, 4, 4, generator=generator).to(dtype)
    context = torch.randn(2, 3, 8, generator=generator).to(dtype)

    def source(purpose, chunk, like):
        return torch.randn(like.shape, generator=generator).to(like)

    exits = torch.randint(4, (frames // 3,), generator=generator).tolist()
    return rollout, rollout.generate(noise, context, exits, source), context


def _gradients(model, run):
    model.zero_grad(set_to_none=True)
    run()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("policy", ["none", "static", "ema"])
def test_replay_is_the_graph(policy):
    """21 frames through a window of 9: chunks leave it from the fourth on."""
    rollout, tape, context = _rollout(policy)
    grad = torch.randn(tape.x.shape, generator=torch.Generator().manual_seed(2), dtype=tape.x.dtype)
    replayed = _gradients(rollout.model, lambda: rollout.replay(tape, context, grad))
    outputs = []

    def one_graph():
        outputs.append(rollout.graph(tape, context))
        outputs[0].backward(grad)

    graph = _gradients(rollout.model, one_graph)
    assert torch.allclose(outputs[0], tape.x, rtol=0, atol=1e-13)
    assert replayed.keys() == graph.keys() == dict(rollout.model.named_parameters()).keys()
    for name in graph:
        error = (replayed[name] - graph[name]).norm() / graph[name].norm().clamp_min(1e-30)
        assert error <= 1e-12, (name, float(error))


@pytest.mark.parametrize("policy", ["static", "ema"])
def test_a_rollout_revisited_answers_its_own_noised_clips(policy):
    """Given the same past, past evictions too: what enters is the finished chunk at its exit step's noise."""
    rollout, tape, context = _rollout(policy)
    noise = torch.randn(tape.x.shape, generator=torch.Generator().manual_seed(3), dtype=tape.x.dtype)
    again = rollout.revisit(tape, context, noise)
    for before, after, part in zip(tape.entries, again.entries, noise.split(3, dim=1), strict=True):
        t = torch.full((2,), rollout.pipeline.timesteps[before.exit_step])
        assert torch.equal(after.z, rollout.pipeline.scheduler.add_noise(before.x0, part, t))
        assert torch.equal(after.context, before.context) and after.exit_step == before.exit_step
    with torch.no_grad():
        torch.testing.assert_close(again.x, rollout.graph(again, context), rtol=0, atol=1e-13)
    assert not torch.allclose(again.x, tape.x)


def test_gradient_of_the_last_chunks_alone():
    rollout, tape, context = _rollout("ema", frames=12)
    grad = torch.ones_like(tape.x)
    last = _gradients(rollout.model, lambda: rollout.replay(tape, context, grad, chunks=[3]))
    masked = grad.clone()
    masked[:, :9] = 0
    whole = _gradients(rollout.model, lambda: rollout.replay(tape, context, masked))
    assert all(torch.allclose(last[n], whole[n], rtol=1e-12, atol=1e-14) for n in last)
    assert not torch.allclose(
        last["head.head.weight"],
        _gradients(rollout.model, lambda: rollout.replay(tape, context, grad))["head.head.weight"],
    )


def test_memory_for_backward_does_not_grow_with_the_rollout():
    peaks = {}
    for frames in (9, 84):
        rollout, tape, context = _rollout("ema", torch.float32, frames)
        alive = peak = 0

        class Saved:
            def __init__(self, tensor):
                nonlocal alive, peak
                self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
                alive += self.bytes
                peak = max(peak, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.bytes

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            rollout.replay(tape, context, torch.ones_like(tape.x))
        peaks[frames] = peak
    assert peaks[84] == pytest.approx(peaks[9], rel=0.02) and peaks[9] > 0


# ---- runs --------------------------------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize(
    "config",
    [TEACHER, CAUSAL, ODE, DISTILL]
    + [replace(DISTILL, distill=DistillConfig("f_distill", {"ema": 0.5}, critic_steps=2, shift=2.0))],
    ids=["teacher", "causal", "ode", "distill", "f_distill"],
)
def test_a_resumed_run_is_the_run(config, tmp_path):
    """Interrupted at an odd step, amid the alternation: weights, averages and log, bit for bit. The last has
    a discriminator, and averages of its ratios."""
    whole = load_file(train(config, tmp_path / "whole"))

    class Interrupted(Exception):
        pass

    def stop(step, line):
        if step == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(replace(config, save_every=1), tmp_path / "parts", on_step=stop)
    assert (tmp_path / "parts" / "step-00000001").is_dir()
    parts = load_file(train(replace(config, save_every=1), tmp_path / "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logs = [
        [json.loads(line) for line in (tmp_path / run / "log.jsonl").open()] for run in ("whole", "parts")
    ]
    for line in logs[0] + logs[1]:
        line.pop("seconds")
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == list(range(1, config.steps + 1))


@pytest.mark.parametrize("config", [TEACHER, CAUSAL, ODE, DISTILL], ids=lambda config: config.stage)
def test_activation_checkpointing_changes_no_bit(config, tmp_path):
    """Of weights, losses and norms of gradients; in replay the cache evicts, and the recomputation reads what
    the forward read. What it is for is shown too: less is kept for backward."""
    config = replace(config, steps=2, frames=12 if config.stage == "distill" else config.frames)
    runs = {}
    for on in (False, True):
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            weights = train(replace(config, checkpointing=on), tmp_path / str(on))
        lines = [json.loads(line) | {"seconds": 0} for line in (tmp_path / str(on) / "log.jsonl").open()]
        runs[on] = load_file(weights), lines, kept
    assert all(torch.equal(runs[True][0][name], t) for name, t in runs[False][0].items())
    assert runs[True][1] == runs[False][1] and runs[True][2] < 0.5 * runs[False][2]


@pytest.mark.parametrize("config", [CAUSAL, DISTILL], ids=lambda config: config.stage)
def test_bfloat16_computes_and_float32_is_kept(config, tmp_path, monkeypatch):
    """Mixed precision is FSDP2's, here over one rank: matrix products and the cache in bfloat16, parameters
    and moments in float32, and the gradient that of float32 to bfloat16's accuracy."""
    config = replace(config, steps=1, distill=replace(config.distill, objective="dmd", critic_steps=1))
    path = tmp_path / "start.safetensors"
    torch.manual_seed(0)
    save_file(BidirectionalWanModel(WORLD).state_dict(), path)
    config = replace(config, generator=str(path), teacher=str(path))
    with pytest.raises(rf.ArgumentError, match="config.compute"):
        train(replace(config, compute="bfloat16"), tmp_path / "none")
    dtypes, attend = set(), rf.sink_window_attention
    moments = {}
    for compute in ("float32", "bfloat16"):
        stages = []

        class Kept(Trained):
            def __init__(self, *arguments, stages=stages):
                super().__init__(*arguments)
                stages.append(self)

        monkeypatch.setattr(loop, "Trained", Kept)
        monkeypatch.setattr(
            rf, "sink_window_attention", lambda q, *a, **k: (dtypes.add(q.dtype), attend(q, *a, **k))[1]
        )
        with process_group(alone=True):
            train(replace(config, compute=compute), tmp_path / compute)
            state = [s for kept in stages for s in kept.stepper.optimizer.state.values()]
            moments[compute] = [local(values["exp_avg"]).clone() for values in state]
            kept_in = {p.dtype for kept in stages for p in kept.model.parameters()}
        assert kept_in == {torch.float32} == {moment.dtype for moment in moments[compute]}
    assert dtypes == {torch.float32, torch.bfloat16}
    one, half = (torch.cat([m.flatten() for m in moments[c]]) for c in ("float32", "bfloat16"))
    assert 1e-5 < (half - one).norm() / one.norm() < 0.05


def test_training_lowers_the_loss(tmp_path):
    config = replace(TEACHER, steps=60, batch=8, optimizer=OptimizerConfig(lr=3e-3, warmup=5))
    train(config, tmp_path)
    losses = [json.loads(line)["teacher_loss"] for line in (tmp_path / "log.jsonl").open()]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize("objective", ["dmd", "re_dmd", "sid"])
def test_every_objective_trains_a_step(objective, tmp_path):
    config = replace(DISTILL, steps=1, distill=replace(DISTILL.distill, objective=objective))
    if objective == "re_dmd":
        pytest.importorskip("cv2")
    train(config, tmp_path)
    (line,) = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert (
        line["generator_grad_norm"] > 0 and line["critic_grad_norm"] > 0 and "generator_skipped" not in line
    )


def test_the_command_line_trains_and_refuses_in_one_line(tmp_path, capsys):
    from reward_forcing.cli import main

    path = tmp_path / "run.yaml"
    path.write_text(
        YAML.replace("stage: distill", "stage: teacher").replace("{dim", "{text_dim: 32, text_len: 3, dim")
        + "steps: 1\nbatch: 1\n"
    )
    assert main(["train", "--config", str(path), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "teacher.safetensors")
    path.write_text(YAML.replace("stage: distill", "stage: teacher") + "stepps: 1\n")
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(path), "--out", str(tmp_path / "other")])
    assert ended.value.code == 2 and "nearest: steps" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
