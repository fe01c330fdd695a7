"""The oracle of the published path reproduces every golden case, those that document a bug included.

Runs on any golden set (``RF_GOLDEN_DIR``): cases by kind, sizes from their hyper-parameters, bounds from
their tolerance texts.
"""

import re

import pytest
import torch

from benchmarks import published
from benchmarks.published.attention import CausalSelfAttention
from helpers.golden_cases import Case, as_dtype, cases, check_scheduler_case, kinds, parametrize, relative_l2

DTYPES = ["float64", "float32", "bf16"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)

#: Tensors that the tests of a kind read, as a pattern: a set with a tensor that nothing looks at fails.
RECORDED = {
    "rope": r"table_d\d+\.(cos|sin)|r\d+\.(x|y|y_bf16)",
    "ema_self_attention_stream": (
        r"w\..*|x|call_(chunk|step|current_start|len)|(final_)?cache_[kv](_f64)?|local_end|global_end|"
        r"q_start_frame|kv_frames|attended_tokens|out_f64|bf16\.(out|(sink|final_cache)_[kv])"
    ),
    "causal_wan_model_stream": (
        r"latent|timestep|context|out_f(64|32)|call_(chunk|step|current_start)|local_end|global_end|"
        r"(sink|final_cache|cross)_[kv]|bf16\.(out|sink_[kv])"
    ),
    "causal_inference_pipeline": (
        r"noise|context|initial_latent|renoise(_frames)?|latents_f(64|32)|bf16\.latents|warped_steps|"
        r"final_cache_[kv]|trace_(timestep|input|flow|x0|frames|current_start)"
    ),
    "scheduler": r".*\..*",  # the test compares the names itself
    "re_dmd": (
        r"x|noise|t_int|t|xt|(pred|a)_(fake|real)_(un)?cond|MQ|mask"
        r"|grad(_unnormalised|_norm_log)?|(loss|dx)(_mq64)?"
    ),
    "vanilla_dmd": (
        r"x|noise|t_int|t|xt|(pred|a)_(fake|real)_(un)?cond|mask|grad(_unnormalised|_norm_log)?|loss|dx"
    ),
    "sid": r"x|noise|t_int|t|xt|(pred|a)_(fake|real)_(un)?cond|mask|loss|dx",
    "critic_flow": r"generated|noise|t_int|t|xt|pred_fake|critic_loss|dpred",
    "bidirectional_wan_model": r"r\d+\.(latent|context|timestep|out_(f64|f32|bf16))",
    "training_rollout": (
        r"noise|context|loss_weights|renoise|out_f64|loss|call_(timestep|grad_enabled)|"
        r"gd?\..*|gd?_noise(_last_chunk_only)?"
    ),
}


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_everything_recorded_is_read(kind):
    for case in cases(kind):
        assert [name for name in case.tensors if not re.fullmatch(RECORDED[kind], name)] == [], case.name


def wan_config(hyper: dict) -> published.WanConfig:
    return published.WanConfig(
        **{name: hyper[name] for name in published.WanConfig.__dataclass_fields__ if name in hyper}
    )


