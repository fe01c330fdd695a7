"""The model layer: sizes come from the configuration alone, checkpoints in every published wrapping, the
scheduler's edges, and the streaming pipeline: deterministic, resumable, independent of who else streams.
"""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import rf_kernels as rf
from benchmarks import published
from reward_forcing import (
    BidirectionalWanModel,
    CausalWanModel,
    CheckpointError,
    FlowMatchScheduler,
    FlowPredictor,
    ModelConfig,
    StreamConfig,
    StreamingPipeline,
    infer_config,
    load_bidirectional_model,
    load_causal_model,
    read_checkpoint,
)
from reward_forcing.losses import critic_flow_loss, dmd_loss, draw_timesteps, sid_loss
from reward_forcing.models.blocks import sinusoidal_embedding
from reward_forcing.pipeline import chunk_lengths

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**overrides) -> ModelConfig:
    sizes = {
        "dim": 48,
        "ffn_dim": 80,
        "num_heads": 2,
        "num_layers": 2,
        "in_dim": 4,
        "out_dim": 4,
        "text_dim": 10,
        "text_len": 6,
        "freq_dim": 32,
    }
    return ModelConfig(**{**sizes, **overrides})


#: Sizes that share nothing with the published ones: odd head counts and widths, one block, other patches, no
#: norms.
ODD = {
    "three heads of 20": tiny(dim=60, num_heads=3, ffn_dim=33, freq_dim=14),
    "one block, one head": tiny(dim=16, num_heads=1, num_layers=1, text_len=1),
    "other channels": tiny(in_dim=3, out_dim=5, text_dim=7),
    "patches of 1 x 3": tiny(patch_size=(1, 1, 3)),
    "no qk_norm, no norm3": tiny(qk_norm=False, cross_attn_norm=False),
    "heads of 2": tiny(dim=10, num_heads=5),
}


def make(cls, config: ModelConfig, dtype=torch.float64, seed: int = 0):
    torch.manual_seed(seed)
    return cls(config).to(dtype).eval().requires_grad_(False)


def noise(*shape, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- sizes
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD)
@torch.no_grad()
def test_a_whole_clip_in_one_chunk_is_the_bidirectional_model(name):
    """With nothing cached before it, a chunk attends itself in full: both models must agree, for every
    size."""
    config = ODD[name]
    causal, bidirectional = make(CausalWanModel, config), BidirectionalWanModel(config).double()
    bidirectional.load_state_dict(causal.state_dict(), strict=True)
    batch, frames, height, width = 2, 3, 2 * config.patch_size[1], 3 * config.patch_size[2]
    x = noise(batch, config.in_dim, frames, height, width)
    context = noise(batch, config.text_len, config.text_dim, seed=1)
    t = torch.tensor([700.0, 20.0])
    spec = causal.cache_spec(height, width, batch=batch, sink_frames=1, window_frames=4)
    chunk = rf.SinkWindowCache(spec, sink=rf.EMASink()).open(frames)
    streamed = causal(x, t[:, None], causal.text_keys(context), chunk)
    whole = bidirectional(x, t, bidirectional.text_keys(context))
    assert streamed.shape == (batch, config.out_dim, frames, height, width)
    torch.testing.assert_close(streamed, whole, rtol=1e-10, atol=1e-10)
    assert whole.std() > 0.01


def test_presets_are_the_published_sizes():
    small, large = ModelConfig.wan_1_3b(), ModelConfig.wan_14b()
    assert (small.head_dim, large.head_dim) == (128, 128)
    with torch.device("meta"):
        parameters = [sum(p.numel() for p in CausalWanModel(c).parameters()) for c in (small, large)]
    assert [round(n / 1e9, 1) for n in parameters] == [1.4, 14.3]
    assert ModelConfig.wan_1_3b(num_layers=2).num_layers == 2
    assert (
        ModelConfig.from_dict({"dim": 8, "ffn_dim": 8, "num_heads": 1, "num_layers": 1, "seed": 3}).dim == 8
    )


