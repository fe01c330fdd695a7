"""A whole denoising forward and a whole streamed chunk of a Wan model with random weights, beside the
published path.

    python -m benchmarks.gpu_suite.model --device cuda --rows FILE

Candidates:
- rf_kernels: ``CausalWanModel`` and ``StreamingPipeline``, launched from Python.
- rf_kernels, graph: the same forwards captured once in CUDA graphs and replayed under each chunk's plan.
- published, same attention: the published path with ``rf_kernels.sink_window_attention`` as its attention
  kernel.
- published: as it is, on PyTorch's attention.
All have the same weights and have streamed the same chunks until the cache was full; their flows are compared
before they are timed. It is a stage of ``python -m benchmarks.gpu_suite``, which starts it in a process of
its own.
"""

from __future__ import annotations

import itertools
import time

import torch

import rf_kernels as rf
from benchmarks import published
from benchmarks.gpu_suite.jobs import Job, Options, measured_roof, run_jobs
from reward_forcing.config import ModelConfig, StreamConfig
from reward_forcing.models import CausalWanModel
from reward_forcing.pipeline import StreamingPipeline
from rf_kernels.testing import relative_l2

#: Rounding of thirty layers in half precision, at different places: a gross error is what must stop the
#: benchmark.
AGREEMENT = 0.1
TINY = ModelConfig(
    dim=64, ffn_dim=64, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=4, freq_dim=8
)


class Ours:
    """A stream of ours: ``forward`` repeats the last forward of an open chunk, ``chunk`` streams a whole
    one."""

    def __init__(
        self, model: CausalWanModel, stream: StreamConfig, latent: torch.Tensor, context: torch.Tensor
    ):
        self.pipeline, self.frames = StreamingPipeline(model, stream), latent.shape[1]
        self.model, self.latent, self.context = model, latent, context
        self.text = model.text_keys(context)
        self.cache = self.pipeline.new_cache(1, *latent.shape[3:])
        self.t = torch.zeros(1, 1, device=latent.device)
        self.x = latent.transpose(1, 2).clone()

    def step(self, latent: torch.Tensor) -> None:
        """One chunk in a single forward."""
        with self.cache.chunk(self.frames) as chunk:
            self.model(latent.transpose(1, 2), self.t, self.text, chunk)

    def open(self) -> None:
        self.chunk = self.cache.open(self.frames)

    def close(self) -> None:
        self.chunk.mark_written()  # what the replay of a graph cannot note down
        self.chunk.commit()

    def forward(self) -> torch.Tensor:
        return self.model(self.x, self.t, self.text, self.chunk)

    def chunks(self):
        """An endless stream, a chunk a ``next``."""
        return self.pipeline.stream(itertools.repeat(self.latent), self.context, cache=self.cache)


class Captured:
    """The forward of a stream's open chunk, captured in a CUDA graph; ``flow`` is what its replays write.
    Without CUDA (dry runs) a replay is a call."""

    def __init__(self, stream: Ours):
        self.stream, self.graph = stream, None
        if stream.latent.is_cuda:
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.flow = stream.forward()

    def replay(self) -> torch.Tensor:
        if self.graph is None:
            self.flow = self.stream.forward()
        else:
            self.graph.replay()
        return self.flow


class Graphs:
    """The two forwards of a chunk in a full cache: the first, which evicts, and the repeated one. Takes a
    chunk to make."""

    def __init__(self, stream: Ours):
        self.stream = stream
        stream.open()
        self.first = Captured(stream)  # nothing of the chunk has been evicted yet: this capture contains it
        self.first.replay()
        self.repeat = Captured(stream)
        stream.close()

    def _forward(self, captured: Captured, latent: torch.Tensor, t: float) -> torch.Tensor:
        self.stream.x.copy_(latent.transpose(1, 2))
        self.stream.t.fill_(t)
        return captured.replay().transpose(1, 2)

    def chunk(self) -> torch.Tensor:
        """As ``StreamingPipeline`` streams one: the denoising steps, then the context forward."""
        stream, pipeline = self.stream, self.stream.pipeline
        timesteps, z = pipeline.timesteps, stream.latent

        def on_device(t):
            return torch.full((1,), t, device=z.device)

        stream.open()
        for step, t in enumerate(timesteps):
            flow = self._forward(self.first if step == 0 else self.repeat, z, t)
            x0 = pipeline.scheduler.x0_from_flow(flow, z, on_device(t))
            if step + 1 < len(timesteps):
                z = pipeline.scheduler.add_noise(x0, torch.randn_like(x0), on_device(timesteps[step + 1]))
        self._forward(self.repeat, x0, float(pipeline.config.context_noise))
        stream.close()
        return x0


class Published:
    """The published path under the same weights."""

    def __init__(self, model: CausalWanModel, stream: StreamConfig, latent, context, attention):
        config, device = model.config, model.device
        fields = {name: getattr(config, name) for name in published.WanConfig.__dataclass_fields__}
        frame_tokens = torch.Size(config.grid(*latent.shape[3:])).numel()
        capacity = stream.local_attn_size * frame_tokens
        with torch.device(device):
            self.model = published.CausalWanModel(
                published.WanConfig(**fields),
                sink_frames=stream.sink_frames,
                local_attn_size=stream.local_attn_size,
                max_attention_tokens=capacity,
                alpha=stream.alpha,
                attention=attention,
            )
        self.model.to(model.dtype).requires_grad_(False)
        self.model.load_state_dict(model.state_dict())
        self.caches = self.model.new_caches(1, capacity)
        self.scheduler = published.FlowMatchScheduler(stream.shift, device=device)
        self.steps = published.denoising_steps(self.scheduler, list(stream.denoising_step_list), stream.warp)
        self.generator = published.Generator(self.model, self.scheduler, self.caches, context)
        self.latent, self.context, self.tokens = latent, context, latent.shape[1] * frame_tokens
        self.frames, self.t_begin = latent.shape[1], 0
        self.t = torch.zeros(1, 1, device=device)

    def run(self, latent: torch.Tensor) -> torch.Tensor:
        start = self.t_begin // self.frames * self.tokens
        return self.model(latent.transpose(1, 2), self.t, self.context, self.caches, start)

    def step(self, latent: torch.Tensor) -> None:
        self.run(latent)
        self.t_begin += self.frames

    def forward(self) -> torch.Tensor:
        return self.run(self.latent)

    def chunk(self) -> torch.Tensor:
        x0 = published.inference_chunk(self.generator, self.latent, self.steps, self.t_begin)
        self.t_begin += self.frames
        return x0


