"""Other people's streaming systems from their own checkouts, small, for ``benchmarks.integrations``.

What is stubbed is stubbed here: their imports of packages and of encoders that are not needed, and
flash-attn's attention, for which PyTorch's own stands in, in the dtype of its inputs. A process can hold one
checkout: the systems share the names of their modules.
"""

import contextlib
import importlib
import sys
import types
from pathlib import Path

import torch
from torch import nn


class Settings(dict):
    """Their configuration objects: attributes and keys."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class _Stub(types.ModuleType):
    """A module of which any name can be imported, and nothing is used."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _shells(root: Path, *names: str) -> None:
    """Packages without their __init__, which would import all of a system."""
    for name in names:
        module = types.ModuleType(name)
        module.__path__ = [str(root / name.replace(".", "/"))]
        sys.modules[name] = module


def _stubs(*names: str) -> None:
    for name in names:
        sys.modules[name] = _Stub(name)


def attention(q, k, v, *args, **kwargs):
    """Of the signature of their `attention` and `flash_attention`, dense."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


class Vae:
    """Returns latents for pixels."""

    def decode_to_pixel(self, latent, use_cache=False):
        return latent


def _import(name: str, **replaced):
    module = importlib.import_module(name)
    for key, value in replaced.items():
        setattr(module, key, value)
    return module


class Rig:
    """One system, small. `run` streams a video and returns the latents."""

    #: Name of the checkout, and the ref in it (None: as it lies there).
    checkout, ref = "", None
    model_package, wrapper_module, pipeline_module = "wan.modules", "utils.wan_wrapper", ""
    #: Their rollout of training, where gradients are measured.
    training_module, training_class = "", ""
    training_options: dict = {}
    sink, window, chunk = 3, 9, 3
    #: Of a stream; 0: as many as all others have.
    frames = 0
    #: As `patch` takes it.
    family = "auto"
    extra: dict = {}

    def __init__(self, root, *, heads, head_dim, grid, layers=2, sink=None, window=None, chunk=None):
        self.root, self.heads, self.head_dim, self.grid, self.layers = (
            Path(root),
            heads,
            head_dim,
            grid,
            layers,
        )
        self.sink = self.sink if sink is None else sink
        self.window = self.window if window is None else window
        self.chunk = self.chunk if chunk is None else chunk
        self.frame_tokens = grid[0] * grid[1]
        if not hasattr(type(self), "code"):  # once a process
            self.load()

    # ---- what the systems share ----------------------------------------------------------------------------
    def load(self) -> None:
        sys.path.insert(0, str(self.root))
        import diffusers.models.modeling_utils  # noqa: F401  (looks for packages that are stubbed below)
        import transformers  # noqa: F401

        _stubs("einops", "ftfy", "easydict", "omegaconf", "demo_utils.memory", "utils.memory")
        _stubs(*(f"{self.model_package}.{name}" for name in ("tokenizers", "vae", "vae2_2", "t5")))
        _shells(self.root, self.model_package.split(".")[0], self.model_package, "pipeline", "utils")
        _import(f"{self.model_package}.model", flash_attention=attention)
        type(self).code = _import(f"{self.model_package}.causal_model", attention=attention)
        if hasattr(self.code, "flash_attention"):
            self.code.flash_attention = attention
        type(self).wrapper = _import(self.wrapper_module)

    def model_arguments(self) -> dict:
        return {"local_attn_size": self.window, "sink_size": self.sink}

    def generator(self, dtype, seed=0):
        width = self.heads * self.head_dim
        model = self.code.CausalWanModel(
            dim=width,
            ffn_dim=2 * width,
            freq_dim=32,
            text_dim=16,
            text_len=8,
            num_heads=self.heads,
            num_layers=self.layers,
            in_dim=4,
            out_dim=4,
            **self.model_arguments(),
        )
        draws = torch.Generator().manual_seed(seed)
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=draws)
            if p.dim() > 1 and "modulation" not in name:
                noise *= (p[0].numel()) ** -0.5
            else:
                noise *= 0.1
            p.data = noise + (1 if "norm" in name and name.endswith("weight") else 0)
        # Half precision and float64 run on the same numbers.
        model = model.to(torch.bfloat16).to(dtype).eval().requires_grad_(False)
        wrapper = self.wrapper.WanDiffusionWrapper.__new__(self.wrapper.WanDiffusionWrapper)
        nn.Module.__init__(wrapper)
        wrapper.model, wrapper.uniform_timestep, wrapper.seq_len = model, False, 32760
        wrapper.scheduler = self.wrapper.FlowMatchScheduler(shift=8.0, sigma_min=0.0, extra_one_step=True)
        wrapper.scheduler.set_timesteps(1000, training=True)
        wrapper._compiled_model_call = None
        wrapper.post_init()
        return wrapper

    def settings(self) -> Settings:
        return Settings(
            denoising_step_list=[1000, 600, 300],
            warp_denoising_step=False,
            context_noise=0,
            num_frame_per_block=self.chunk,
            independent_first_frame=False,
            model_kwargs=Settings(local_attn_size=self.window, sink_size=self.sink),
            **self.extra,
        )

    def text(self, dtype):
        def encode(text_prompts):
            draws = torch.Generator().manual_seed(len(text_prompts[0]))
            x = torch.randn(1, 8, 16, generator=draws).to(torch.bfloat16).to(dtype)
            return {"prompt_embeds": x.repeat(len(text_prompts), 1, 1)}

        return encode

    def noise(self, frames, dtype, seed=1):
        draws = torch.Generator().manual_seed(seed)
        shape = (1, frames, 4, 2 * self.grid[0], 2 * self.grid[1])
        return torch.randn(shape, generator=draws).to(torch.bfloat16).to(dtype)

    def pipeline(self, dtype):
        cls = getattr(_import(self.pipeline_module), self.pipeline_class)
        made = cls(
            self.settings(),
            "cpu",
            generator=self.generator(dtype),
            text_encoder=_Call(self.text(dtype)),
            vae=_Call(None),
        )
        made.frame_seq_length, made.num_transformer_blocks = self.frame_tokens, self.layers
        _resized(made, self.heads, self.head_dim)
        return made

    pipeline_class = "CausalInferencePipeline"

    def exits(self, chunks):
        """The denoising step of each chunk that has a gradient."""
        return [(i + 1) % 3 for i in range(chunks)]

    def trainer(self, frames):
        """Their rollout of `frames` frames in float64, under activation checkpointing, as they train."""
        generator = self.generator(torch.float64)
        generator.model.requires_grad_(True)
        generator.model.gradient_checkpointing = True
        for block in generator.model.blocks:
            block.self_attn.max_attention_size = self.window * self.frame_tokens
        made = getattr(_import(self.training_module), self.training_class)(
            torch.tensor([1000, 600, 300]),
            generator.scheduler,
            generator,
            num_frame_per_block=self.chunk,
            **self.training_options,
        )
        made.num_transformer_blocks, made.frame_seq_length = self.layers, self.frame_tokens
        made.kv_cache_size = frames * self.frame_tokens
        made.generate_and_sync_list = lambda blocks, steps, device: self.exits(blocks)
        _resized(made, self.heads, self.head_dim)
        return made

    def run(self, pipeline, frames, dtype):
        with same_noise(), contextlib.redirect_stdout(None), torch.no_grad():
            return self.stream(pipeline, self.noise(frames, dtype), dtype)

    def stream(self, pipeline, noise, dtype):
        pipeline.kv_cache1 = None
        return pipeline.inference(noise, ["a prompt"], return_latents=True)[1]


def _resized(pipeline, heads, head_dim) -> None:
    """Their caches are allocated for 12 heads of 128."""
    own = pipeline._initialize_kv_cache

    def sized(*args, **kwargs):
        own(*args, **kwargs)
        for name in ("kv_cache1", "kv_cache_pos", "kv_cache_neg"):
            for entry in getattr(pipeline, name, None) or ():
                for key in ("k", "v"):
                    shape = (*entry[key].shape[:2], heads, head_dim)
                    entry[key] = torch.zeros(shape, dtype=entry[key].dtype)

    pipeline._initialize_kv_cache = sized


class _Call(nn.Module):
    """A module that calls a function; as a VAE: the latents."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    def decode_to_pixel(self, latent, use_cache=False):
        return latent