def test_time_embedding_is_float64_cosines_then_sines():
    embedded = sinusoidal_embedding(torch.tensor([[3.0, 999.0]]), 6)
    angles = torch.tensor([3.0, 999.0], dtype=torch.float64)[:, None] * 10000.0 ** -(
        torch.arange(3.0).double() / 3
    )
    torch.testing.assert_close(embedded[0], torch.cat((angles.cos(), angles.sin()), 1), rtol=0, atol=1e-12)


@torch.no_grad()
def test_wrong_calls_write_nothing():
    config = tiny()
    model = make(CausalWanModel, config)
    cache = rf.SinkWindowCache(model.cache_spec(4, 4, sink_frames=1, window_frames=3), sink=rf.EMASink())
    text, chunk = model.text_keys(noise(1, 6, 10)), cache.open(2)
    good, t = noise(1, 4, 2, 4, 4), torch.zeros(1, 2)
    for arguments, name in [
        ((noise(1, 3, 2, 4, 4), t), "`x`"),
        ((noise(1, 4, 1, 4, 4), t), "`x`"),
        ((noise(1, 4, 2, 4, 6), t), "`x`"),
        ((noise(1, 4, 2, 3, 4), t), "height, width"),
        ((good, torch.zeros(1, 3)), "`t`"),
        ((good, torch.zeros(2)), "`t`"),
    ]:
        with pytest.raises(rf.ArgumentError, match=name):
            model(*arguments, text, chunk)
    with pytest.raises(rf.ArgumentError, match="`context`"):
        model.text_keys(noise(1, 7, 10))
    assert not chunk.written and not cache.k.any()
    model(good, t, text, chunk)
    assert chunk.written


def test_bidirectional_model_is_differentiable():
    """Gradients of parameters and input against finite differences of the loss along one direction."""
    model = make(BidirectionalWanModel, tiny()).requires_grad_()
    x, context = noise(1, 4, 2, 4, 4).requires_grad_(), noise(1, 6, 10, seed=1)

    def loss(x):
        return (
            model(x, torch.tensor([500.0]), model.text_keys(context)) * noise(1, 4, 2, 4, 4, seed=2)
        ).sum()

    leaves = [x, *model.parameters()]
    gradients = torch.autograd.grad(loss(x), leaves)
    directions = [noise(*leaf.shape, seed=3 + i) for i, leaf in enumerate(leaves)]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).item()
    values = []
    with torch.no_grad():
        for sign in (1, -2):  # +h, then from there to -h
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.add_(direction, alpha=sign * 1e-5)
            values.append(loss(x).item())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)
    assert all(g.abs().max() > 0 for g in gradients)


# ---- checkpoints
# ------------------------------------------------------------------------------------------------------------


def wrapped(state: dict, prefix: str = "", block: str = "") -> dict:
    """Names as a wrapper saves them: a prefix before all, a marker after every block's index."""
    return {prefix + name.replace("blocks.0.", f"blocks.0.{block}"): tensor for name, tensor in state.items()}


LAYOUTS = {
    "bare.pt": lambda s: s,
    "generator.pt": lambda s: {"generator": wrapped(s, "model."), "critic": wrapped(s, "model."), "step": 5},
    "generator_ema.pt": lambda s: {
        "generator_ema": wrapped(s, "model._fsdp_wrapped_module.", "_fsdp_wrapped_module.")
    },
    "model.pt": lambda s: {"model": wrapped(s, "_orig_mod.")},
    "ddp.pt": lambda s: wrapped(s, "module."),
    "fsdp+checkpointing.pt": lambda s: wrapped(
        s, "model.", "_fsdp_wrapped_module._checkpoint_wrapped_module."
    ),
    "compiled.pt": lambda s: {"generator": wrapped(s, "model._orig_mod.", "_orig_mod.")},
    "bare.safetensors": lambda s: s,
    "prefixed.safetensors": lambda s: wrapped(s, "model."),
    "golden-like.safetensors": lambda s: wrapped(s, "w."),
}


