"""The causal model under grad: replayed chunks against one graph, activation checkpointing; and a commit
that fails in the pipeline."""

import pytest
import torch

import rf_kernels as rf
from reward_forcing import CausalWanModel, ModelConfig, StreamConfig, StreamingPipeline
from rf_kernels.testing import assert_equal_bits, fingerprint, relative_l2

CONFIG = ModelConfig(
    dim=32, ffn_dim=48, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=10, text_len=6, freq_dim=16
)
POLICIES = {"none": (0, rf.NoSink()), "static": (2, rf.StaticSink(rephase=True)), "ema": (2, rf.EMASink(0.7))}
CHUNKS = 5


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CausalWanModel(CONFIG).double()


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def latents(seed):
    return draw(1, 4, 2, 4, 6, seed=seed)


class Rollout:
    """Chunks of two frames: a forward without grad, an exit with grad, and the context forward on what the
    exit gave."""

    def __init__(self, model, policy):
        sink_frames, policy = POLICIES[policy]
        self.model, self.text = model, model.text_keys(draw(1, 6, 10, seed=99))
        self.cache = rf.SinkWindowCache(
            model.cache_spec(4, 6, sink_frames=sink_frames, window_frames=4), sink=policy
        )

    def chunks(self, context=None):
        """Yields each chunk's exit, under grad; ``context``: the clean results, where they are known."""
        for number in range(CHUNKS):
            with self.cache.chunk(2) as chunk:
                with torch.no_grad():
                    self.model(latents(100 + number), torch.full((1, 1), 900.0), self.text, chunk)
                x0 = latents(number) - self.model(
                    latents(number), torch.full((1, 1), 700.0), self.text, chunk
                )
                yield x0
                with torch.no_grad():
                    clean = x0 if context is None else context[number]
                    self.model(clean, torch.zeros(1, 1), self.text, chunk)


def loss_of(x0, number):
    return (x0 * draw(*x0.shape, seed=200 + number)).sum()


def graph(model, policy):
    """One graph over the whole rollout, backward at its end: parameter gradients, and the results."""
    results = list(Rollout(model, policy).chunks())
    total = sum(loss_of(x0, number) for number, x0 in enumerate(results))
    gradients = torch.autograd.grad(total, list(model.parameters()))
    return gradients, [x0.detach() for x0 in results]


@pytest.mark.parametrize("policy", POLICIES)
def test_replayed_chunks_give_the_gradients_of_one_graph(model, policy):
    """Backward inside of each chunk, before its context forward, or at the very end: the past is a constant
    either way."""
    expected, results = graph(model, policy)
    assert all(bool(g.any()) for g in expected)
    rollout = Rollout(model, policy)
    for number, x0 in enumerate(rollout.chunks(results)):
        assert_equal_bits(x0, results[number])
        loss_of(x0, number).backward(retain_graph=True)  # the text's keys are shared
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert relative_l2(parameter.grad, gradient) < 1e-12


@pytest.mark.parametrize("policy", POLICIES)
def test_checkpointed_blocks_give_the_same_gradients_to_the_bit(model, policy):
    """Every block recomputed in a backward that comes after all chunks have been committed."""
    expected, results = graph(model, policy)
    model.checkpointing = True
    found, again = graph(model, policy)
    for ours, theirs in zip((*found, *again), (*expected, *results), strict=True):
        assert_equal_bits(ours, theirs)


def test_gradients_of_a_chunk_are_the_slopes_of_its_loss(model):
    rollout = Rollout(model, "ema")
    for _ in rollout.chunks():
        pass
    x, t, parameters = latents(7).requires_grad_(), torch.full((1, 1), 500.0), list(model.parameters())
    directions = [draw(*p.shape, seed=300 + i) for i, p in enumerate([x, *parameters])]
    with rollout.cache.chunk(2) as chunk:

        def loss():
            return loss_of(model(x, t, model.text_keys(draw(1, 6, 10, seed=99)), chunk), 0)

        gradients = torch.autograd.grad(loss(), [x, *parameters])
        slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).item()
        values = []
        with torch.no_grad():
            for sign in (1, -2):  # +h, then from there to -h
                for leaf, direction in zip([x, *parameters], directions, strict=True):
                    leaf.add_(direction, alpha=sign * 1e-5)
                values.append(loss().item())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


# ---- a commit that fails -------------------------------------------------------------------------


@pytest.mark.parametrize("undo_frames", [0, 2])
def test_a_commit_that_finds_nan_leaves_the_pipelines_cache_as_it_was(model, undo_frames):
    config = StreamConfig(
        chunk_frames=2,
        sink_frames=2,
        local_attn_size=6,
        denoising_step_list=(1000, 500),
        sink_policy="ema",
        alpha=0.9,
    )
    line = StreamingPipeline(model, config)
    spec = line.new_cache(1, 4, 6, undo_frames=undo_frames).spec
    cache = rf.SinkWindowCache(spec, sink=rf.EMASink(0.9, on_nonfinite="raise"))
    context, noise = draw(1, 6, 10, seed=1), [latents(i).transpose(1, 2) for i in range(8)]
    for _ in line.stream(noise[:3], context, cache=cache):
        pass
    cache.v[0, 0, 2 * spec.frame_tokens, 0, 0] = float("nan")  # frame 2 leaves with the next chunk
    parts = [cache.k, cache.v, *cache._sink.tensors.values()]
    before = fingerprint(*parts)
    with pytest.raises(rf.NonFiniteError):
        next(line.stream(noise[3:], context, cache=cache))
    assert cache.next_frame == 6
    if undo_frames:
        assert fingerprint(*parts) == before
        cache.v[0].nan_to_num_(0.0)
        assert len(list(line.stream(noise[3:], context, cache=cache))) == 5
    else:
        with pytest.raises(rf.StreamClosedError):
            next(line.stream(noise[3:], context, cache=cache))