@contextlib.contextmanager
def same_noise():
    """Draws that do not depend on the dtype, so that precisions can be compared."""
    own, draws = (torch.randn_like, torch.randn), torch.Generator().manual_seed(2)

    def randn(*shape, dtype=torch.float32, generator=None, **_):
        return own[1](*shape, generator=generator or draws).to(torch.bfloat16).to(dtype)

    torch.randn_like, torch.randn = lambda x, **_: randn(x.shape, dtype=x.dtype), randn
    try:
        yield
    finally:
        torch.randn_like, torch.randn = own


class SelfForcing(Rig):
    checkout, pipeline_module = "Self-Forcing", "pipeline.causal_inference"
    training_module, training_class = "pipeline.self_forcing_training", "SelfForcingTrainingPipeline"
    sink = 0
    ran = "inference pipeline"


class SelfForcingSink(SelfForcing):
    sink = 3
    ran = "inference pipeline, with a sink"


class RewardForcing(Rig):
    checkout, pipeline_module = "Reward-Forcing", "pipeline.causal_inference"
    training_module, training_class = "pipeline.reward_forcing_training", "RewardForcingTrainingPipeline"
    ran = "inference pipeline"


class CausalForcing(SelfForcing):
    checkout = "Causal-Forcing"


class InfiniteForcing(Rig):
    checkout, pipeline_module = "Infinite-Forcing", "pipeline.causal_inference"
    sink = 1
    ran = "inference pipeline"