def save(path, data) -> None:
    save_file(data, path) if path.suffix == ".safetensors" else torch.save(data, path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_wrapping_loads(tmp_path, layout):
    config = tiny()
    state = make(CausalWanModel, config, torch.float32).state_dict()
    save(tmp_path / layout, LAYOUTS[layout](state))
    model = load_causal_model(tmp_path / layout, num_heads=2, text_len=6, dtype=torch.float32)
    assert model.config == config and not model.training
    loaded = model.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


def test_entries_of_a_training_checkpoint(tmp_path):
    states = {
        name: make(CausalWanModel, tiny(), torch.float32, seed).state_dict()
        for seed, name in enumerate("abc")
    }
    path = tmp_path / "step.pt"
    torch.save({"critic": states["c"], "generator_ema": states["b"], "generator": states["a"]}, path)
    for entry, expected in ((None, "a"), ("generator", "a"), ("generator_ema", "b"), ("critic", "c")):
        assert torch.equal(
            read_checkpoint(path, entry=entry)["head.head.bias"], states[expected]["head.head.bias"]
        )
    with pytest.raises(CheckpointError, match="no entry 'model'.*critic"):
        read_checkpoint(path, entry="model")

    flat = tmp_path / "step.safetensors"
    save_file({**wrapped(states["a"], "generator."), **wrapped(states["c"], "critic.")}, flat)
    with pytest.raises(CheckpointError, match="prefixes"):
        read_checkpoint(flat)
    assert torch.equal(read_checkpoint(flat, entry="critic")["head.head.bias"], states["c"]["head.head.bias"])


def test_faults_are_named_together(tmp_path):
    state = dict(make(CausalWanModel, tiny(), torch.float32).state_dict())
    del state["head.modulation"]
    state["blocks.0.self_attn.q.bias"] = torch.zeros(47)
    state["blocks.0.extra"] = torch.zeros(1)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_causal_model(tmp_path / "x.safetensors", tiny())
    text = str(error.value)
    assert "missing: head.modulation" in text and "unexpected: blocks.0.extra" in text
    assert "blocks.0.self_attn.q.bias (47,), expected (48,)" in text


class Hostile:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize(
    "write", [torch.save, lambda data, path: path.write_bytes(pickle.dumps(data, protocol=2))]
)
def test_hostile_pickles_are_refused(tmp_path, write):
    trace = tmp_path / "was_here"
    state = dict(make(CausalWanModel, tiny(), torch.float32).state_dict())
    write({"generator": state, "optimizer": Hostile(trace)}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError):
        load_causal_model(tmp_path / "evil.pt", tiny())
    assert not trace.exists()


@pytest.mark.parametrize(
    "name, content", [("a.pt", b"not a checkpoint"), ("b.pt", b""), ("c.safetensors", b"\xff" * 32)]
)
def test_unreadable_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "nowhere.pt")


def test_what_is_no_model_is_refused(tmp_path):
    for i, data in enumerate(
        [[1, 2], {"generator": {"a": torch.zeros(1)}}, {"patch_embedding.weight": "text"}, {}]
    ):
        torch.save(data, tmp_path / f"{i}.pt")
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / f"{i}.pt")
    state = make(CausalWanModel, tiny(), torch.float32).state_dict()
    torch.save({**wrapped(state, "model."), "stray": torch.zeros(1)}, tmp_path / "stray.pt")
    with pytest.raises(CheckpointError, match="stray"):
        read_checkpoint(tmp_path / "stray.pt")


@pytest.mark.parametrize("config", ODD.values(), ids=ODD)
def test_sizes_are_inferred(config):
    state = make(CausalWanModel, config, torch.float32).state_dict()
    assert infer_config(state, num_heads=config.num_heads, text_len=config.text_len) == config
    with pytest.raises(CheckpointError, match="num_heads"):
        infer_config(state)
    with torch.device("meta"):
        published = CausalWanModel(ModelConfig.wan_1_3b()).state_dict()
    assert infer_config(published) == ModelConfig.wan_1_3b()


def test_dtype_and_kind_of_a_loaded_model(tmp_path):
    state = make(CausalWanModel, tiny(), torch.float32).state_dict()
    save_file(state, tmp_path / "x.safetensors")
    model = load_bidirectional_model(tmp_path / "x.safetensors", tiny())
    assert isinstance(model, BidirectionalWanModel) and model.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(TypeError, match="num_heads"):
        load_causal_model(tmp_path / "x.safetensors", tiny(), num_heads=2)


