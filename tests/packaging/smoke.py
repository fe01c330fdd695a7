"""What an installed wheel must do: stream twelve chunks through a cache and agree with attention over keys
kept outside it."""

import torch

import rf_kernels as rf


def main():
    torch.manual_seed(0)
    heads, head_dim, grid, frames, window = 2, 32, (2, 3), 2, 4
    rope = rf.RoPE3D.wan(head_dim)
    spec = rf.CacheSpec(
        layers=1,
        batch=1,
        heads=heads,
        head_dim=head_dim,
        grid=grid,
        sink_frames=0,
        window_frames=window,
        rope=rope,
        dtype=torch.float64,
        device="cpu",
    )
    cache = rf.SinkWindowCache(spec, sink=rf.NoSink())
    tokens = frames * spec.frame_tokens
    keys, values, worst = [], [], 0.0
    for _ in range(12):
        q, k, v = (torch.randn(1, tokens, heads, head_dim, dtype=torch.float64) for _ in range(3))
        with cache.chunk(frames) as chunk:
            out = chunk.attend(0, q, k, v)
        positions = [range(chunk.first_frame, chunk.first_frame + frames), range(grid[0]), range(grid[1])]
        angles, axes = rope.table(positions, dtype=torch.float64)
        rotated = rf.rope(q, angles=angles, axes=axes)
        keys.append(rf.rope(k, angles=angles, axes=axes))
        values.append(v)
        k_all, v_all = torch.cat(keys[-window // frames :], 1), torch.cat(values[-window // frames :], 1)
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (rotated, k_all, v_all))
        )
        worst = max(worst, float((out - expected.transpose(1, 2)).abs().max()))
    assert worst < 1e-12, worst
    print(
        f"smoke: 12 chunks streamed, largest difference {worst:.1e}, served by {rf.last_dispatch().backend}"
    )


if __name__ == "__main__":
    main()