class InfiniteForcingSink(InfiniteForcing):
    sink = 3
    ran = "inference pipeline, with three sink frames"


class RollingForcing(Rig):
    """Not for ``patch``, which refuses it: ``benchmarks.rolling`` compares its pipeline with ours."""

    checkout, pipeline_module = "RollingForcing", "pipeline.rolling_forcing_inference"
    window = 21
    ran = "inference pipeline"

    def settings(self):
        settings = super().settings()
        settings |= {"denoising_step_list": [1000, 800, 600, 400, 200], "warp_denoising_step": True}
        return settings

    def pipeline(self, dtype):
        made, n = super().pipeline(dtype), self.frame_tokens
        for block in made.generator.model.blocks:  # written for 1560 tokens a frame
            block.self_attn.frame_length, block.self_attn.block_length = n, self.chunk * n
            block.self_attn.max_attention_size = self.window * n

        def sized(batch_size, dtype, device):
            shape = (batch_size, (self.window + self.chunk) * n, self.heads, self.head_dim)
            made.kv_cache_clean = [
                {name: torch.zeros(shape, dtype=dtype) for name in ("k", "v")}
                | {f"{name}_end_index": torch.tensor([0]) for name in ("global", "local")}
                for _ in range(self.layers)
            ]

        made._initialize_kv_cache = sized
        return made

    def stream(self, pipeline, noise, dtype):
        pipeline.kv_cache_clean = None
        return pipeline.inference_rolling_forcing(noise, ["a prompt"], return_latents=True)[1]


class LongLive(Rig):
    checkout, ref, pipeline_module = "LongLive", "origin/v1.0", "pipeline.causal_inference"
    ran = "inference pipeline"


class LongLiveSchedule(LongLive):
    """Its trainer's schedule of windows over the denoising steps. With gradients at other steps its own
    checkpoints fail: they are computed again with the window that was set last."""

    training_module, training_class = "pipeline.self_forcing_training", "SelfForcingTrainingPipeline"
    training_options = {"local_attn_size": [9, 6, 7]}

    def exits(self, chunks):
        return [2] * chunks


