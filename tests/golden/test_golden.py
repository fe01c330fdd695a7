"""The library's own path (ops, cache, models, pipeline, losses) passes every golden case.

Where a case documents a bug of the published code, a plain float64 recomputation of the library's rule takes
the place of the recorded numbers, under the same tolerance (docs/compatibility.md says what the rule is).
Runs on any golden set (``RF_GOLDEN_DIR``): cases by kind, sizes from their hyper-parameters, bounds from
their tolerance texts.
"""

import dataclasses
import re

import pytest
import torch
from torch import Tensor

import rf_kernels as rf
from helpers.golden_cases import Case, as_dtype, check_scheduler_case, kinds, parametrize, relative_l2
from helpers.golden_streams import (
    Call,
    Geometry,
    ReferenceStream,
    check_against_raw_cache,
    check_against_reference,
    raw_sink,
    recorded_calls,
    total_frames,
)
from reward_forcing import (
    BidirectionalWanModel,
    CausalWanModel,
    FlowMatchScheduler,
    ModelConfig,
    StreamingPipeline,
)
from reward_forcing.losses import critic_flow_loss, dmd_loss, re_dmd_loss, sid_loss, warp_timesteps
from reward_forcing.models.blocks import CausalSelfAttention

pytestmark = pytest.mark.usefixtures("one_thread")

#: Kinds whose library path is tested here; the training rollout's is in test_training_rollout.py.
KINDS = {
    "ema_self_attention_stream",
    "causal_wan_model_stream",
    "causal_inference_pipeline",
    "scheduler",
    "re_dmd",
    "vanilla_dmd",
    "critic_flow",
    "sid",
    "rope",
    "bidirectional_wan_model",
}

every_dtype = pytest.mark.parametrize("dtype", ["float64", "float32", "bf16"])
#: A bf16 stream keeps its sink's state as the library does, and as the published code does.
every_state = pytest.mark.parametrize(
    "dtype, state",
    [("float64", "compensated"), ("float32", "compensated"), ("bf16", "compensated"), ("bf16", "published")],
)


def need(case: Case, *names: str) -> None:
    """Skip where a set has not recorded what a variant of a test compares with."""
    missing = [name for name in names if name not in case.tensors]
    if missing and not case.documents_bug:
        pytest.skip(f"the case has no {', '.join(missing)}")


def test_no_kind_is_left_out():
    assert kinds() <= KINDS | {"training_rollout"}


@pytest.fixture
def reference_attention(monkeypatch):
    """Call it to have ``CausalWanModel`` attend by ``StreamingReference.self_attention`` instead of the ops
    from then on."""

    def forward(self, x, layer, chunk):
        return chunk.layers[layer].self_attention(x, dict(self.named_parameters()), self.heads, self.eps)

    def use():
        monkeypatch.setattr(CausalSelfAttention, "forward", forward)

    return use


# ---- A: self-attention
# -----------------------------------------------------------------------------------------------------------


