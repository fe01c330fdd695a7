"""A small video DiT that is not Wan: a fused qkv projection, grouped key heads, a norm per head, rotation of
half against half, AdaLN from one vector, frames of another grid. It streams on a SinkWindowCache."""

import torch
from torch import nn

import rf_kernels as rf

DIM, HEADS, KV_HEADS, HEAD_DIM, GRID = 64, 4, 2, 16, (3, 5)
ROPE = rf.RoPE3D(pairs=(2, 3, 3), bases=(256.0, 1000.0, 1000.0), layout="half")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.adaln = nn.Linear(DIM, 6 * DIM)
        self.norm1, self.norm2 = (nn.LayerNorm(DIM, elementwise_affine=False) for _ in range(2))
        self.qkv = nn.Linear(DIM, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.q_norm, self.k_norm = nn.RMSNorm(HEAD_DIM, eps=1e-6), nn.RMSNorm(HEAD_DIM, eps=1e-6)
        self.out = nn.Linear(HEADS * HEAD_DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.SiLU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x, condition, chunk, layer):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(condition)[:, None].chunk(6, -1)
        qkv = self.qkv(self.norm1(x) * (1 + scale1) + shift1).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=2)  # views: nothing is copied
        y = chunk.attend(layer, q, k, v, q_norm=self.q_norm, k_norm=self.k_norm)  # the one line of the port
        x = x + gate1 * self.out(y.flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class StreamingDiT(nn.Module):
    def __init__(self, layers=2, channels=8):
        super().__init__()
        self.embed, self.head = nn.Linear(channels, DIM), nn.Linear(DIM, channels)
        self.time = nn.Sequential(nn.Linear(1, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def cache(self, batch=1, window_frames=6, sink_frames=2, policy=None):
        parameter = next(self.parameters())
        spec = rf.CacheSpec(
            layers=len(self.blocks),
            batch=batch,
            heads=KV_HEADS,
            head_dim=HEAD_DIM,
            grid=GRID,
            sink_frames=sink_frames,
            window_frames=window_frames,
            rope=ROPE,
            dtype=parameter.dtype,
            device=parameter.device,
        )
        return rf.SinkWindowCache(spec, sink=policy or rf.EMASink(alpha=0.99))

    def forward(self, noisy, t, chunk):
        """noisy ``[B, F, channels, rows, columns]``, t ``[B, 1]``; the velocity, of noisy's shape."""
        x = self.embed(noisy.movedim(2, -1).flatten(1, 3))
        condition = self.time(t)
        for layer, block in enumerate(self.blocks):
            x = block(x, condition, chunk, layer)
        return self.head(x).unflatten(1, (-1, *GRID)).movedim(-1, 2)


@torch.inference_mode()
def generate(model, chunks, frames=2, steps=(1.0, 0.6, 0.3)):
    cache, video = model.cache(), []
    for _ in range(chunks):
        x = torch.randn(1, frames, 8, *GRID)
        with cache.chunk(frames) as chunk:
            for t, after in zip(steps, (*steps[1:], 0.0), strict=True):
                x = x - (t - after) * model(x, torch.full((1, 1), t), chunk)  # a step of the flow
            model(x, torch.zeros(1, 1), chunk)  # the clean frames' keys and values stay
        video.append(x)
    return torch.cat(video, 1)