# ---- scheduler
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_scheduler_conversions_are_inverse(shift):
    scheduler = FlowMatchScheduler(shift)
    x0, eps = noise(2, 3, 4, 2, 2), noise(2, 3, 4, 2, 2, seed=1)
    t = torch.tensor([[900.0, 400.0, 30.0], [700.0, 1.0, 999.0]])
    x_t = scheduler.add_noise(x0, eps, t)
    flow = scheduler.flow_from_x0(x0, x_t, t)
    torch.testing.assert_close(scheduler.x0_from_flow(flow, x_t, t), x0, rtol=0, atol=1e-12)
    # 1 - sigma is float32
    torch.testing.assert_close(flow, scheduler.training_target(x0, eps), rtol=0, atol=1e-4)
    per_frame = [scheduler.add_noise(x0[:, f], eps[:, f], t[:, f]) for f in range(3)]
    assert torch.equal(x_t, torch.stack(per_frame, 1)), "timesteps per frame are those of the frame alone"
    shared = scheduler.add_noise(x0, eps, t[:, :1])
    assert torch.equal(shared, scheduler.add_noise(x0, eps, t[:, :1].expand(2, 3))) and not torch.equal(
        shared, x_t
    )


def test_scheduler_ends():
    scheduler = FlowMatchScheduler(5.0)
    assert scheduler.warp([1000, 500, 1, 0]) == [*scheduler.timesteps[[0, 500, 999]].tolist(), 0.0]
    assert scheduler.sigma(torch.tensor([0.0, 2000.0])).tolist() == [scheduler.sigmas[-1].item(), 1.0]
    middle = (scheduler.timesteps[400].double() + scheduler.timesteps[401].double()) / 2
    assert scheduler.index(middle).item() == 400, "of two equally near entries the noisier one"
    with pytest.raises(rf.ArgumentError, match="nominal"):
        scheduler.warp([1001])
    with pytest.raises(rf.ArgumentError, match="`t`"):
        scheduler.add_noise(noise(2, 3), noise(2, 3), torch.zeros(3))
    linear = FlowMatchScheduler(1.0, num_steps=5, extra_one_step=False)
    assert linear.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_euler_steps_with_the_exact_flow_arrive_at_x0():
    """On the straight path from x0 to eps the flow is constant, so any number of Euler steps is exact."""
    scheduler = FlowMatchScheduler(5.0, num_steps=20)
    x0, eps = noise(3, 4), noise(3, 4, seed=1)
    x = eps
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(eps - x0, torch.full((3,), t), x)
    torch.testing.assert_close(x, x0, rtol=0, atol=1e-6)


# ---- pipeline
# ------------------------------------------------------------------------------------------------------------


def pipeline(dtype=torch.float32, **stream) -> StreamingPipeline:
    choices = {
        "chunk_frames": 2,
        "sink_frames": 1,
        "local_attn_size": 5,
        "alpha": 0.9,
        "denoising_step_list": (1000, 500),
    }
    return StreamingPipeline(make(CausalWanModel, tiny(), dtype), StreamConfig(**{**choices, **stream}))