def causal_model(
    case: Case, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> published.CausalWanModel:
    """The case's causal model; the recorded runs set the window to ``local_attn_size`` frames of the case's
    grid."""
    hyper = case.hyper
    window = hyper["local_attn_size"] * hyper["frame_seqlen"] if hyper["local_attn_size"] != -1 else None
    model = published.CausalWanModel(
        wan_config(hyper),
        sink_frames=hyper["sink_frames"],
        local_attn_size=hyper["local_attn_size"],
        max_attention_tokens=hyper.get("max_attention_size_tokens", window),
        alpha=hyper["alpha"],
        gradient_checkpointing=gradient_checkpointing,
    )
    model.load_state_dict(case.weights(), strict=True)
    return model.to(dtype)


def stacked(caches: published.RolloutCaches, name: str) -> torch.Tensor:
    """``[layer, B, capacity, H, D]`` keys or values of all layers."""
    return torch.stack([getattr(cache, name) for cache in caches.self_attn])


def assert_rounds_like(run: torch.Tensor, recorded: torch.Tensor, exact: torch.Tensor, label: str) -> None:
    """The low-precision EMA must round, and therefore freeze, as recorded: nearer to the recording than the
    exact recursion is.

    A quarter of that distance leaves room for another order of summation in the projections that fill the
    cache.
    """
    assert relative_l2(run, recorded) <= relative_l2(exact, recorded) / 4, label


def saved_draws(draws: torch.Tensor, dtype: torch.dtype):
    """A ``draw`` that hands out saved noises ``[draw, frames (flattened batch-major, perhaps zero-padded), C,
    H, W]`` in order."""
    remaining = iter(draws)

    def draw(like: torch.Tensor) -> torch.Tensor:
        return next(remaining)[: like.shape[0]].to(dtype)

    draw.remaining = remaining
    return draw


# Kind by kind, in the order of tests/golden/README.md.


@parametrize("rope")
def test_rope(case):
    tensors, theta, rows = case.tensors, case.hyper["theta"], case.hyper["table_rows"]
    for name in {name.rsplit(".", 1)[0] for name in tensors if name.startswith("table_d")}:
        recorded_rows = [
            int(row)
            for row in re.search(r"rows \[([\d, ]+)\]", case.entry["meaning"][f"{name}.cos"])[1].split(",")
        ]
        table = published.rope_table(int(name.removeprefix("table_d")), rows, theta)[recorded_rows]
        case.check("float64", "table", table.real, f"{name}.cos")
        case.check("float64", "table", table.imag, f"{name}.sin")
    for run in case.hyper["runs"]:
        x, grid, start_frame = (tensors[f"r{run['id']}.x"], tuple(run["grid"]), run["start_frame"])
        assert list(published.axis_pairs(run["head_dim"])) == run["pairs_t_h_w"]
        table = published.rope_table(run["head_dim"], rows, theta)
        rotated = published.rope_apply(x, grid, table, start_frame)
        case.check("float64", "y", rotated, f"r{run['id']}.y")
        case.check(
            "float32", "y", published.rope_apply(x.float(), grid, table, start_frame), f"r{run['id']}.y"
        )
        in_bf16 = published.rope_apply(x.bfloat16(), grid, table, start_frame)
        assert in_bf16.dtype == torch.bfloat16 and torch.equal(in_bf16, tensors[f"r{run['id']}.y_bf16"])
        tokens = grid[0] * grid[1] * grid[2]
        assert torch.equal(rotated[:, tokens:], x[:, tokens:]), "padding must pass through"


def stream_layer(
    case: Case, dtype: torch.dtype, attention
) -> tuple[CausalSelfAttention, published.EMASinkKVCache]:
    hyper = case.hyper
    layer = CausalSelfAttention(
        hyper["dim"],
        hyper["num_heads"],
        eps=hyper["eps"],
        sink_frames=hyper["sink_frames"],
        local_attn_size=hyper["local_attn_size"],
        max_attention_tokens=hyper["max_attention_size_tokens"],
        alpha=hyper["alpha"],
        attention=attention,
    )
    layer.load_state_dict(case.weights(), strict=True)
    cache = published.EMASinkKVCache(
        hyper["batch"], hyper["cache_capacity_tokens"], hyper["num_heads"], hyper["head_dim"], dtype
    )
    return layer.to(dtype), cache


@parametrize("ema_self_attention_stream")
@pytest.mark.parametrize(
    "dtype, attention",
    [
        ("float64", published.softmax_attention),
        ("float64", published.sdpa_attention),
        ("float32", published.sdpa_attention),
        ("bf16", published.sdpa_attention),
    ],
)
@torch.no_grad()
def test_self_attention_stream(case, dtype, attention):
    run_dtype, hyper, tensors = as_dtype(dtype), case.hyper, dict(case.tensors)
    layer, cache = stream_layer(case, run_dtype, attention)
    num_sink_tokens = hyper["sink_frames"] * hyper["frame_seqlen"]
    lengths = tensors.get(
        "call_len", torch.full_like(tensors["call_current_start"], hyper["tokens_per_call"])
    ).tolist()
    outputs = []
    for call, (start, length) in enumerate(zip(tensors["call_current_start"].tolist(), lengths, strict=True)):
        grid = (length // hyper["frame_seqlen"], hyper["grid_h"], hyper["grid_w"])
        out = layer(tensors["x"][call, :, :length].to(run_dtype), grid, cache, start)
        outputs.append(torch.nn.functional.pad(out, (0, 0, 0, tensors["x"].shape[2] - length)))

        window = layer.window(cache.local_end.item(), grid)
        assert cache.local_end.item() == tensors["local_end"][call]
        assert cache.global_end.item() == tensors["global_end"][call]
        assert window.q_start_frame == tensors["q_start_frame"][call]
        assert window.kv_frames == tensors["kv_frames"][call]
        assert window.attended_tokens == tensors["attended_tokens"][call]
        for name in ("k", "v"):
            run, exact = getattr(cache, name), tensors.get(f"cache_{name}")
            if dtype != "bf16" and exact is not None:
                case.tolerance(dtype, "caches").check(run, exact[call], f"cache_{name} after call {call}")
            recorded = tensors.get(f"bf16.sink_{name}")
            if dtype == "bf16" and recorded is not None:
                label, run = (f"bf16.sink_{name} after call {call}", run[:, :num_sink_tokens])
                case.tolerance(dtype, "caches").check(run, recorded[call], label)
                if exact is not None:
                    assert_rounds_like(run, recorded[call], exact[call, :, :num_sink_tokens], label)

    names = {"bf16": ["bf16.out", "bf16.final_cache_k", "bf16.final_cache_v"]}
    out, final_k, final_v = names.get(dtype, ["out_f64", "final_cache_k_f64", "final_cache_v_f64"])
    case.check(dtype, "out", torch.stack(outputs), out)
    case.check(dtype, "caches", cache.k, final_k)
    case.check(dtype, "caches", cache.v, final_v)

    if case.raised:
        assert case.raised["call"] == len(outputs)
        start = case.raised["chunk"] * hyper["tokens_per_call"]
        # Up to the dimension: the oracle rotates a batch at once, the published code sample by sample.
        message = re.escape(case.raised["message"].split(" at ")[0])
        with pytest.raises(RuntimeError, match=message) as error:
            layer(tensors["x"][0].to(run_dtype), grid, cache, start)
        assert type(error.value).__name__ == case.raised["type"]


@parametrize("causal_wan_model_stream")
@every_dtype
@torch.no_grad()
def test_causal_model_stream(case, dtype):
    run_dtype, hyper, tensors = as_dtype(dtype), case.hyper, dict(case.tensors)
    model = causal_model(case, run_dtype)
    caches = model.new_caches(hyper["batch"], tensors["final_cache_k"].shape[2])
    text = tensors["context"].to(run_dtype)
    num_sink_tokens = hyper["sink_frames"] * hyper["frame_seqlen"]
    chunks, steps, starts = (
        tensors[name].tolist() for name in ("call_chunk", "call_step", "call_current_start")
    )
    outputs, sink_after = [], {"k": [], "v": []}
    for call, start in enumerate(starts):
        out = model(tensors["latent"][call].to(run_dtype), tensors["timestep"][call], text, caches, start)
        outputs.append(out)
        for cache in caches.self_attn:
            assert cache.local_end.item() == tensors["local_end"][call]
            assert cache.global_end.item() == tensors["global_end"][call]
        if call + 1 == len(chunks) or chunks[call + 1] != chunks[call]:
            assert steps[call] == hyper["noisy_forwards_per_chunk"], "the clean call ends a chunk"
            for name, sink in sink_after.items():
                sink.append(stacked(caches, name)[:, :, :num_sink_tokens].clone())

    prefix = "bf16." if dtype == "bf16" else ""
    for golden in {"float64": ["out_f64"], "float32": ["out_f64", "out_f32"], "bf16": ["bf16.out"]}[dtype]:
        case.check(dtype, "out", torch.stack(outputs), golden)
    for name, sink in sink_after.items():
        case.check(dtype, "caches", torch.stack(sink), f"{prefix}sink_{name}")
    if dtype == "bf16":
        return
    for name in ("k", "v"):
        case.check(dtype, "caches", stacked(caches, name), f"final_cache_{name}")
        cross = torch.stack([getattr(cache, name) for cache in caches.cross_attn])
        case.check(dtype, "caches", cross, f"cross_{name}")


@parametrize("causal_inference_pipeline")
@every_dtype
@torch.no_grad()
def test_inference_rollout(case, dtype):
    run_dtype, hyper, tensors = as_dtype(dtype), case.hyper, dict(case.tensors)
    model = causal_model(case, run_dtype)
    caches = model.new_caches(hyper["batch"], tensors["final_cache_k"].shape[2])
    scheduler = published.FlowMatchScheduler(hyper["shift"])
    steps = published.denoising_steps(scheduler, hyper["denoising_step_list"], hyper["warp"])
    assert torch.equal(steps.double(), tensors["warped_steps"].double())
    draws = [
        noise[:, :frames].flatten(0, 1)
        for noise, frames in zip(tensors["renoise"], tensors["renoise_frames"], strict=True)
    ]
    draw, trace = saved_draws(draws, run_dtype), []
    prefix = tensors.get("initial_latent")
    latents = published.inference_rollout(
        model,
        scheduler,
        tensors["noise"].to(run_dtype),
        tensors["context"].to(run_dtype),
        caches,
        steps,
        chunk_frames=hyper["chunk_frames"],
        initial_latent=None if prefix is None else prefix.to(run_dtype),
        independent_first_frame=hyper["independent_first_frame"],
        context_noise=hyper["context_noise"],
        draw=draw,
        trace=trace,
    )
    assert next(draw.remaining, None) is None, "every saved draw must be consumed"
    goldens = {
        "float64": ["latents_f64"],
        "float32": ["latents_f64", "latents_f32"],
        "bf16": ["bf16.latents"],
    }[dtype]
    for golden in goldens:
        case.check(dtype, "latents", latents, golden)

    if dtype != "bf16":
        case.check(dtype, "caches", stacked(caches, "k"), "final_cache_k")
        case.check(dtype, "caches", stacked(caches, "v"), "final_cache_v")
    assert len(trace) == case.stats.get("generator_calls", len(trace))
    if "trace_frames" in tensors:
        check_trace(case, dtype, trace, tensors)


def check_trace(
    case: Case, dtype: str, trace: list[published.GeneratorCall], tensors: dict[str, torch.Tensor]
) -> None:
    """Every generator call as recorded; the predictions are those of the float64 run."""
    bound = case.tolerance(dtype, "trace")
    assert [call.current_start for call in trace] == tensors["trace_current_start"].tolist()
    assert [call.noisy.shape[1] for call in trace] == tensors["trace_frames"].tolist()
    for index, call in enumerate(trace):
        frames = call.noisy.shape[1]
        timestep = call.timestep.double().expand(-1, frames)
        assert torch.equal(timestep, tensors["trace_timestep"][index, :, :frames])
        if dtype != "bf16":
            for name, value in (("input", call.noisy), ("flow", call.flow), ("x0", call.x0)):
                bound.check(
                    value, tensors[f"trace_{name}"][index, :, :frames], f"trace_{name} of call {index}"
                )


@parametrize("scheduler")
def test_scheduler(case):
    for prefix in {name.rsplit(".", 1)[0] for name in case.tensors}:
        check_scheduler(case, prefix, case.tensors.below(f"{prefix}."))


def check_scheduler(case: Case, prefix: str, golden: dict[str, torch.Tensor]) -> None:
    arguments = {name: value for name, value in case.hyper.items() if name != "shift"}
    shift = float(prefix.removeprefix("shift"))
    scheduler = published.FlowMatchScheduler(shift, **arguments)
    warped_steps = scheduler.nominal_steps(golden["step_list"].tolist())
    train_t_warped = published.score_timestep(golden["train_t_int"], shift)
    check_scheduler_case(case, prefix, golden, scheduler, warped_steps, train_t_warped)


class Scores:
    """Inputs of a loss case and its stub score networks: saved predictions, or ``a * xt + prediction``."""

    def __init__(self, case: Case):
        hyper, self.tensors = case.hyper, dict(case.tensors)
        tensors = self.tensors
        self.dtype = as_dtype(hyper["dtype"])
        self.scheduler = published.FlowMatchScheduler(hyper["timestep_shift"])
        self.x = tensors["x"].to(self.dtype).requires_grad_()
        self.mask = tensors.get("mask")
        t = published.score_timestep(
            tensors["t_int"],
            hyper["timestep_shift"],
            hyper["min_step"],
            hyper["max_step"],
            hyper["num_train_timestep"],
        )
        self.t = t.expand(self.x.shape[:2])
        case.check("float32", "t", self.t, "t")
        self.xt = published.noisy_latent(self.scheduler, self.x, tensors["noise"].to(self.dtype), self.t)
        case.check(self.dtype, "xt", self.xt, "xt")
        self.fake_scale, self.real_scale = (hyper["fake_guidance_scale"], hyper["real_guidance_scale"])

    def predict(self, name: str, xt: torch.Tensor) -> torch.Tensor | None:
        if f"pred_{name}" not in self.tensors:
            return None
        saved = self.tensors[f"pred_{name}"].to(self.dtype)
        return self.tensors[f"a_{name}"].to(self.dtype) * xt + saved if f"a_{name}" in self.tensors else saved

    def fake(self, xt: torch.Tensor) -> torch.Tensor:
        uncond = self.predict("fake_uncond", xt) if self.fake_scale else None
        return published.guide(self.predict("fake_cond", xt), uncond, self.fake_scale)

    def real(self, xt: torch.Tensor) -> torch.Tensor:
        return published.guide(
            self.predict("real_cond", xt), self.predict("real_uncond", xt), self.real_scale
        )

    def dx(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss.sum(), self.x)[0]


def check_returned_loss(case: Case, dtype: torch.dtype, loss: torch.Tensor, dx: torch.Tensor) -> None:
    """Loss and gradient as returned: shape, dtype, values."""
    assert str(loss.dtype) == case.stats["loss_dtype"] and list(loss.shape) == case.stats["loss_shape"]
    assert str(dx.dtype) == case.stats["dx_dtype"]
    case.check(dtype, "loss", loss, "loss")
    case.check(dtype, "dx", dx, "dx")


@parametrize("re_dmd", "vanilla_dmd")
def test_dmd(case):
    scores, tensors = Scores(case), case.tensors
    xt = scores.xt.detach()
    fake, real = scores.fake(xt), scores.real(xt)
    grad, log = published.dmd_gradient(scores.x, fake, real)
    assert grad.dtype == scores.dtype
    case.check(scores.dtype, "grad", grad, "grad")
    case.check(scores.dtype, "grad", log, "grad_norm_log")
    case.check(
        scores.dtype,
        "grad",
        published.dmd_gradient(scores.x, fake, real, normalize=False)[0],
        "grad_unnormalised",
    )

    if case.kind == "vanilla_dmd":
        loss = published.dmd_loss(scores.x, grad, scores.mask)
    else:
        reward, beta = (tensors["MQ"].to(as_dtype(case.hyper["mq_dtype"])), case.hyper["beta"])
        loss = published.re_dmd_loss(scores.x, grad, reward, beta, scores.mask)
        unrounded = published.re_dmd_loss(scores.x, grad, reward.double(), beta, scores.mask)
        assert unrounded.dtype == torch.float64
        case.check(scores.dtype, "loss", unrounded, "loss_mq64")
        case.check(scores.dtype, "dx", scores.dx(unrounded), "dx_mq64")
    check_returned_loss(case, scores.dtype, loss, scores.dx(loss))


@parametrize("sid")
def test_sid(case):
    scores = Scores(case)
    fake, real = scores.predict("fake_cond", scores.xt), scores.real(scores.xt)
    loss = published.sid_loss(scores.x, fake, real, case.hyper["sid_alpha"])
    check_returned_loss(case, scores.dtype, loss, scores.dx(loss))


@parametrize("critic_flow")
def test_critic_flow(case):
    tensors, shift = case.tensors, case.hyper["timestep_shift"]
    generated, noise, pred_fake = (
        tensors["generated"],
        tensors["noise"],
        tensors["pred_fake"].requires_grad_(),
    )
    scheduler, dtype = published.FlowMatchScheduler(shift), pred_fake.dtype
    t = published.score_timestep(tensors["t_int"], shift).expand(generated.shape[:2])
    case.check("float32", "t", t, "t")
    xt = published.noisy_latent(scheduler, generated, noise, t)
    case.check(dtype, "xt", xt, "xt")
    loss = published.critic_flow_loss(scheduler, pred_fake, generated, noise, xt, t)
    assert str(loss.dtype) == case.stats["loss_dtype"]
    case.check(dtype, "loss", loss, "critic_loss")
    case.check(dtype, "dpred", torch.autograd.grad(loss, pred_fake)[0], "dpred")


@parametrize("bidirectional_wan_model")
@every_dtype
@torch.no_grad()
def test_bidirectional_model(case, dtype):
    run_dtype, tensors = as_dtype(dtype), case.tensors
    model = published.BidirectionalWanModel(wan_config(case.hyper))
    model.load_state_dict(case.weights(), strict=True)
    model.to(run_dtype)
    for run in case.hyper["runs"]:
        inputs = [tensors[f"r{run['id']}.{name}"] for name in ("latent", "timestep", "context")]
        out = model(inputs[0].to(run_dtype), inputs[1], inputs[2].to(run_dtype), run["seq_len"])
        for suffix in {"float64": ["f64"], "float32": ["f64", "f32"], "bf16": ["bf16"]}[dtype]:
            case.check(dtype, "out", out, f"r{run['id']}.out_{suffix}")


def rollout_gradients(case: Case, dtype: torch.dtype, detach_cache: bool):
    """Rollout, trace, loss, and two sets of gradients: of the loss, and of the last chunk's part of it on the
    noise."""
    hyper, tensors = case.hyper, case.tensors
    model = causal_model(case, dtype, hyper["gradient_checkpointing"])
    scheduler = published.FlowMatchScheduler(hyper["shift"])
    steps = published.denoising_steps(scheduler, hyper["denoising_step_list"])
    weights = tensors["loss_weights"].to(dtype)

    def run(frames: slice):
        noise = tensors["noise"].to(dtype).requires_grad_()
        draw, trace = saved_draws(tensors["renoise"], dtype), []
        rollout = published.training_rollout(
            model,
            scheduler,
            noise,
            tensors["context"].to(dtype),
            model.new_caches(noise.shape[0], hyper["cache_capacity_frames"] * hyper["frame_seqlen"]),
            steps,
            chunk_frames=hyper["chunk_frames"],
            exit_index=hyper["exit_index"],
            context_noise=hyper["context_noise"],
            detach_cache=detach_cache,
            draw=draw,
            trace=trace,
        )
        assert next(draw.remaining, None) is None, "every saved draw must be consumed"
        loss = (rollout.latents * weights)[:, frames].sum()
        loss.backward()
        return rollout, trace, loss, noise.grad

    _, _, _, last_chunk_noise_grad = run(slice(-hyper["chunk_frames"], None))
    model.zero_grad()
    rollout, trace, loss, noise_grad = run(slice(None))
    parameter_grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return rollout, trace, loss, noise_grad, last_chunk_noise_grad, parameter_grads


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    "case, prefix",
    [
        pytest.param(case, prefix, id=f"{case.name}-{prefix}")
        for case in cases("training_rollout")
        for prefix in ("g", "gd")
        if any(name.startswith(f"{prefix}.") for name in case.tensors)
    ],
)
def test_training_rollout(case, prefix, dtype):
    """``g``: published gradients, leaking through the caches; ``gd``: caches detached after every call."""
    tensors, golden = dict(case.tensors), case.tensors.below(f"{prefix}.")
    rollout, trace, loss, noise_grad, last_chunk_noise_grad, grads = rollout_gradients(
        case, as_dtype(dtype), detach_cache=prefix == "gd"
    )
    case.check(dtype, "out", rollout.latents, "out_f64")
    assert (rollout.denoised_timestep_from, rollout.denoised_timestep_to) == (
        case.stats["denoised_timestep_from"],
        case.stats["denoised_timestep_to"],
    )
    assert [call.timestep.unique().item() for call in trace] == tensors["call_timestep"].tolist()
    assert [int(call.grad_enabled) for call in trace] == tensors["call_grad_enabled"].tolist()
    if dtype == "float64":
        case.check(dtype, "loss", loss, "loss")

    bound = case.tolerance(dtype, "gradients")
    for name, expected in golden.items():
        bound.check(grads[name], expected, f"{prefix}.{name}")
    for name, grad in (
        (f"{prefix}_noise", noise_grad),
        (f"{prefix}_noise_last_chunk_only", last_chunk_noise_grad),
    ):
        if name in tensors:
            bound.check(grad, tensors[name], name)
    if prefix == "g":
        assert [name for name, grad in grads.items() if grad is None] == case.stats["params_without_gradient"]
        for name, norm in case.stats["grad_norms"].items():
            bound.check(grads[name].norm(), torch.tensor(norm, dtype=torch.float64), f"norm of {name}")
