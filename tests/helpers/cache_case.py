"""Small caches and chunks drawn from seeds, for the tests of tests/cache/."""

import torch

import rf_kernels as rf

HALF = (torch.bfloat16, torch.float16)


def make(
    frames_sink,
    frames_window,
    *,
    policy=None,
    dtype=torch.float64,
    grid=(2, 3),
    heads=2,
    head_dim=32,
    layers=1,
    **more,
):
    """A cache; without a policy, NoSink without sink frames and EMASink with."""
    settings = {"batch": 1, "rope": rf.RoPE3D.wan(head_dim), "device": "cpu"} | more
    spec = rf.CacheSpec(
        layers=layers,
        heads=heads,
        head_dim=head_dim,
        grid=grid,
        sink_frames=frames_sink,
        window_frames=frames_window,
        dtype=dtype,
        **settings,
    )
    policy = policy or (rf.EMASink() if frames_sink else rf.NoSink())
    return rf.SinkWindowCache(spec, sink=policy)


def tensors(cache, frames, seed, q_heads=None):
    """q, k, v of a chunk."""
    generator, spec = torch.Generator().manual_seed(seed), cache.spec
    tokens, heads = frames * spec.frame_tokens, (q_heads or spec.heads, spec.heads, spec.heads)
    return [
        torch.randn(spec.batch, tokens, h, spec.head_dim, generator=generator).to(spec.dtype) for h in heads
    ]


def text_of(cache, frame):
    """Keys of a text that is another one every nine frames."""
    spec, generator = cache.spec, torch.Generator().manual_seed(frame // 9)
    return torch.randn(spec.batch, 5, spec.heads, spec.head_dim, generator=generator).to(spec.dtype)


def attend(chunk, layer, q, k, v, **options):
    """What a model does: it also tells the text, and asks for what the policy has beside the slots."""
    chunks = getattr(chunk, "chunks", [chunk])
    chunk.tell(layer, torch.cat([text_of(each.cache, each.first_frame) for each in chunks]))
    y = chunk.attend(layer, q, k, v, **options)
    if any(each.cache._sink.answers for each in chunks):
        y = y + chunk.beside(layer, q)
    return y


def write(chunk, seed, forwards=2):
    """Forwards of a chunk; the attention of each layer in the last."""
    cache = chunk.cache
    for forward in range(forwards):
        inputs = [
            tensors(cache, chunk.frames, seed * 1000 + forward * 100 + i) for i in range(cache.spec.layers)
        ]
        outputs = [attend(chunk, layer, *qkv) for layer, qkv in enumerate(inputs)]
    return outputs


def step(cache, frames, seed, forwards=2):
    """One committed chunk of several forwards; the attention of each layer in the last."""
    with cache.chunk(frames) as chunk:
        return write(chunk, seed, forwards)


def state_of(cache):
    """All that a stream consists of, as tensors."""
    return [cache.k, cache.v, *cache._sink.tensors.values()]