def seeded(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


class Draws:
    """A noise source that hands out given draws in order."""

    def __init__(self, draws):
        self.draws = list(draws)

    def __call__(self, like):
        return self.draws.pop(0)


def clip(frames: int, batch: int = 1, seed: int = 7, dtype=torch.float32) -> torch.Tensor:
    return noise(batch, frames, 4, 4, 6, seed=seed, dtype=dtype)


CONTEXT = noise(1, 5, 10, seed=8, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_stream_is_a_function_of_its_inputs(dtype):
    runs = [
        pipeline(dtype).rollout(clip(12, dtype=dtype), CONTEXT.to(dtype), noise_source=seeded())
        for _ in range(2)
    ]
    assert torch.equal(*runs) and runs[0].dtype == dtype and torch.isfinite(runs[0]).all()
    other = pipeline(dtype).rollout(clip(12, dtype=dtype), CONTEXT.to(dtype), noise_source=seeded(1))
    assert not torch.equal(runs[0], other)


def test_two_streams_of_one_model_do_not_meet():
    line = pipeline()
    alone = [chunk.latents for chunk in line.stream(line.split(clip(12)), CONTEXT, noise_source=seeded())]
    first = line.stream(line.split(clip(12)), CONTEXT, noise_source=seeded())
    second = line.stream(line.split(clip(12, seed=9)), 2 * CONTEXT, noise_source=seeded(5))
    for expected, (a, b) in zip(alone, zip(first, second, strict=True), strict=True):
        assert torch.equal(a.latents, expected) and not torch.equal(b.latents, expected)
        assert a.first_frame == b.first_frame == 2 * a.index


def test_a_stream_can_be_stopped_and_continued():
    line, chunks = pipeline(), pipeline().split(clip(16))
    whole = [chunk.latents for chunk in line.stream(chunks, CONTEXT, noise_source=seeded())]
    cache, source = line.new_cache(1, 4, 6), seeded()
    parts = [c.latents for c in line.stream(chunks[:5], CONTEXT, cache=cache, noise_source=source)]
    saved = cache.state_dict()
    resumed = line.new_cache(1, 4, 6)
    resumed.load_state_dict(saved)
    parts += [c.latents for c in line.stream(chunks[5:], CONTEXT, cache=resumed, noise_source=source)]
    assert torch.equal(torch.cat(whole, 1), torch.cat(parts, 1))


def test_a_failed_chunk_is_taken_back():
    """With a save area, a chunk that fails in the middle leaves the stream where it was."""
    line, chunks = pipeline(), pipeline().split(clip(16))
    draws = [noise(1, 2, 4, 4, 6, seed=20 + i, dtype=torch.float32) for i in range(8)]
    whole = [c.latents for c in line.stream(chunks, CONTEXT, noise_source=Draws(draws))]

    def failing(like):
        raise KeyboardInterrupt

    cache = line.new_cache(1, 4, 6, undo_frames=2)
    parts = [c.latents for c in line.stream(chunks[:5], CONTEXT, cache=cache, noise_source=Draws(draws[:5]))]
    with pytest.raises(KeyboardInterrupt):
        next(line.stream(chunks[5:], CONTEXT, cache=cache, noise_source=failing))
    assert cache.next_frame == 10
    parts += [c.latents for c in line.stream(chunks[5:], CONTEXT, cache=cache, noise_source=Draws(draws[5:]))]
    assert torch.equal(torch.cat(whole, 1), torch.cat(parts, 1))


def published_rollout(line: StreamingPipeline, clip_noise, draws) -> torch.Tensor:
    """The same weights, noise and draws through the oracle of the published path."""
    config, stream = line.model.config, line.config
    sizes = {
        name: getattr(config, name)
        for name in published.WanConfig.__dataclass_fields__
        if hasattr(config, name)
    }
    tokens = 2 * 3 * stream.local_attn_size
    model = published.CausalWanModel(
        published.WanConfig(**sizes),
        sink_frames=stream.sink_frames,
        local_attn_size=stream.local_attn_size,
        max_attention_tokens=tokens,
        alpha=stream.alpha,
    ).to(line.model.dtype)
    model.load_state_dict(line.model.state_dict(), strict=True)
    scheduler = published.FlowMatchScheduler(stream.shift)
    steps = published.denoising_steps(scheduler, list(stream.denoising_step_list), stream.warp)
    remaining = iter(draws)
    return published.inference_rollout(
        model,
        scheduler,
        clip_noise,
        CONTEXT.to(clip_noise.dtype),
        model.new_caches(1, tokens),
        steps,
        chunk_frames=stream.chunk_frames,
        context_noise=stream.context_noise,
        draw=lambda like: next(remaining).flatten(0, 1),
    )


@torch.no_grad()
def test_a_long_stream_is_the_published_one():
    """Fifty chunks in float64: a cache that turns its sink at every chunk must not drift from one that never
    rotates what it holds."""
    line = pipeline(torch.float64, sink_frames=2, local_attn_size=6)
    source = clip(100, dtype=torch.float64)
    draws = [noise(1, 2, 4, 4, 6, seed=100 + i) for i in range(50)]
    ours = line.rollout(source, CONTEXT.double(), noise_source=Draws(draws))
    theirs = published_rollout(line, source, draws)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    still = pipeline(torch.float64, sink_frames=2, local_attn_size=6, sink_policy="static")
    static = still.rollout(source, CONTEXT.double(), noise_source=Draws(draws))
    assert (static[:, -2:] - theirs[:, -2:]).abs().max() > 1e-4, "without the average the end is another"


class HostReads(TorchDispatchMode):
    """Collects the operators that wait for a device value."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_a_stream_reads_nothing_back_to_the_host():
    line = pipeline()
    cache = line.new_cache(1, 4, 6)
    with HostReads() as reads:
        line.rollout(clip(12), CONTEXT, cache=cache, noise_source=seeded())
    assert reads.found == []
    with HostReads() as reads:
        torch.ones(1).item()
    assert reads.found, "the counter counts"


def test_samples_of_a_batch_are_independent():
    line = pipeline(torch.float64)
    batch = torch.cat((clip(8, dtype=torch.float64), clip(8, seed=3, dtype=torch.float64)))
    contexts = torch.cat((CONTEXT, 3 * CONTEXT)).double()
    draws = [noise(2, 2, 4, 4, 6, seed=s) for s in range(4)]
    both = line.rollout(batch, contexts, noise_source=Draws(draws))
    for b in range(2):
        draws_of_one = Draws([draw[b : b + 1] for draw in draws])
        one = line.rollout(batch[b : b + 1], contexts[b : b + 1], noise_source=draws_of_one)
        torch.testing.assert_close(both[b : b + 1], one, rtol=0, atol=1e-12)


def test_the_past_is_remembered_and_the_prefix_matters():
    line = pipeline(torch.float64)
    source = noise(1, 4, 4, 4, 6, seed=11)
    given = [noise(1, 4, 4, 4, 6, seed=s) for s in (12, 13)]
    latents = [
        line.rollout(source, CONTEXT.double(), initial_latent=g, noise_source=seeded())
        for g in (*given, given[0])
    ]
    assert torch.equal(latents[0][:, :4], given[0]) and latents[0].shape[1] == 8
    assert torch.equal(latents[0], latents[2]) and not torch.equal(latents[0][:, 4:], latents[1][:, 4:])


def test_chunks_are_pulled_one_at_a_time_from_an_endless_source():
    line, pulled = pipeline(), []

    def endless():
        while True:
            pulled.append(len(pulled))
            yield clip(2, seed=len(pulled))

    stream = line.stream(endless(), CONTEXT)
    assert not pulled
    for expected in range(3):
        assert next(stream).index == expected and len(pulled) == expected + 1
        assert torch.is_grad_enabled(), "the consumer's grad mode is its own"


def test_phases_are_reported_in_order():
    line, phases = pipeline(denoising_step_list=(1000, 750, 500)), []
    line.rollout(clip(4), CONTEXT, initial_latent=clip(2), on_phase=phases.append)
    chunk = [("denoise", 0), ("renoise", 0), ("denoise", 1), ("renoise", 1), ("denoise", 2), ("context", 0)]
    assert [(p.name, p.step) for p in phases] == [("prefix", 0), *chunk, *chunk]
    assert [p.chunk for p in phases] == [0] + [1] * 6 + [2] * 6 and all(p.seconds > 0 for p in phases)


def test_chunk_lengths():
    assert chunk_lengths(9, 3) == [3, 3, 3] and chunk_lengths(0, 3) == []
    assert chunk_lengths(7, 3, independent_first_frame=True) == [1, 3, 3]
    for frames, independent in ((8, False), (9, True)):
        with pytest.raises(rf.ArgumentError, match="frames"):
            chunk_lengths(frames, 3, independent_first_frame=independent)


def test_a_frame_by_itself_comes_first_in_a_stream_and_nowhere_else():
    line = pipeline(independent_first_frame=True)
    given, rest = clip(3), clip(4, seed=9)
    assert [part.shape[1] for part in line.split(given)] == [1, 2]
    assert [part.shape[1] for part in line.split(rest, starts_stream=False)] == [2, 2]
    whole = line.rollout(rest, CONTEXT, initial_latent=given, noise_source=seeded())
    assert whole.shape[1] == 7 and torch.equal(whole[:, :3], given)
    # The same in two calls: what continues a cache is cut into whole chunks, given frames as well.
    cache, source = line.new_cache(1, 4, 6), seeded()
    list(line.stream([], CONTEXT, initial_latent=given[:, :1], cache=cache))
    chunks = line.split(rest, starts_stream=False)
    parts = list(line.stream(chunks, CONTEXT, initial_latent=given[:, 1:], cache=cache, noise_source=source))
    assert torch.equal(torch.cat([c.latents for c in parts], 1), whole[:, 3:])
    assert [c.first_frame for c in parts] == [3, 5] and [c.index for c in parts] == [1, 2]


@pytest.mark.parametrize(
    "chunk_frames, sink_frames, visible, policy",
    [(1, 3, 4, "ema"), (4, 1, 6, "ema"), (2, 3, 6, "static"), (2, 0, 3, "none"), (5, 2, 7, "ema")],
)
def test_any_chunk_sink_and_window_streams(chunk_frames, sink_frames, visible, policy):
    line = pipeline(
        chunk_frames=chunk_frames, sink_frames=sink_frames, local_attn_size=visible, sink_policy=policy
    )
    cache = line.new_cache(1, 4, 6)
    latents = line.rollout(clip(6 * chunk_frames), CONTEXT, cache=cache, noise_source=seeded())
    assert torch.isfinite(latents).all() and cache.next_frame == 6 * chunk_frames
    assert (latents[:, -1] - latents[:, 0]).abs().max() > 0.01


# ---- scorers and losses
# ------------------------------------------------------------------------------------------------------------


def test_scorers_drive_the_losses():
    """Teacher and critic through every loss: finite, and the gradient goes where it belongs."""
    scheduler = FlowMatchScheduler(5.0)
    teacher = FlowPredictor(make(BidirectionalWanModel, tiny()), scheduler)
    critic = FlowPredictor(make(BidirectionalWanModel, tiny(), seed=1), scheduler).requires_grad_()
    text, empty = noise(2, 5, 10, seed=4), torch.zeros(2, 5, 10, dtype=torch.float64)

    def scorer(model, context):
        return lambda x_t, t: model(x_t, t, context).x0

    x, eps = noise(2, 3, 4, 4, 4).requires_grad_(), noise(2, 3, 4, 4, 4, seed=5)
    t = draw_timesteps(2, shift=5.0, generator=torch.Generator().manual_seed(0))
    common = {"noise": eps, "t": t, "scheduler": scheduler}
    scores = {
        "fake": scorer(critic, text),
        "real": scorer(teacher, text),
        "real_uncond": scorer(teacher, empty),
    }

    loss = dmd_loss(x, **scores, **common, real_guidance=3.0)
    (dx,) = torch.autograd.grad(loss, x)
    assert loss > 0 and dx.abs().max() > 0
    with torch.no_grad():
        x_t = scheduler.add_noise(x, eps, t)
        real = scores["real"](x_t, t)
        guided = real + 3.0 * (real - scores["real_uncond"](x_t, t))
        d = (scores["fake"](x_t, t) - guided) / (x - guided).abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(dx, d / d.numel(), rtol=1e-10, atol=0)
    torch.testing.assert_close(loss, d.square().mean() / 2, rtol=1e-10, atol=0)

    loss = critic_flow_loss(scores["fake"], x, **common)
    gradients = torch.autograd.grad(loss, list(critic.parameters()))
    assert loss > 0 and all(g.abs().max() > 0 for g in gradients)
    loss = critic_flow_loss(scores["fake"], x, **common)
    assert torch.autograd.grad(loss, x, allow_unused=True) == (None,), (
        "the generator is not trained by the critic's loss"
    )
    flow = critic(scheduler.add_noise(x.detach(), eps, t), t, text).flow
    torch.testing.assert_close(loss, (flow - (eps - x)).square().mean(), rtol=1e-9, atol=0)

    (dx,) = torch.autograd.grad(sid_loss(x, **scores, **common, real_guidance=3.0), x)
    assert torch.isfinite(dx).all() and dx.abs().max() > 0
