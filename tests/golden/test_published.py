"""The oracle of the published path where no golden case reaches: against independent formulas, and its
limits."""

import math

import pytest
import torch

from benchmarks import published

CONFIG = published.WanConfig(
    text_len=5, in_dim=4, dim=48, ffn_dim=64, freq_dim=16, text_dim=12, out_dim=4, num_heads=2, num_layers=2
)


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def causal_model(**options) -> published.CausalWanModel:
    torch.manual_seed(0)
    return published.CausalWanModel(CONFIG, **options).double()


def test_fused_attention_is_softmax_attention():
    q, k, v = (seeded(2, n, 3, 16, seed=seed) for seed, n in enumerate((5, 7, 7)))
    torch.testing.assert_close(
        published.sdpa_attention(q, k, v), published.softmax_attention(q, k, v), atol=1e-14, rtol=1e-12
    )


@torch.no_grad()
def test_first_chunk_is_a_bidirectional_clip():
    """A first chunk that fills the sink attends to itself alone, with positions from 0: the bidirectional
    model."""
    causal = causal_model(sink_frames=2, local_attn_size=4, max_attention_tokens=4 * 6)
    clip = published.BidirectionalWanModel(CONFIG).double()
    clip.load_state_dict(causal.state_dict(), strict=True)
    latent, text, timestep = seeded(2, 4, 3, 4, 6), seeded(2, 4, 12, seed=1), torch.tensor([900.0, 300.0])
    streamed = causal(latent, timestep[:, None].expand(2, 3), text, causal.new_caches(2, 4 * 6), 0)
    torch.testing.assert_close(streamed, clip(latent, timestep, text), atol=1e-12, rtol=1e-12)
    padded = clip(latent, timestep, text, seq_len=23)
    torch.testing.assert_close(padded, clip(latent, timestep, text), atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_cache_without_window_does_not_evict():
    new = seeded(1, 4, 1, 2)
    for windowed in (True, False):
        cache = published.EMASinkKVCache(1, 8, 1, 2, torch.float64)
        for chunk in range(2):
            assert cache.append(new + chunk, new - chunk, 4 * chunk, 4, 0.5, windowed) == 4 * (chunk + 1)
        if windowed:
            assert cache.append(new + 2, new - 2, 8, 4, 0.5, windowed) == 8
            torch.testing.assert_close(cache.k, torch.cat([new + 0.5, new + 2], dim=1))
            torch.testing.assert_close(cache.v, torch.cat([new - 0.5, new - 2], dim=1))
        else:
            with pytest.raises(RuntimeError):
                cache.append(new + 2, new - 2, 8, 4, 0.5, windowed)


@torch.no_grad()
def test_text_is_read_once_a_rollout():
    model = causal_model(sink_frames=1, local_attn_size=4, max_attention_tokens=4 * 4)
    caches, latent, timestep = model.new_caches(1, 16), seeded(1, 4, 1, 4, 4), torch.full((1, 1), 500.0)
    text, other = seeded(1, 5, 12, seed=1), seeded(1, 5, 12, seed=2)
    first = model(latent, timestep, text, caches, 0)
    torch.testing.assert_close(model(latent, timestep, other, caches, 0), first)
    assert not torch.allclose(model(latent, timestep, other, model.new_caches(1, 16), 0), first)


def test_nearest_timestep_is_the_first_on_ties():
    scheduler = published.FlowMatchScheduler(5.0)
    midway = (scheduler.timesteps[:-1].double() + scheduler.timesteps[1:].double()) / 2
    assert torch.equal(scheduler.index(midway), torch.arange(999))
    assert scheduler.index(torch.tensor([0.0])).item() == 999


@torch.no_grad()
def test_prefix_with_an_independent_first_frame():
    model = causal_model(sink_frames=1, local_attn_size=6, max_attention_tokens=6 * 4)
    scheduler, trace = published.FlowMatchScheduler(5.0), []
    prefix, noise = seeded(2, 3, 4, 4, 4), seeded(2, 4, 4, 4, 4, seed=1)
    latents = published.inference_rollout(
        model,
        scheduler,
        noise,
        seeded(2, 5, 12, seed=2),
        model.new_caches(2, 6 * 4),
        published.denoising_steps(scheduler, [1000, 500], warp=False),
        chunk_frames=2,
        initial_latent=prefix,
        independent_first_frame=True,
        context_noise=7,
        trace=trace,
    )
    assert torch.equal(latents[:, :3], prefix) and latents.shape[1] == 7
    assert [call.noisy.shape[1] for call in trace] == [1, 2] + [2, 2, 2] * 2
    assert [call.current_start for call in trace] == [0, 4] + [12] * 3 + [20] * 3
    assert [call.timestep.unique().item() for call in trace] == [0, 0] + [1000, 500, 7] * 2
    with pytest.raises(ValueError, match="chunk_sizes"):
        published.inference_rollout(
            model,
            scheduler,
            noise[:, :3],
            text=None,
            caches=None,
            steps=torch.tensor([1000.0]),
            chunk_frames=2,
        )


@pytest.mark.parametrize("detach_cache", [False, True])
def test_only_the_newest_frames_of_a_training_rollout_carry_gradient(detach_cache):
    model = causal_model(sink_frames=1, local_attn_size=2, max_attention_tokens=2 * 4)
    scheduler, trace = published.FlowMatchScheduler(5.0), []
    noise = seeded(1, 4, 4, 4, 4).requires_grad_()
    rollout = published.training_rollout(
        model,
        scheduler,
        noise,
        seeded(1, 5, 12, seed=2),
        model.new_caches(1, 4 * 4),
        published.denoising_steps(scheduler, [1000, 500]),
        chunk_frames=1,
        exit_index=0,
        gradient_frames=2,
        detach_cache=detach_cache,
        trace=trace,
    )
    assert [call.grad_enabled for call in trace] == [False] * 4 + [True, False] * 2
    rollout.latents.sum().backward()
    assert (noise.grad.flatten(2).norm(dim=(0, 2)) > 0).tolist() == [False, False, True, True]
    assert (rollout.denoised_timestep_from, rollout.denoised_timestep_to) == (1000, 500)


def test_dmd_gradient_on_the_clean_estimate():
    """``d dmd_loss / dx`` is ``grad / n_selected`` where selected, and Re-DMD scales it by ``exp(beta
    reward)``."""
    x = seeded(2, 3, 2, 2, 2).requires_grad_()
    fake, real = seeded(2, 3, 2, 2, 2, seed=1), seeded(2, 3, 2, 2, 2, seed=2)
    mask = seeded(2, 3, 2, 2, 2, seed=3) > 0
    grad, log = published.dmd_gradient(x, fake, real)
    norm = (x.detach() - real).abs().flatten(1).mean(1).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(grad, (fake - real) / norm)
    torch.testing.assert_close(log, grad.abs().mean())
    loss = published.re_dmd_loss(x, grad, torch.tensor([0.3], dtype=torch.float64), 2.0, mask)
    assert loss.shape == (1,)
    torch.testing.assert_close(loss[0], math.exp(0.6) * (grad[mask] ** 2).mean() / 2)
    (dx,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(dx, math.exp(0.6) * grad * mask / mask.sum())
