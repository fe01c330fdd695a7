"""Beside the published path: the same stream chunk by chunk, and each op at the stream's own shapes."""

import torch

import benchmarks as bench
import rf_kernels as rf
from benchmarks import published
from reward_forcing.job import PreparedStream
from reward_forcing.pipeline import Chunk


class PublishedTwin:
    """The published path with a stream's weights, text and noise, one chunk at a time."""

    def __init__(self, prepared: PreparedStream, grid: tuple[int, int]):
        model, stream = prepared.model, prepared.job.stream
        frame_tokens = grid[0] * grid[1]
        fields = {name: getattr(model.config, name) for name in published.WanConfig.__dataclass_fields__}
        twin = published.CausalWanModel(
            published.WanConfig(**fields),
            sink_frames=stream.sink_frames,
            local_attn_size=stream.local_attn_size,
            max_attention_tokens=stream.local_attn_size * frame_tokens,
            alpha=stream.alpha,
        )
        twin.load_state_dict(model.state_dict())
        twin.to(device=model.device, dtype=model.dtype).eval()
        scheduler = published.FlowMatchScheduler(shift=stream.shift)
        caches = twin.new_caches(1, stream.local_attn_size * frame_tokens)
        self.generator = published.Generator(twin, scheduler, caches, prepared.context)
        self.steps = published.denoising_steps(scheduler, list(stream.denoising_step_list), stream.warp)
        self.prepared = prepared

    @torch.no_grad()
    def chunk(self, ours: Chunk) -> torch.Tensor:
        """The latents that the published path makes of a chunk's noise."""
        noise = self.prepared.noise(ours.first_frame)
        return published.inference_chunk(
            self.generator,
            noise.draw(ours.latents.shape),
            self.steps,
            ours.first_frame,
            context_noise=self.prepared.job.stream.context_noise,
            draw=lambda like: noise.draw(ours.latents.shape).reshape(like.shape),
        )


def op_rows(
    config, stream, grid, batch: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> list[dict]:
    """Time of each op beside what the published path does in its place, at the stream's shapes, in the steady
    state."""
    n, chunk, heads, head_dim = grid[0] * grid[1], stream.chunk_frames, config.num_heads, config.head_dim
    tokens, num_sink_tokens = chunk * n, stream.sink_frames * n
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    q, k, v = (randn(batch, tokens, heads, head_dim) for _ in range(3))
    weight = randn(config.dim).abs()
    spec = rf.CacheSpec(
        layers=1,
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        grid=grid,
        sink_frames=stream.sink_frames,
        window_frames=stream.window_frames,
        rope=config.rope,
        dtype=dtype,
        device=device,
    )
    cache = rf.SinkWindowCache(spec, sink=stream.policy())
    twin = published.EMASinkKVCache(batch, stream.local_attn_size * n, heads, head_dim, dtype, device)
    norm = published.RMSNorm(config.dim, config.eps).to(device=device, dtype=dtype)
    norm.weight.data.copy_(weight)
    table = published.rope_table(head_dim, device=device)

    def read(q, end, attention):
        window = published.read_window(end, tokens, n, num_sink_tokens, stream.local_attn_size * n)
        return published.cached_attention(q, twin, window, (chunk, *grid), num_sink_tokens, table, attention)

    options = {"q_norm": weight, "k_norm": weight, "norm": "model"}

    def our_chunk(commit=True):
        opened = cache.open(chunk)
        out = opened.append(0, q, k, v, **options)
        if commit:
            opened.commit()
        return opened, out

    start = [0]

    def published_append(at):
        q_n, k_n = (norm(x.flatten(2)).view_as(x) for x in (q, k))
        end = twin.append(k_n, v, at, num_sink_tokens, stream.alpha)
        return read(q_n, end, lambda q, k, v: q)

    def published_chunk():
        published_append(start[0])
        start[0] += tokens

    with torch.no_grad():
        for _ in range(-(-stream.local_attn_size // chunk) + 1):
            our_chunk()
            published_chunk()
        opened, rotated = our_chunk(commit=False)
        last = start[0] - tokens
        rows = []

        def add(op, candidates, **counts):
            timings = bench.measure(candidates, device=device, seconds=seconds)
            shape = f"[{batch}, {chunk} x {grid[0]} x {grid[1]}, {heads}, {head_dim}]"
            rows.append(bench.row(op, shape, dtype, timings, **counts))

        add(
            "rope_append (repeat forward)",
            {
                "rf_kernels": lambda: opened.append(0, q, k, v, **options),
                "published": lambda: published_append(last),
            },
        )
        keys, values, kv_tokens, _ = opened.kv(0)
        contiguous = [keys.clone(), values.clone()]
        add(
            "sink_window_attention",
            {
                "rf_kernels": lambda: rf.sink_window_attention(
                    rotated, cache.k[0], cache.v[0], kv_tokens=kv_tokens
                ),
                "SDPA on contiguous keys": lambda: published.sdpa_attention(rotated, *contiguous),
            },
        )
        opened.commit()
        add(
            "first forward of a chunk (evict + append)",
            {"rf_kernels": our_chunk, "published": published_chunk},
        )

    shape = (1, 21, config.out_dim, grid[0] * config.patch_size[1], grid[1] * config.patch_size[2])
    x, fake, real, uncond = (randn(*shape) for _ in range(4))
    x.requires_grad_()

    def ours():
        x.grad = None
        rf.dmd_loss(x, fake=fake, real=real, real_uncond=uncond, real_guidance=3.0).backward()

    def eager():
        x.grad = None
        gradient, _ = published.dmd_gradient(x, fake, published.guide(real, uncond, 3.0))
        published.dmd_loss(x, gradient).backward()

    timings = bench.measure({"rf_kernels": ours, "published": eager}, device=device, seconds=seconds)
    rows.append(bench.row("dmd_gradient (loss and backward)", str(list(shape)), dtype, timings))
    return rows