@parametrize("ema_self_attention_stream")
@every_state
@torch.no_grad()
def test_self_attention_stream(case, dtype, state):
    need(case, "bf16.out" if dtype == "bf16" else "out_f64")
    run_dtype, hyper, tensors = as_dtype(dtype), case.hyper, dict(case.tensors)
    n = hyper["frame_seqlen"]
    lengths = tensors.get(
        "call_len", torch.full_like(tensors["call_chunk"], hyper["tokens_per_call"])
    ).tolist()
    calls = list(recorded_calls(case, [length // n for length in lengths]))
    geometry = Geometry.of(case, hyper["cache_capacity_tokens"], total_frames(calls))

    config = ModelConfig(
        dim=hyper["dim"], ffn_dim=hyper["dim"], num_heads=hyper["num_heads"], num_layers=1, eps=hyper["eps"]
    )
    layer = CausalSelfAttention(config).to(run_dtype)
    layer.load_state_dict(case.weights(), strict=True)
    spec = rf.CacheSpec(
        layers=1,
        batch=hyper["batch"],
        heads=hyper["num_heads"],
        head_dim=hyper["head_dim"],
        grid=geometry.grid,
        sink_frames=geometry.sink_frames,
        window_frames=geometry.window_frames,
        rope=config.rope,
        dtype=run_dtype,
        device="cpu",
    )
    cache = rf.SinkWindowCache(spec, sink=geometry.sink_policy(state))
    reference = geometry.reference()
    weights = dict(case.weights())

    outputs, expected = [], []
    recorded_k, recorded_v = tensors.get("cache_k"), tensors.get("cache_v")
    for call in calls:
        if call.opens:
            chunk = cache.open(call.frames)
            reference.begin(call.frames)
        length = call.frames * n
        x, pad = tensors["x"][call.index, :, :length], (0, 0, 0, tensors["x"].shape[2] - length)
        outputs.append(torch.nn.functional.pad(layer(x.to(run_dtype), 0, chunk), pad))
        y = reference.self_attention(x, weights, hyper["num_heads"], hyper["eps"])
        expected.append(torch.nn.functional.pad(y, pad))
        if not call.closes:
            continue
        chunk.commit()
        label, bound = f"after call {call.index}", case.tolerance(dtype, "caches")
        if case.documents_bug:
            # that one loses the average to rounding, on purpose
            exact_state = (dtype, state) != ("bf16", "published")
            check_against_reference(bound, cache, 0, reference, label, sink_state=exact_state)
        elif dtype != "bf16" and recorded_k is not None:
            check_against_raw_cache(bound, cache, 0, recorded_k[call.index], recorded_v[call.index], label)

    outputs, expected = torch.stack(outputs), torch.stack(expected)
    bound = case.tolerance(dtype, "out")
    if case.documents_bug:
        bound.check(outputs, expected, "out of our rule")
        return
    if dtype == "float64":
        bound.check(expected, tensors["out_f64"], "the reference itself")
    bound.check(outputs, tensors["bf16.out" if dtype == "bf16" else "out_f64"], "out")
    names = ("bf16.final_cache_k", "bf16.final_cache_v")
    final_k, final_v = (
        tensors[name] for name in (names if dtype == "bf16" else ("final_cache_k_f64", "final_cache_v_f64"))
    )
    # The recorded bf16 sink is frozen by its rounding: only the published state does the same.
    compare_sink = dtype != "bf16" or state == "published"
    bound = case.tolerance(dtype, "caches")
    check_against_raw_cache(bound, cache, 0, final_k, final_v, "at the end", sink_state=compare_sink)
    if dtype == "bf16" and geometry.policy == "ema":
        check_bf16_sink(cache, state, geometry.sink_frames * n, tensors)


def check_bf16_sink(
    cache: rf.SinkWindowCache, state: str, num_sink_tokens: int, tensors: dict[str, Tensor]
) -> None:
    """The published state rounds, and so freezes, as recorded; the compensated one stays nearer to the exact
    average than that.

    Values: keys are rounded after their rotation here and before it there.
    """
    ours = cache.sink_state(0)[1]
    exact = tensors["final_cache_v_f64"][:, :num_sink_tokens]
    frozen = tensors["bf16.final_cache_v"][:, :num_sink_tokens]
    if state == "published":
        assert relative_l2(ours, frozen) <= relative_l2(exact, frozen) / 4
    else:
        assert relative_l2(ours, exact) <= relative_l2(frozen, exact)


# ---- B: causal model
# ------------------------------------------------------------------------------------------------------------


def load(model: torch.nn.Module, case: Case, dtype: torch.dtype) -> torch.nn.Module:
    model.load_state_dict(case.weights(), strict=True)
    return model.to(dtype).requires_grad_(False)


def run_model_stream(case: Case, model: CausalWanModel, cache, calls: list[Call], after_chunk) -> Tensor:
    """All calls of a recorded model stream; ``after_chunk(index)`` runs after each commit."""
    tensors = case.tensors
    latent, timestep = tensors["latent"].to(model.dtype), tensors["timestep"]
    text = model.text_keys(tensors["context"].to(model.dtype))
    outputs, committed = [], 0
    for call in calls:
        if call.opens:
            chunk = cache.open(call.frames)
        outputs.append(model(latent[call.index], timestep[call.index], text, chunk))
        if call.closes:
            chunk.commit()
            after_chunk(committed)
            committed += 1
    return torch.stack(outputs)


@parametrize("causal_wan_model_stream")
@every_state
@torch.no_grad()
def test_causal_model_stream(case, dtype, state, reference_attention):
    need(case, "bf16.out" if dtype == "bf16" else "out_f64")
    run_dtype, hyper, tensors = as_dtype(dtype), case.hyper, dict(case.tensors)
    frames = tensors["latent"].shape[3]
    calls = list(recorded_calls(case, [frames] * len(tensors["latent"])))
    geometry = Geometry.of(case, tensors["final_cache_k"].shape[2], total_frames(calls))
    model = load(CausalWanModel(ModelConfig.from_dict(hyper)), case, run_dtype)
    spec = model.cache_spec(
        *tensors["latent"].shape[4:],
        batch=hyper["batch"],
        sink_frames=geometry.sink_frames,
        window_frames=geometry.window_frames,
    )
    cache = rf.SinkWindowCache(spec, sink=geometry.sink_policy(state))
    bound, prefix = case.tolerance(dtype, "caches"), "bf16." if dtype == "bf16" else ""
    compared = not case.documents_bug and (dtype != "bf16" or state == "published")

    def after_chunk(chunk):
        for layer in range(cache.spec.layers) if compared and geometry.sink_frames else ():
            for ours, name in zip(raw_sink(cache, layer), ("sink_k", "sink_v"), strict=True):
                golden = tensors[prefix + name][chunk, layer]
                bound.check(
                    ours, golden[:, : ours.shape[1]], f"{prefix}{name} of layer {layer} after chunk {chunk}"
                )

    outputs = run_model_stream(case, model, cache, calls, after_chunk)
    if case.documents_bug:
        reference_attention()
        exact = load(CausalWanModel(ModelConfig.from_dict(hyper)), case, torch.float64)
        stream = ReferenceStream(geometry, len(model.blocks), hyper["batch"])
        case.tolerance(dtype, "out").check(
            outputs, run_model_stream(case, exact, stream, calls, lambda chunk: None)
        )
        return
    for golden in {"float64": ["out_f64"], "float32": ["out_f64", "out_f32"], "bf16": ["bf16.out"]}[dtype]:
        case.check(dtype, "out", outputs, golden)
    if dtype == "bf16":
        return
    for layer in range(cache.spec.layers):
        golden_k, golden_v = tensors["final_cache_k"][layer], tensors["final_cache_v"][layer]
        check_against_raw_cache(bound, cache, layer, golden_k, golden_v, f"layer {layer} at the end")
    for ours, name in zip(
        zip(*model.text_keys(tensors["context"].to(run_dtype)), strict=True), ("k", "v"), strict=True
    ):
        case.check(dtype, "caches", torch.stack(ours), f"cross_{name}")


# ---- C: few-step rollout
# ---------------------------------------------------------------------------------------------------------


class SavedDraws:
    """A noise source that hands out the saved draws, in order."""

    def __init__(self, case: Case):
        tensors = case.tensors
        self.draws = [
            noise[:, :frames]
            for noise, frames in zip(tensors["renoise"], tensors["renoise_frames"].tolist(), strict=True)
        ]

    def __call__(self, like: Tensor) -> Tensor:
        return self.draws.pop(0).to(like.dtype)


def roll_out(case: Case, pipeline: StreamingPipeline, cache, observe=None) -> Tensor:
    """The case's clip through the pipeline; every saved draw must be consumed."""
    tensors, dtype, draws = case.tensors, pipeline.model.dtype, SavedDraws(case)
    prefix = tensors["initial_latent"].to(dtype) if "initial_latent" in tensors else None
    noise, context = tensors["noise"].to(dtype), tensors["context"].to(dtype)
    latents = pipeline.rollout(
        noise, context, initial_latent=prefix, cache=cache, noise_source=draws, on_phase=observe
    )
    assert not draws.draws
    return latents


@parametrize("causal_inference_pipeline")
@every_state
def test_streaming_pipeline(case, dtype, state, reference_attention):
    need(case, "bf16.latents" if dtype == "bf16" else "latents_f64")
    run_dtype, hyper, tensors = as_dtype(dtype), case.hyper, dict(case.tensors)
    capacity = tensors["final_cache_k"].shape[2]
    geometry = Geometry.of(case, capacity, hyper["prefix_frames"] + hyper["noise_frames"])
    config = geometry.stream_config(hyper, state)
    model = load(CausalWanModel(ModelConfig.from_dict(hyper)), case, run_dtype)
    pipeline = StreamingPipeline(model, config)
    assert pipeline.timesteps == tensors["warped_steps"].float().tolist()
    cache, phases = pipeline.new_cache(hyper["batch"], *tensors["noise"].shape[3:]), []
    latents = roll_out(case, pipeline, cache, phases.append)
    forwards = [phase for phase in phases if phase.name != "renoise"]
    assert len(forwards) == case.stats["generator_calls"]

    if case.documents_bug:
        reference_attention()
        exact = StreamingPipeline(
            load(CausalWanModel(ModelConfig.from_dict(hyper)), case, torch.float64), config
        )
        stream = ReferenceStream(geometry, len(model.blocks), hyper["batch"])
        case.tolerance(dtype, "latents").check(latents, roll_out(case, exact, stream), "latents of our rule")
        bound, exact_state = case.tolerance(dtype, "caches"), (dtype, state) != ("bf16", "published")
        for layer in range(cache.spec.layers):
            check_against_reference(
                bound, cache, layer, stream.layers[layer], f"layer {layer}", sink_state=exact_state
            )
        return
    goldens = {
        "float64": ["latents_f64"],
        "float32": ["latents_f64", "latents_f32"],
        "bf16": ["bf16.latents"],
    }[dtype]
    for golden in goldens:
        case.check(dtype, "latents", latents, golden)
    bound = case.tolerance(dtype, "caches")
    for layer in range(cache.spec.layers) if dtype != "bf16" else ():
        golden_k, golden_v = tensors["final_cache_k"][layer], tensors["final_cache_v"][layer]
        check_against_raw_cache(bound, cache, layer, golden_k, golden_v, f"layer {layer} at the end")


@parametrize("causal_inference_pipeline")
@torch.no_grad()
def test_every_forward_of_a_rollout(case, monkeypatch):
    """Input, timestep, flow and position of every forward, where the case traced them."""
    tensors = dict(case.tensors)
    if "trace_frames" not in tensors:
        pytest.skip("the case has no trace")
    elif case.documents_bug:
        pytest.skip("the trace is of the published rule")
    hyper = case.hyper
    geometry = Geometry.of(
        case, tensors["final_cache_k"].shape[2], hyper["prefix_frames"] + hyper["noise_frames"]
    )
    model = load(CausalWanModel(ModelConfig.from_dict(hyper)), case, torch.float64)
    trace, forward = [], CausalWanModel.forward

    def traced(self, x, t, text, chunk):
        flow = forward(self, x, t, text, chunk)
        trace.append((x.transpose(1, 2), t, flow.transpose(1, 2), chunk.first_frame))
        return flow

    monkeypatch.setattr(CausalWanModel, "forward", traced)
    pipeline = StreamingPipeline(model, geometry.stream_config(hyper, "compensated"))
    roll_out(case, pipeline, None)

    bound = case.tolerance("float64", "trace")
    assert [first * hyper["frame_seqlen"] for *_, first in trace] == tensors["trace_current_start"].tolist()
    assert [x.shape[1] for x, *_ in trace] == tensors["trace_frames"].tolist()
    for i, (x, t, flow, _) in enumerate(trace):
        frames = x.shape[1]
        assert torch.equal(t.double().expand(-1, frames), tensors["trace_timestep"][i, :, :frames])
        bound.check(x, tensors["trace_input"][i, :, :frames], f"input of forward {i}")
        bound.check(flow, tensors["trace_flow"][i, :, :frames], f"flow of forward {i}")
        x0 = pipeline.scheduler.x0_from_flow(flow, x, t)
        bound.check(x0, tensors["trace_x0"][i, :, :frames], f"x0 of forward {i}")


# ---- D: scheduler
# ------------------------------------------------------------------------------------------------------------


@parametrize("scheduler")
def test_scheduler(case):
    for prefix in sorted({name.rsplit(".", 1)[0] for name in case.tensors}):
        check_scheduler(case, prefix, case.tensors.below(f"{prefix}."))


def check_scheduler(case: Case, prefix: str, golden: dict[str, Tensor]) -> None:
    shift = float(prefix.removeprefix("shift"))
    scheduler = FlowMatchScheduler(
        shift, **{name: value for name, value in case.hyper.items() if name != "shift"}
    )
    warped_steps = torch.tensor(scheduler.warp(golden["step_list"].tolist()))
    train_t_warped = warp_timesteps(golden["train_t_int"], shift=shift)
    check_scheduler_case(case, prefix, golden, scheduler, warped_steps, train_t_warped)


# ---- E, F: losses
# ------------------------------------------------------------------------------------------------------------


class Scorers:
    """Inputs of a loss case and its stub scorers: saved predictions, or ``a * x_t + prediction``."""

    def __init__(self, case: Case):
        self.case, self.tensors, hyper = case, dict(case.tensors), case.hyper
        self.dtype = as_dtype(hyper.get("dtype", "float32"))
        self.scheduler = FlowMatchScheduler(hyper["timestep_shift"])
        limits = {"min_step": "min_step", "max_step": "max_step", "num_train_timesteps": "num_train_timestep"}
        limits = {ours: hyper[theirs] for ours, theirs in limits.items() if theirs in hyper}
        self.t = warp_timesteps(self.tensors["t_int"].squeeze(1), shift=hyper["timestep_shift"], **limits)
        case.check("float32", "t", self.t[:, None].expand_as(self.tensors["t"]), "t")
        self.noise = self.tensors["noise"].to(self.dtype)

    def scorer(self, name: str):
        """The stub of one prediction, None if the case has none. Checks the noisy sample it is given."""
        if f"pred_{name}" not in self.tensors:
            return None

        def predict(x_t, t):
            self.case.check(self.dtype, "xt", x_t, "xt")
            saved = self.tensors[f"pred_{name}"].to(self.dtype)
            return (
                self.tensors[f"a_{name}"].to(self.dtype) * x_t + saved
                if f"a_{name}" in self.tensors
                else saved
            )

        return predict

    def dmd_arguments(self) -> dict:
        hyper = self.case.hyper
        return {
            "fake": self.scorer("fake_cond"),
            "fake_uncond": self.scorer("fake_uncond"),
            "real": self.scorer("real_cond"),
            "real_uncond": self.scorer("real_uncond"),
            "noise": self.noise,
            "t": self.t,
            "scheduler": self.scheduler,
            "real_guidance": hyper["real_guidance_scale"],
            "fake_guidance": hyper["fake_guidance_scale"],
        }


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x)[0]


def our_dmd_in_float64(case: Case, scorers: Scorers) -> dict[str, Tensor]:
    """The library's default rule, plainly: as published, but a sample with a zero or non-finite normaliser,
    or a non-finite element of d, has gradient 0.
    """
    tensors, hyper = scorers.tensors, case.hyper

    def guided(side):
        conditional, scale = tensors[f"pred_{side}_cond"].double(), hyper[f"{side}_guidance_scale"]
        return (
            conditional + scale * (conditional - tensors[f"pred_{side}_uncond"].double())
            if scale
            else conditional
        )

    x, fake, real = tensors["x"].double(), guided("fake"), guided("real")
    normalizer = (x - real).abs().flatten(1).mean(1).reshape(-1, *(1,) * (x.dim() - 1))
    d = (fake - real) / normalizer
    usable = torch.isfinite(d).flatten(1).all(1) & (normalizer.flatten() > 0)
    d = torch.where(usable.reshape(normalizer.shape), d, 0.0)
    mask = tensors["mask"].double() if "mask" in tensors else torch.ones_like(x)
    weight = torch.exp(hyper["beta"] * tensors["MQ"].double()) if "MQ" in tensors else torch.ones(())
    return {
        "loss": weight.squeeze() * (mask * d.square()).sum() / (2 * mask.sum()),
        "dx": weight.squeeze() * mask * d / mask.sum(),
    }


@parametrize("re_dmd", "vanilla_dmd")
@pytest.mark.parametrize("nan", ["published", "sample"])
def test_dmd(case, nan):
    """Under the published rule for NaN and infinity every case is reproduced; the default rule is compared
    with its own formula.
    """
    scorers, tensors = Scorers(case), dict(case.tensors)
    x, mask = tensors["x"].to(scorers.dtype).requires_grad_(), tensors.get("mask")
    arguments = {**scorers.dmd_arguments(), "mask": None if mask is None else mask.bool()}
    arguments["options"] = rf.DMDOptions(nan=nan)
    if case.kind == "re_dmd":
        loss = re_dmd_loss(x, reward=tensors["MQ"].to(scorers.dtype), beta=case.hyper["beta"], **arguments)
    else:
        loss = dmd_loss(x, **arguments)
    dx = gradient(loss, x)
    assert dx.dtype == x.dtype and loss.shape == ()
    if nan == "sample":
        expected = our_dmd_in_float64(case, scorers)
        for name, value in (("loss", loss), ("dx", dx)):
            case.tolerance(scorers.dtype, name).check(value, expected[name], f"{name} of our rule")
        return
    case.check(scorers.dtype, "dx", dx, "dx")
    # The published product of weight and loss is rounded to the reward's dtype; where that overflows, so does
    # ours.
    unrounded = tensors.get("loss_mq64", tensors["loss"])
    overflows = unrounded.abs().item() > torch.finfo(loss.dtype).max
    golden = tensors["loss"] if overflows else unrounded
    case.tolerance(scorers.dtype, "loss").check(loss.reshape(golden.shape).double(), golden, "loss")


@parametrize("re_dmd", "vanilla_dmd")
def test_dmd_gradient(case):
    """The gradient before weight and mask, with and without its normaliser, and the logged norm."""
    scorers, tensors = Scorers(case), dict(case.tensors)
    x, t = tensors["x"].to(scorers.dtype), scorers.t
    scorer_arguments = scorers.dmd_arguments()
    predictions = {
        name: scorer(scorers.scheduler.add_noise(x, scorers.noise, t), t)
        for name in ("fake", "fake_uncond", "real", "real_uncond")
        if (scorer := scorer_arguments[name]) is not None
    }
    options = {name: scorer_arguments[name] for name in ("real_guidance", "fake_guidance")}
    published = rf.DMDOptions(nan="published", reduction="none")
    grad, aux = rf.dmd_gradient(x, **predictions, **options, options=published, return_aux=True)
    case.check(scorers.dtype, "grad", grad, "grad")
    case.tolerance(scorers.dtype, "grad").check(
        aux.gradient_norm.double().mean(), tensors["grad_norm_log"], "norm"
    )
    grad = rf.dmd_gradient(
        x, **predictions, **options, options=dataclasses.replace(published, normalize=False)
    )
    case.check(scorers.dtype, "grad", grad, "grad_unnormalised")


@parametrize("critic_flow")
def test_critic_flow(case):
    scorers, tensors = Scorers(case), case.tensors
    generated, prediction = tensors["generated"], tensors["pred_fake"].requires_grad_()

    def fake(x_t, t):
        case.check(x_t.dtype, "xt", x_t, "xt")
        return prediction

    loss = critic_flow_loss(fake, generated, noise=scorers.noise, t=scorers.t, scheduler=scorers.scheduler)
    assert str(loss.dtype) == case.stats["loss_dtype"]
    case.check(prediction.dtype, "loss", loss, "critic_loss")
    case.check(prediction.dtype, "dpred", gradient(loss, prediction), "dpred")


@parametrize("sid")
def test_sid(case):
    scorers = Scorers(case)
    arguments = scorers.dmd_arguments()
    del arguments["fake_uncond"], arguments["fake_guidance"]  # SiD guides the real score alone
    x = case.tensors["x"].to(scorers.dtype).requires_grad_()
    loss = sid_loss(x, **arguments, alpha=case.hyper["sid_alpha"])
    assert str(loss.dtype) == case.stats["loss_dtype"] and list(loss.shape) == case.stats["loss_shape"]
    case.check(scorers.dtype, "loss", loss, "loss")
    case.check(scorers.dtype, "dx", gradient(loss, x), "dx")


# ---- G: rope; H: bidirectional model
# -----------------------------------------------------------------------------------------


@parametrize("rope")
def test_rope_table(case):
    for name in sorted({name.rsplit(".", 1)[0] for name in case.tensors if name.startswith("table_d")}):
        recorded = re.search(r"rows \[([\d, ]+)\]", case.entry["meaning"][f"{name}.cos"])[1]
        rows = [int(row) for row in recorded.split(",")]
        rope = rf.RoPE3D.wan(int(name.removeprefix("table_d")), case.hyper["theta"])
        table = torch.cat([torch.from_numpy(rope.axis_table(axis, rows)) for axis in range(3)], dim=1)
        case.check("float64", "table", table[..., 0], f"{name}.cos")
        case.check("float64", "table", table[..., 1], f"{name}.sin")


@parametrize("rope")
@every_dtype
def test_rope(case, dtype):
    run_dtype = as_dtype(dtype)
    for run in case.hyper["runs"]:
        (frames, height, width), start = run["grid"], run["start_frame"]
        rope = rf.RoPE3D.wan(run["head_dim"], case.hyper["theta"])
        assert list(rope.pairs) == run["pairs_t_h_w"]
        positions = [range(start, start + frames), range(height), range(width)]
        angles, axes = rope.table(positions, dtype=run_dtype)
        x, name = case.tensors[f"r{run['id']}.x"].to(run_dtype), f"r{run['id']}.y"
        tokens = frames * height * width  # what follows them is padding, which the library does not rotate
        y = torch.cat(
            (rf.rope(x[:, :tokens], angles=angles, axes=axes, layout=rope.layout), x[:, tokens:]), dim=1
        )
        if dtype == "bf16":
            # Computed in float32 here and in float64 there: the two round alike but next to a tie (about
            # 2^-14 of elements).
            golden = case.tensors[f"{name}_bf16"]
            assert (y != golden).double().mean() <= 2**-10
            assert ((y - golden).abs() <= 2**-7 * golden.abs()).all()
        else:
            case.check(dtype, "y", y, name)


@parametrize("bidirectional_wan_model")
@every_dtype
@torch.no_grad()
def test_bidirectional_model(case, dtype):
    model = load(BidirectionalWanModel(ModelConfig.from_dict(case.hyper)), case, as_dtype(dtype))
    for run in case.hyper["runs"]:
        prefix = f"r{run['id']}"
        latent, context = (case.tensors[f"{prefix}.{name}"].to(model.dtype) for name in ("latent", "context"))
        timestep, text = case.tensors[f"{prefix}.timestep"], model.text_keys(context)
        out = model(latent, timestep, text, seq_len=run["seq_len"])
        for golden in {"float64": ["out_f64"], "float32": ["out_f64", "out_f32"], "bf16": ["out_bf16"]}[
            dtype
        ]:
            case.check(dtype, "out", out, f"{prefix}.{golden}")
        # Padding changes the length of the sums alone: the result without it agrees as well.
        case.tolerance(dtype, "out").check(model(latent, timestep, text), out, f"{prefix} without padding")
