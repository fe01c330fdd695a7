"""Deterministic to the bit: across runs, numbers of threads, places in the batch and neighbours; forward and
backward of every op."""

import pytest
import torch

import rf_kernels as rf
from helpers.promise_tools import DTYPES, assert_all_equal_bits, draw, forward, make_cache, seen_of

THREADS = (1, 2, 3, 4)


def tables(dtype, frames, grid, head_dim, batch):
    """Positions of their own for every sample."""
    positions = [[[7 * b + f for f in range(frames)] for b in range(batch)], range(grid[0]), range(grid[1])]
    return rf.RoPE3D.wan(head_dim).table(positions, dtype=dtype)


class RopeAppend:
    """Sizes that make the CPU backend use several threads (16K elements a thread)."""

    frames, grid, heads, head_dim = 3, (3, 10), (6, 3), 32
    extra = {"norm": "model"}

    @classmethod
    def inputs(cls, g, dtype, batch):
        n = cls.frames * cls.grid[0] * cls.grid[1]
        data = [
            torch.randn(batch, n, h, cls.head_dim, generator=g).to(dtype)
            for h in (cls.heads[0], cls.heads[1], cls.heads[1])
        ]
        caches = [
            torch.randn(batch, 5 * n // 3, cls.heads[1], cls.head_dim, generator=g).to(dtype)
            for _ in range(2)
        ]
        slots = torch.stack([torch.randperm(5, generator=g)[:3].int() for _ in range(batch)])
        angles, _ = tables(dtype, cls.frames, cls.grid, cls.head_dim, batch)
        return [*data, *caches, slots, angles]

    @classmethod
    def run(cls, q, k, v, k_cache, v_cache, slots, angles):
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
        _, axes = tables(q.dtype, cls.frames, cls.grid, cls.head_dim, 1)
        size = 1 if cls.extra["norm"] == "head" else None
        weights = [torch.linspace(0.5, 1.5, (size or h) * cls.head_dim) for h in cls.heads]
        out = rf.rope_append(
            q,
            k,
            v,
            k_cache,
            v_cache,
            slots=slots,
            angles=angles,
            axes=axes,
            q_weight=weights[0].to(q.dtype),
            k_weight=weights[1].to(q.dtype),
            **cls.extra,
        )
        return out, k_cache, v_cache


class RopeAppendPerHead(RopeAppend):
    extra = {"norm": "head", "layout": "half"}


class Rope:
    """Forward and backward in x. The gradient of the weight is a sum over the batch: compared over runs and
    threads alone."""

    @staticmethod
    def inputs(g, dtype, batch):
        x, grad = (torch.randn(batch, 90, 6, 32, generator=g).to(dtype) for _ in range(2))
        return [x, grad, tables(dtype, 3, (3, 10), 32, batch)[0]]

    @staticmethod
    def run(x, grad, angles):
        _, axes = tables(x.dtype, 3, (3, 10), 32, 1)
        leaf, weight = x.clone().requires_grad_(), torch.linspace(0.5, 1.5, 192).to(x.dtype).requires_grad_()
        out = rf.rope(leaf, angles=angles, axes=axes, weight=weight)
        grads = torch.autograd.grad(out, (leaf, weight), grad)
        return out.detach(), grads[0], grads[1].detach()

    shared = 1  # results at the end that belong to the whole batch


class EmaEvict:
    state = "compensated"

    @classmethod
    def inputs(cls, g, dtype, batch):
        n, heads, head_dim = 20, 6, 32
        caches = [torch.randn(batch, 8 * n, heads, head_dim, generator=g).to(dtype) for _ in range(2)]
        state = [torch.randn(batch, 2 * n, heads, head_dim, generator=g).to(dtype) for _ in range(3)]
        schedule = torch.stack(
            [torch.tensor([[0, 2, 3, 4, 0], [b % 2, 3, 2, 7, 5]]) for b in range(batch)]
        ).int()
        turns = torch.randn(
            batch, 2, 4, 6, 2, generator=g, dtype=torch.float64 if dtype == torch.float64 else torch.float32
        )
        return [*caches, *state, schedule, turns]

    @classmethod
    def run(cls, k_cache, v_cache, k_state, k_state_lo, v_state, schedule, turns):
        half = k_cache.dtype in (torch.bfloat16, torch.float16)
        low = (
            [k_state_lo.mul(2**-9), v_state.mul(2**-9)]
            if half and cls.state == "compensated"
            else [None, None]
        )
        k_state = k_state.clone()
        if half and cls.state == "float32":
            k_state, low = k_state.float(), [None, v_state.float()]
        k_cache, v_cache = k_cache.clone(), v_cache.clone()
        skipped = torch.zeros(1, dtype=torch.int64)
        rf.ema_evict(
            k_cache,
            v_cache,
            k_state,
            *low,
            schedule=schedule,
            turns=turns,
            alpha=0.9,
            frame_tokens=20,
            state=cls.state,
            skipped=skipped,
        )
        return [t for t in (k_cache, v_cache, k_state, *low) if t is not None]


class EmaEvictFloat32(EmaEvict):
    state = "float32"


class EmaEvictPublished(EmaEvict):
    state = "published"


class Attention:
    options = {"kv_tokens": 150}

    @classmethod
    def inputs(cls, g, dtype, batch):
        return [torch.randn(batch, 180, h, 32, generator=g).to(dtype) for h in (4, 2, 2, 4)]

    @classmethod
    def run(cls, q, k, v, grad_out):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = rf.sink_window_attention(*leaves, **cls.options, return_lse=True)
        return (out.detach(), lse, *torch.autograd.grad(out, leaves, grad_out))


class AttentionWholeSequence(Attention):
    options = {"chunk_ends": [30, 90, 130, 180], "num_sink_tokens": 20, "num_window_tokens": 70}


class AttentionOneQuery(Attention):
    @classmethod
    def inputs(cls, g, dtype, batch):
        q, k, v, grad_out = super().inputs(g, dtype, batch)
        return [q[:, :1], k, v, grad_out[:, :1]]


class DmdGradient:
    """The gradient without a divisor, and the norms; loss and mean gradient over runs and threads."""

    @staticmethod
    def inputs(g, dtype, batch):
        x, fake, real, uncond = (torch.randn(batch, 3, 4, 19, 37, generator=g).to(dtype) for _ in range(4))
        return [
            x,
            fake,
            real,
            uncond,
            torch.rand(batch, generator=g),
            torch.rand(batch, 3, generator=g) > 0.3,
        ]

    @staticmethod
    def run(x, fake, real, uncond, weight, mask):
        options = {
            "fake": fake,
            "real": real,
            "real_uncond": uncond,
            "real_guidance": 3.0,
            "weight": weight,
            "mask": mask,
        }
        unscaled = rf.DMDOptions(reduction="none")
        gradient, aux = rf.dmd_gradient(x, **options, options=unscaled, return_aux=True)
        leaf = x.clone().requires_grad_()
        loss = rf.dmd_loss(leaf, **options)
        loss.backward()
        return (
            gradient,
            aux.gradient_norm,
            aux.normalizer,
            aux.per_sample_loss,
            leaf.grad,
            loss.detach(),
            aux.loss,
        )

    shared = 3


OPS = {
    op.__name__: op
    for op in (
        RopeAppend,
        RopeAppendPerHead,
        Rope,
        EmaEvict,
        EmaEvictFloat32,
        EmaEvictPublished,
        Attention,
        AttentionWholeSequence,
        AttentionOneQuery,
        DmdGradient,
    )
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_runs_and_threads(op, dtype, threads):
    op = OPS[op]
    inputs = op.inputs(torch.Generator().manual_seed(0), dtype, 3)
    threads(1)
    first = op.run(*inputs)
    assert any(bool(t.any()) for t in first)
    for n in (*THREADS, *reversed(THREADS)):
        threads(n)
        assert_all_equal_bits(op.run(*inputs), first)


@pytest.mark.heavy
@pytest.mark.parametrize("op", OPS)
def test_200_runs(op, threads):
    op = OPS[op]
    inputs = op.inputs(torch.Generator().manual_seed(1), torch.bfloat16, 2)
    first = op.run(*inputs)
    for i in range(200):
        threads(THREADS[i % 4])
        assert_all_equal_bits(op.run(*inputs), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_places_and_neighbours(op, dtype):
    """A sample alone, and at each place of a batch whose other samples are others or NaN."""
    op = OPS[op]
    shared = getattr(op, "shared", 0)

    def own(results):
        return results[: len(results) - shared]

    g = torch.Generator().manual_seed(2)
    batch = op.inputs(g, dtype, 4)
    together = own(op.run(*batch))
    for b in range(4):
        alone = own(op.run(*(t[b : b + 1] for t in batch)))
        assert_all_equal_bits([t[b : b + 1] for t in together], alone)
    order = [2, 0, 3, 1]
    assert_all_equal_bits(own(op.run(*(t[order] for t in batch))), [t[order] for t in together])
    among_nan = [t.clone() for t in batch]
    for t in among_nan:
        if t.is_floating_point():
            t[[0, 1, 3]] = float("nan")
    assert_all_equal_bits([t[2] for t in own(op.run(*among_nan))], [t[2] for t in together])


@pytest.mark.parametrize("policy", ["compensated", "float32", "published", "static"])
def test_streams(policy, threads):
    """A stream in a batch of three and alone, on 1 to 4 threads: every bit of its results and of its
    cache."""

    def stream(batch, sample=None):
        cache = make_cache(
            policy,
            batch=1 if sample is not None else batch,
            dtype=torch.bfloat16,
            heads=4,
            head_dim=64,
            grid=(4, 8),
        )
        everything = make_cache(policy, batch=batch, dtype=torch.bfloat16, heads=4, head_dim=64, grid=(4, 8))
        results = []
        for chunk in range(5):
            inputs = [draw(everything, 2, 10 * chunk + layer) for layer in range(2)]
            if sample is not None:
                inputs = [[t[sample : sample + 1] for t in qkv] for qkv in inputs]
            with cache.chunk(2) as opened:
                results += forward(opened, inputs)
        return results, [t for t in seen_of(cache)]

    threads(1)
    results, seen = stream(3)
    for n in THREADS[1:]:
        threads(n)
        again, seen_again = stream(3)
        assert_all_equal_bits(again, results)
        assert_all_equal_bits(seen_again, seen)
    for sample in range(3):
        alone, seen_alone = stream(3, sample)
        assert_all_equal_bits(alone, [t[sample : sample + 1] for t in results])
        assert_all_equal_bits(seen_alone, [t[:, sample : sample + 1] for t in seen])
