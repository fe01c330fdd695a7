"""The example of docs/porting.md: the page prints the file, and it computes what plain PyTorch does."""

import runpy
from pathlib import Path

import torch

import rf_kernels as rf

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "python/examples/streaming_dit.py"


def test_the_page_prints_the_file():
    assert f"```python\n{EXAMPLE.read_text()}```" in (ROOT / "docs/porting.md").read_text()


class PlainChunk:
    """``attend`` in PyTorch: all frames so far, rotated one by one."""

    def __init__(self, past, start, grid, rope):
        self.past, self.start, self.grid, self.rope = past, start, grid, rope

    def attend(self, layer, q, k, v, *, q_norm, k_norm):
        q, k = q_norm(q), k_norm(k)
        frames = q.shape[1] // (self.grid[0] * self.grid[1])
        axes = (range(self.start, self.start + frames), range(self.grid[0]), range(self.grid[1]))
        where = torch.cartesian_prod(*(torch.tensor(a) for a in axes)).double()
        turns = [where[:, i, None] * torch.tensor(self.rope.frequencies(i)) for i in range(3)]
        turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.cat(turns, 1))[:, None]

        def rotated(x):
            a, b = x.chunk(2, -1)
            y = torch.complex(a, b) * turn
            return torch.cat((y.real, y.imag), -1)

        keys, values = self.past.setdefault(layer, ([], []))
        keys, values = torch.cat([*keys, rotated(k)], 1), torch.cat([*values, v], 1)
        self.own = {**getattr(self, "own", {}), layer: (rotated(k), v)}
        y = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (rotated(q), keys, values)), enable_gqa=True
        )
        return y.transpose(1, 2)

    def commit(self):
        for layer, (k, v) in self.own.items():
            self.past[layer][0].append(k)
            self.past[layer][1].append(v)


def test_the_example_streams_what_plain_pytorch_computes():
    example = runpy.run_path(str(EXAMPLE))
    torch.manual_seed(0)
    model = example["StreamingDiT"]().double().requires_grad_(False)
    cache, past = model.cache(sink_frames=0, window_frames=8, policy=rf.NoSink()), {}
    for i in range(4):
        x, t = (
            torch.randn(1, 2, 8, *example["GRID"], dtype=torch.float64),
            torch.rand(1, 1, dtype=torch.float64),
        )
        plain = PlainChunk(past, 2 * i, example["GRID"], example["ROPE"])
        with cache.chunk(2) as chunk:
            for _ in range(2):
                found, wanted = (model(x, t, c) for c in (chunk, plain))
                assert (found - wanted).norm() < 1e-12 * wanted.norm()
        plain.commit()