class LongLiveSwitch(LongLive):
    pipeline_module, pipeline_class = (
        "pipeline.interactive_causal_inference",
        "InteractiveCausalInferencePipeline",
    )
    ran = "prompt switches, window and sink cached again"
    extra = {"global_sink": False}

    def stream(self, pipeline, noise, dtype):
        pipeline.generator.model._prepare_blockwise_causal_attn_mask = lambda **_: (
            None
        )  # no FlexAttention here
        half = noise.shape[1] // self.chunk // 2 * self.chunk
        prompts, switches = [["a prompt"], ["another one"], ["the third"]], [half, half + 2 * self.chunk]
        return pipeline.inference(
            noise, text_prompts_list=prompts, switch_frame_indices=switches, return_latents=True
        )[1]


class LongLiveGlobalSink(LongLiveSwitch):
    ran = "prompt switches, the sink stays"
    extra = {"global_sink": True}


class LongLive2(Rig):
    checkout = "LongLive"
    model_package, wrapper_module = "wan_5b.modules", "utils.wan_5b_wrapper"
    pipeline_module, pipeline_class = (
        "pipeline.causal_diffusion_inference",
        "CausalDiffusionInferencePipeline",
    )
    ran = "diffusion pipeline, 3 UniPC steps"

    def load(self):
        _stubs("transformers.models.x_clip.modeling_x_clip", "utils.dataset")
        sys.modules["utils.dataset"].DEFAULT_SCENE_CUT_PREFIX = "The scene changes: "
        super().load()
        self.code._TRITON_ROPE_ENABLED = self.code._TRITON_ADALN_ENABLED = False
        self.code._FREQS_I_CACHE_ENABLED = False
        _shells(self.root, "wan_5b.utils")
        name = "Wan2.2-TI2V-5B"
        config = _import("utils.config")
        config.wan_default_config[name] |= {"num_transformer_blocks": self.layers}

    def settings(self):
        settings = super().settings()
        settings["model_kwargs"] |= {"model_name": "Wan2.2-TI2V-5B"}
        return Settings(
            settings,
            image_or_video_shape=[1, 1, 4, 2 * self.grid[0], 2 * self.grid[1]],
            inference=Settings(sampling_steps=3, local_attn_size=self.window, sink_size=self.sink),
        )

    def stream(self, pipeline, noise, dtype):
        pipeline.clear_cache()
        prompts = [self.prompts(noise.shape[1] // self.chunk)]
        return pipeline.inference(noise, prompts, return_latents=True)

    def prompts(self, chunks):
        return ["a prompt"] * chunks


class LongLive2Relative(LongLive2):
    ran = "the same with use_relative_rope"
    extra = {"use_relative_rope": True}


class LongLive2Shots(LongLive2):
    ran = "shots with positions of their own, a temporal scale"
    extra = {"multi_shot_rope_offset": 6.5, "inference_t_scale": 0.75}

    def prompts(self, chunks):
        return [f"The scene changes: {i}" if i in (2, 3, 8) else "a prompt" for i in range(chunks)]


class LongLive2Pinned(LongLive2Shots):
    """As its configurations have it."""

    ran = "the same, the first chunk of each shot pinned (`multi_shot_sink`)"
    frames = 36

    def settings(self):
        settings = super().settings()
        settings["inference"]["multi_shot_sink"] = True
        return settings


class StreamDiffusion(Rig):
    checkout = "StreamDiffusionV2"
    model_package, chunk, window = "models.wan.wan_base.modules", 1, 7
    ran = "stream, one sample a denoising step"

    def load(self):
        sys.path.insert(0, str(self.root))
        import diffusers.models.modeling_utils  # noqa: F401
        import transformers  # noqa: F401

        _stubs("einops", "ftfy", "easydict", "omegaconf", "models.wan.taehv_wrapper")
        _stubs(*(f"{self.model_package}.{name}" for name in ("tokenizers", "vae", "t5")))
        _stubs("models")  # names in it are imported, and not used
        sys.modules["models"].__path__ = [str(self.root / "models")]
        _shells(self.root, "models.wan", "models.wan.wan_base", self.model_package)
        _import(f"{self.model_package}.model", flash_attention=attention)
        type(self).code = _import("models.wan.causal_model", attention=attention)
        self.code.attention_with_kvcache_fallback = self.attention_with_lengths
        type(self).wrapper = _import("models.wan.wan_wrapper")
        self.code.warnings.warn = lambda *_, **__: None
        type(self).streaming = _import("models.wan.causal_stream_inference")

    @staticmethod
    def attention_with_lengths(q, k_cache, v_cache, cache_seqlens):
        """Their fallback computes half precision in float32 on a CPU; the others here do not."""
        rows = zip(q, k_cache, v_cache, cache_seqlens.tolist(), strict=True)
        return torch.cat([attention(a[None], b[None, :n], c[None, :n]) for a, b, c, n in rows])

    def model_arguments(self):
        return {}

    def generator(self, dtype, seed=0):
        made = super().generator(dtype, seed)
        made.__class__ = self.wrapper.CausalWanDiffusionWrapper
        return made

    def pipeline(self, dtype):
        made = self.streaming.CausalStreamInferencePipeline.__new__(
            self.streaming.CausalStreamInferencePipeline
        )
        nn.Module.__init__(made)
        made.generator, made.text_encoder, made.device = self.generator(dtype), _Call(self.text(dtype)), "cpu"
        made.num_transformer_blocks, made.num_heads = self.layers, self.heads
        made.frame_seq_length, made.num_frame_per_block = self.frame_tokens, self.chunk
        made.kv_cache_length, made.num_sink_tokens = self.window * self.frame_tokens, self.sink
        made.adapt_sink_threshold = -1
        made.scheduler = made.generator.get_scheduler()
        _resized(made, self.heads, self.head_dim)
        own_cross = made._initialize_crossattn_cache

        def cross(*args, **kwargs):
            own_cross(*args, **kwargs)
            for entry in made.crossattn_cache:
                for key in ("k", "v"):
                    shape = (*entry[key].shape[:1], 8, self.heads, self.head_dim)
                    entry[key] = torch.zeros(shape, dtype=entry[key].dtype)

        made._initialize_crossattn_cache = cross
        return made

    def stream(self, pipeline, noise, dtype):
        pipeline.kv_cache1 = None
        for block in pipeline.generator.model.blocks:
            block.self_attn.evict_idx = None
        pipeline.denoising_step_list = torch.tensor([700, 500, 300])
        n, first = self.frame_tokens, 1 + self.chunk
        outs = [
            pipeline.prepare(
                ["a prompt"], "cpu", dtype, noise=noise[:, :first], current_start=0, current_end=first * n
            )
        ]
        at, refresh = first, self.refresh
        for i in range(first, noise.shape[1] - self.chunk + 1, self.chunk):
            if refresh and at >= refresh:
                at = self.window - 1
            step = noise[:, i : i + self.chunk]
            out = pipeline.inference_stream(step, at * n, (at + self.chunk) * n, 700)
            outs.append(out[-1:])
            at += self.chunk
        return torch.cat(outs[:1] + outs[4:], 1)

    refresh = 0


class StreamDiffusionRefresh(StreamDiffusion):
    ran = "the same, positions refreshed after 12 frames"
    refresh = 12


class ScopeRewardForcing(Rig):
    """Scope's own copies of the modules, under the blocks of its pipelines that denoise and keep caches."""

    checkout, package, ran = "scope", "reward_forcing", "blocks of its Reward Forcing pipeline"

    def load(self):
        base, source = "scope.core.pipelines", self.root / "src"
        sys.path.insert(0, str(source))
        import diffusers.modular_pipelines  # noqa: F401
        import transformers  # noqa: F401

        _stubs("einops", "ftfy", "easydict", "omegaconf", f"{base}.utils", f"{base}.wan2_1.modules.attention")
        for name in ("attention", "flash_attention"):
            setattr(sys.modules[f"{base}.wan2_1.modules.attention"], name, attention)
        _shells(source, "scope", "scope.core", base, f"{base}.{self.package}")
        _shells(source, *(f"{base}.wan2_1{name}" for name in ("", ".components", ".blocks", ".modules")))
        _shells(source, f"{base}.{self.package}.modules")
        type(self).code = _import(f"{base}.{self.package}.modules.causal_model")
        type(self).wrapper = _import(f"{base}.wan2_1.components.generator")
        type(self).components = _import(f"{base}.components")
        blocks = ("setup_caches", "set_transformer_blocks_local_attn_size", "denoise", "clean_kv_cache")
        type(self).blocks = [_import(f"{base}.wan2_1.blocks.{name}") for name in blocks]

    def pipeline(self, dtype):
        config = {
            "num_frame_per_block": self.chunk,
            "local_attn_size": self.window,
            "vae_spatial_downsample_factor": 8,
            "patch_embedding_spatial_downsample_factor": 2,
            "max_rope_freq_table_seq_len": 1024,
        }
        made = self.components.ComponentsManager(config)
        made.add("generator", self.generator(dtype))
        made.add("scheduler", made.generator.get_scheduler())
        return made

    used = ("SetupCaches", "SetTransformerBlocksLocalAttnSize", "Denoise", "CleanKVCache")

    def stream(self, pipeline, noise, dtype):
        from diffusers.modular_pipelines import PipelineState

        found = [
            getattr(module, f"{name}Block")
            for module in self.blocks
            for name in self.used
            if hasattr(module, f"{name}Block")
        ]
        state, outs, steps = PipelineState(), [], [block() for block in found]
        given = {
            "height": 16 * self.grid[0],
            "width": 16 * self.grid[1],
            "conditioning_embeds": self.text(dtype)(["a prompt"])["prompt_embeds"],
            "current_denoising_step_list": torch.tensor([1000, 600, 300]),
            "kv_cache_attention_bias": 1.0,
            "vace_context_scale": 1.0,
            "manage_cache": True,
            "generator": torch.Generator().manual_seed(2),
        }
        for name, value in given.items():
            state.set(name, value)
        for at in range(0, noise.shape[1], self.chunk):
            state.set("current_start_frame", at)
            state.set("latents", noise[:, at : at + self.chunk])
            for step in steps:
                step(pipeline, state)
            outs.append(state.get("latents"))
        return torch.cat(outs, 1)


class ScopeLongLive(ScopeRewardForcing):
    package, ran = "longlive", "blocks of its LongLive pipeline"


class ScopeStreamDiffusion(ScopeRewardForcing):
    package, ran = "streamdiffusionv2", "blocks of its StreamDiffusionV2 pipeline"
    chunk, window, family = 1, 6, "scope_streamdiffusionv2"
    used = ("SetupCaches", "Denoise", "CleanKVCache")

    def model_arguments(self):
        return {}


SYSTEMS = {
    "self_forcing": SelfForcing,
    "self_forcing_sink": SelfForcingSink,
    "reward_forcing": RewardForcing,
    "causal_forcing": CausalForcing,
    "infinite_forcing": InfiniteForcing,
    "infinite_forcing_sink": InfiniteForcingSink,
    "longlive": LongLive,
    "longlive_schedule": LongLiveSchedule,
    "longlive_switch": LongLiveSwitch,
    "longlive_global_sink": LongLiveGlobalSink,
    "longlive2": LongLive2,
    "longlive2_relative": LongLive2Relative,
    "longlive2_shots": LongLive2Shots,
    "longlive2_pinned": LongLive2Pinned,
    "streamdiffusionv2": StreamDiffusion,
    "streamdiffusionv2_refresh": StreamDiffusionRefresh,
    "scope_reward_forcing": ScopeRewardForcing,
    "scope_longlive": ScopeLongLive,
    "scope_streamdiffusionv2": ScopeStreamDiffusion,
}
#: Where upstream does something else: (system, what, settings).
FAULTS = {
    "reward_forcing_sink": (RewardForcing, {"sink": 2}),
    "longlive_sink": (LongLive, {"sink": 4}),
    "streamdiffusionv2_sink": (StreamDiffusion, {"sink": 0}),
}
