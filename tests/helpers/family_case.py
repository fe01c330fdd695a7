"""Stand-ins with the interfaces of the Self-Forcing family: an attention module that keeps its keys in a
dictionary, a model of a few blocks, and the loop of a pipeline. Plain, and slow."""

import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

HEADS, HEAD_DIM, GRID = 2, 16, (2, 3)
TOKENS = GRID[0] * GRID[1]


def table(length=64, dim=HEAD_DIM):
    """Wan's complex table of rotations: positions by pairs, split over frame, row and column."""
    half = dim // 2
    parts = []
    for pairs in (half - 2 * (half // 3), half // 3, half // 3):
        turn = torch.outer(torch.arange(length).double(), 10000.0 ** -(torch.arange(pairs).double() / pairs))
        parts.append(torch.polar(torch.ones_like(turn), turn))
    return torch.cat(parts, 1)


def rotated(x, freqs, start, offset=0.0, scale=1.0):
    frames, half = x.shape[1] // TOKENS, x.shape[-1] // 2
    t, h, w = freqs.split([half - 2 * (half // 3), half // 3, half // 3], 1)
    size = (frames, *GRID, -1)
    t = t[start : start + frames]
    if offset or scale != 1:
        at = (torch.arange(start, start + frames) + offset) * scale
        t = torch.polar(torch.ones_like(t.real), torch.outer(at.double(), freqs[1, : t.shape[1]].angle()))
    turn = torch.cat(
        [
            t.view(frames, 1, 1, -1).expand(size),
            h[: GRID[0]].view(1, GRID[0], 1, -1).expand(size),
            w[: GRID[1]].view(1, 1, GRID[1], -1).expand(size),
        ],
        -1,
    ).view(x.shape[1], 1, half)
    y = torch.view_as_complex(x.double().unflatten(-1, (half, 2)))
    return torch.view_as_real(y * turn).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(1 + 0.2 * torch.randn(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """What the modules of the family have in common. Keys lie unrotated with ``raw``."""

    raw = False

    def __init__(self, local_attn_size=-1, sink_size=0):
        super().__init__()
        dim = HEADS * HEAD_DIM
        self.num_heads, self.head_dim = HEADS, HEAD_DIM
        self.local_attn_size, self.sink_size = local_attn_size, sink_size
        self.max_attention_size = 32760 if local_attn_size == -1 else local_attn_size * 1560
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim), RMSNorm(dim)

    def absorb(self, kv, evicted):
        """What happens to the slots that are about to be overwritten."""

    def attend(self, x, freqs, kv, start, **places):
        q, k, v = (
            f(x).unflatten(-1, (HEADS, HEAD_DIM))
            for f in (lambda y: self.norm_q(self.q(y)), lambda y: self.norm_k(self.k(y)), self.v)
        )
        frame, sink, new = start // TOKENS, self.sink_size * TOKENS, x.shape[1]
        if not self.raw:
            q, k = rotated(q, freqs, frame, **places), rotated(k, freqs, frame, **places)
        size, end = kv["k"].shape[1], start + new
        held, seen = kv["local_end_index"].item(), kv["global_end_index"].item()
        pin, pinned = (int(kv.get(name, -1)) for name in ("pinned_start", "pinned_len"))
        kept = sink + pinned if pin == sink and pinned > 0 else sink
        gone = max(0, held + new - size) if end > seen and self.local_attn_size != -1 else 0
        if gone:
            self.absorb(kv, slice(sink, sink + gone))
            for name in ("k", "v"):
                kv[name][:, kept : held - gone] = kv[name][:, kept + gone : held].clone()
            if pin >= kept:
                kv["pinned_start"].sub_(gone)
        stop = held + end - seen - gone
        kv["k"][:, stop - new : stop], kv["v"][:, stop - new : stop] = k, v
        keys, values = kv["k"][:, :stop], kv["v"][:, :stop]
        if self.max_attention_size < stop:
            keys, values = self.cut(keys, sink), self.cut(values, sink)
        if self.raw:
            q = rotated(q, freqs, (keys.shape[1] - new) // TOKENS)
            keys = rotated(keys, freqs, 0)
        q, keys, values = (y.transpose(1, 2) for y in (q, keys, values))
        y = nn.functional.scaled_dot_product_attention(q, keys, values.clone())
        kv["global_end_index"].fill_(end)
        kv["local_end_index"].fill_(stop)
        return self.o(y.transpose(1, 2).flatten(2))

    def cut(self, slots, sink):
        return slots[:, -self.max_attention_size :]


class SelfForcing(Attention):
    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None
    ):
        if kv_cache is None:
            return self.o(self.v(x))
        return self.attend(x, freqs, kv_cache, current_start)


class RewardForcing(SelfForcing):
    raw = True

    def __init__(self, *args, compression_alpha=0.9, **kwargs):
        super().__init__(*args, **kwargs)
        self.compression_alpha = compression_alpha

    def absorb(self, kv, evicted):
        sink, a = slice(0, self.sink_size * TOKENS), self.compression_alpha
        for name in ("k", "v"):
            kv[name][:, sink] = a * kv[name][:, sink] + (1 - a) * kv[name][:, evicted]

    def cut(self, slots, sink):
        return torch.cat([slots[:, :sink], slots[:, sink - self.max_attention_size :]], 1)


class InfiniteForcing(SelfForcing):
    raw = True


class LongLive(Attention):
    """Returns the indices; the model writes them."""

    cut = RewardForcing.cut

    def forward(
        self,
        x,
        seq_lens,
        grid_sizes,
        freqs,
        block_mask,
        kv_cache=None,
        current_start=0,
        cache_start=None,
        sink_recache_after_switch=False,
    ):
        y = self.attend(x, freqs, kv_cache, current_start)
        return y, (current_start + x.shape[1], kv_cache["local_end_index"].item(), None)


class LongLive2(Attention):
    """A shot's frames have positions of their own."""

    def forward(
        self,
        x,
        seq_lens,
        grid_sizes,
        freqs,
        block_mask,
        kv_cache=None,
        current_start=0,
        cache_start=None,
        t_scale=1.0,
        use_relative_rope=False,
        method="linear",
        original_seq_len=None,
        temporal_offset=0.0,
    ):
        y = self.attend(x, freqs, kv_cache, current_start, offset=temporal_offset, scale=t_scale)
        return y, (current_start + x.shape[1], kv_cache["local_end_index"].item(), None)


class RollingForcing(SelfForcing):
    """Has an argument of its own."""

    def forward(
        self,
        x,
        seq_lens,
        grid_sizes,
        freqs,
        block_mask,
        kv_cache=None,
        current_start=0,
        cache_start=None,
        updating_cache=False,
    ):
        return self.attend(x, freqs, kv_cache, current_start)


class StreamDiffusion(Attention):
    """Samples at positions of their own. Its ring never moves a key."""

    adapt_sink_thr, evict_idx = -1, None

    def __init__(self, local_attn_size=-1, sink_size=0):
        super().__init__(local_attn_size, sink_size)
        del self.local_attn_size, self.max_attention_size

    def forward(
        self,
        x,
        seq_lens,
        grid_sizes,
        freqs,
        block_mask,
        kv_cache=None,
        current_start=0,
        current_end=0,
        causal_rope_cache=None,
    ):
        if not hasattr(self, "queues") or current_start.max() == 0:
            self.queues = {}
        rows = [self.row(x[i : i + 1], freqs, kv_cache, i, int(s)) for i, s in enumerate(current_start)]
        return self.o(torch.cat(rows).flatten(2))

    def row(self, x, freqs, kv, i, start):
        q, k, v = (
            f(x).unflatten(-1, (HEADS, HEAD_DIM))
            for f in (lambda y: self.norm_q(self.q(y)), lambda y: self.norm_k(self.k(y)), self.v)
        )
        q, k = rotated(q, freqs, start // TOKENS), rotated(k, freqs, start // TOKENS)
        size, new = kv["k"].shape[1], x.shape[1]
        queue = self.queues.setdefault(i, {"last": None, "slot": 0, "filled": 0})
        if queue["last"] != start:
            at = queue["filled"]
            if at >= size:
                at = self.sink_size * TOKENS + queue["slot"]
                queue["slot"] = (queue["slot"] + new) % (size - self.sink_size * TOKENS)
            queue |= {"last": start, "at": at, "filled": min(size, queue["filled"] + new)}
        at = queue["at"]
        kv["k"][i, at : at + new], kv["v"][i, at : at + new] = k[0], v[0]
        keys, values = (kv[name][i : i + 1, : queue["filled"]].transpose(1, 2) for name in ("k", "v"))
        kv["global_end_index"][i] = start + new
        kv["local_end_index"][i] = queue["filled"]
        return nn.functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.self_attn = attention

    def forward(self, x, **options):
        y = self.self_attn(x, None, options.pop("grid_sizes"), options.pop("freqs"), None, **options)
        y, update = y if isinstance(y, tuple) else (y, None)
        x = x + torch.tanh(y)
        return x if update is None else (x, update)


class Model(nn.Module):
    def __init__(self, kind, layers=2, seed=0, **options):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Block(kind(**options)) for _ in range(layers))
        self.freqs, self.checkpointed = table(), False
        self.double().requires_grad_(False)

    def forward(self, x, kv_cache, current_start, **options):
        grid = torch.tensor([[x.shape[1] // TOKENS, *GRID]] * x.shape[0])
        for block, cache in zip(self.blocks, kv_cache, strict=True):
            given = {"grid_sizes": grid, "freqs": self.freqs.to(x.device), "kv_cache": cache} | options
            given["current_start"] = current_start
            if self.checkpointed and torch.is_grad_enabled():
                out = checkpoint(block, x, **given, use_reentrant=False)
            else:
                out = block(x, **given)
            x, update = out if isinstance(out, tuple) else (out, None)
            if update is not None:
                cache["global_end_index"].fill_(update[0])
                cache["local_end_index"].fill_(update[1])
        return x


def kv_cache(model, frames, batch=1, dtype=torch.float64, device="cpu"):
    def index():
        return torch.zeros(1, dtype=torch.long, device=device)

    def slots():
        return torch.zeros(batch, frames * TOKENS, HEADS, HEAD_DIM, dtype=dtype, device=device)

    return [
        {"k": slots(), "v": slots(), "global_end_index": index(), "local_end_index": index()}
        for _ in model.blocks
    ]


def video(frames, batch=1, seed=1):
    torch.manual_seed(seed)
    return torch.randn(batch, frames * TOKENS, HEADS * HEAD_DIM, dtype=torch.float64)


def stream(model, caches, x, chunk, steps=2, first=0, options=lambda start: {}):
    """Every chunk ``steps`` times with other inputs, and once more with its own result."""
    outs, indices = [], []
    for frame in range(0, x.shape[1] // TOKENS, chunk):
        start = (first + frame) * TOKENS
        y = x[:, frame * TOKENS : (frame + chunk) * TOKENS]
        for _ in range(steps):
            y = model(y, caches, start, **options(start))
            outs.append(y)
        model(y, caches, start, **options(start))
        indices.append([int(c[n]) for c in caches for n in ("global_end_index", "local_end_index")])
    return torch.cat(outs, 1), indices


def copied(model):
    return copy.deepcopy(model)