def same_attention(q, k, v):
    return rf.sink_window_attention(q, k, v, kv_tokens=k.shape[1])


class Bench:
    """Model, latents and the two jobs; each job builds streams of its own."""

    def __init__(self, options: Options):
        tiny = options.tiny
        self.options = options
        self.config = TINY if tiny else ModelConfig.wan_1_3b()
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.size = (1, 3, self.config.in_dim, *((8, 8) if tiny else (60, 104)))
        self.stream = StreamConfig(denoising_step_list=(1000, 500) if tiny else (1000, 750, 500, 250))
        torch.manual_seed(0)
        with torch.device(options.device):
            model = CausalWanModel(self.config)
        self.model = model.to(self.dtype).requires_grad_(False)

    def draw(self, *shape) -> torch.Tensor:
        return torch.randn(shape, device=self.options.device).to(self.dtype)

    def streams(self) -> dict:
        """Every path after the same chunks, as many as fill the cache and evict twice; the graphs' stream
        last."""
        latent, context = self.draw(*self.size), self.draw(1, self.config.text_len, self.config.text_dim)
        given = (self.model, self.stream, latent, context)
        paths = {
            "rf_kernels": Ours(*given),
            "published, same attention": Published(*given, same_attention),
            "published": Published(*given, published.sdpa_attention),
            "rf_kernels, graph": Ours(*given),
        }
        for _ in range(self.stream.local_attn_size // self.size[1] + 2):
            chunk = self.draw(*self.size)
            for path in paths.values():
                path.step(chunk)
        return paths

    def build_forward(self, device: str):
        paths = self.streams()
        for path in paths.values():
            if isinstance(path, Ours):
                path.open()
        calls = {name: path.forward for name, path in paths.items()}
        expected = calls["rf_kernels"]().clone()
        for name, call in calls.items():
            error = relative_l2(call(), expected)
            if not error <= AGREEMENT:
                raise AssertionError(f"{name}: the flow differs from ours by {error:.1e}")
        calls["rf_kernels, graph"] = Captured(paths["rf_kernels, graph"]).replay
        return calls, {}

    def build_chunk(self, device: str):
        paths = self.streams()
        stream = paths["rf_kernels"].chunks()
        calls = {"rf_kernels": lambda: next(stream).latents}
        calls["rf_kernels, graph"] = Graphs(paths["rf_kernels, graph"]).chunk
        calls |= {name: path.chunk for name, path in paths.items() if isinstance(path, Published)}
        for name, call in calls.items():
            if not bool(call().isfinite().all()):
                raise AssertionError(f"{name}: latents that are not finite")
        return calls, {}

    def jobs(self) -> list[Job]:
        """FLOPs of the self-attention and of the linear layers that see every token; bytes are those of the
        weights."""
        config, dtype = self.config, self.dtype
        tokens = self.size[1] * torch.Size(config.grid(*self.size[3:])).numel()
        keys = self.stream.local_attn_size * tokens // self.size[1]
        attention = 4 * tokens * keys * config.dim + 4 * tokens * config.text_len * config.dim
        linear = 2 * tokens * (6 * config.dim**2 + 2 * config.dim * config.ffn_dim)
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        forwards = len(self.stream.denoising_step_list) + 1
        cost = {"flops": config.num_layers * (attention + linear), "bytes": weights}
        label = f"{config.num_layers} layers, {tokens} x {keys} tokens, {config.num_heads} heads"
        names = ("rf_kernels", "rf_kernels, graph", "published, same attention", "published")
        per_chunk = {name: forwards * value for name, value in cost.items()}
        return [
            Job("denoising forward", label, dtype, self.build_forward, cost, eager=names),
            Job(
                f"streamed chunk of {forwards} forwards",
                label,
                dtype,
                self.build_chunk,
                per_chunk,
                eager=names,
            ),
        ]

    def series(self, chunks: int) -> None:
        """Seconds of every chunk of a long stream, as far as the time goes."""
        latent, context = self.draw(*self.size), self.draw(1, self.config.text_len, self.config.text_dim)
        stream = Ours(self.model, self.stream, latent, context)
        cuda, times = self.options.device == "cuda", []
        for _ in range(self.stream.local_attn_size // self.size[1] + 2):
            stream.step(latent)
        call = Graphs(stream).chunk
        while len(times) < chunks and self.options.left > 2:
            begin = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        self.options.rows.add("series", name="rf_kernels, graph", what="seconds per chunk", values=times)


def main(arguments=None) -> None:
    options = Options.parse(arguments)
    with torch.no_grad():
        bench = Bench(options)
        run_jobs(bench.jobs(), options, measured_roof(options))
        bench.series(5 if options.tiny else 1000)


if __name__ == "__main__":
    main()
