"""The embedded world: what is rendered, what the codec keeps, and what is read from pixels."""

import pytest
import torch

import rf_kernels as rf
from reward_forcing.world import (
    PROMPTS,
    SIZE,
    PatchCodec,
    Prompt,
    colour_right,
    draw_prompts,
    embed,
    measure,
    no_text,
    render,
    similarity_to_first,
)


@pytest.fixture(scope="module")
def codec():
    return PatchCodec.fit()


@pytest.fixture(scope="module")
def clips():
    return render(list(PROMPTS), 24, generator=torch.Generator().manual_seed(1))


def test_a_clip_is_a_function_of_prompt_and_seed(clips):
    again, centres = render(list(PROMPTS), 24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again, clips[0]) and torch.equal(centres, clips[1])
    other, _ = render(list(PROMPTS), 24, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(other, clips[0])
    assert clips[0].shape == (len(PROMPTS), 24, 3, SIZE, SIZE) and clips[0].abs().max() <= 1


def test_speed_words_are_kept_and_an_open_speed_spans_all_of_them():
    prompts = [Prompt("red", "disc", s) for s in ("still", "slow", "fast", None) for _ in range(64)]
    _, centres = render(prompts, 3, generator=torch.Generator().manual_seed(0))
    speed = (centres[:, 1] - centres[:, 0]).norm(dim=-1).reshape(4, 64)
    assert speed[0].max() == 0
    assert 0.5 <= speed[1].min() and speed[1].max() <= 0.8
    assert 1.6 <= speed[2].min() and speed[2].max() <= 2.2
    assert speed[3].min() < 0.3 and speed[3].max() > 1.9


def test_the_world_is_a_torus():
    """Moving a clip around the torus changes no read-out but the place."""
    video, _ = render(
        draw_prompts(8, torch.Generator().manual_seed(3)), 6, generator=torch.Generator().manual_seed(4)
    )
    here, there = measure(video), measure(video.roll((5, 11), dims=(-2, -1)))
    assert torch.equal(here.count, there.count)
    assert torch.allclose(here.mass, there.mass) and torch.allclose(here.sharpness, there.sharpness)
    moved = torch.remainder(there.centre - here.centre - torch.tensor([11.0, 5.0]) + 16, 32) - 16
    assert moved.abs().max() < 1e-3


@pytest.mark.parametrize("decoded", [False, True], ids=["pixels", "through the codec"])
def test_readings_are_the_truth(clips, codec, decoded):
    video, centres = clips
    if decoded:
        video = codec.decode(codec.encode(video))
    reading, prompts = measure(video), list(PROMPTS)
    true = (centres[:, 1:] - centres[:, :-1]).norm(dim=-1)
    assert (reading.speed - true).abs().mean() < (0.1 if decoded else 0.05)  # pixels
    assert (reading.count == 1).float().mean() > 0.99
    assert colour_right(reading, prompts).mean() > 0.99
    still = [i for i, p in enumerate(prompts) if p.speed == "still"]
    assert similarity_to_first(video)[still, -1].mean() > similarity_to_first(video)[:, -1].mean() + 0.1


def test_readings_see_what_went_wrong():
    video, _ = render([Prompt("red", "disc", "slow")] * 4, 6, generator=torch.Generator().manual_seed(5))
    gone = video.mean(dim=2, keepdim=True).expand_as(video)
    blurred = torch.nn.functional.avg_pool3d(video, (1, 5, 5), stride=1)
    assert measure(gone).mass.max() == 0 and measure(gone).count.max() == 0
    assert measure(blurred).sharpness.mean() < 0.9 * measure(video).sharpness.mean()
    two = torch.where(measure_mask(video), video, video.roll(16, dims=-1))
    assert (measure(two).count == 2).float().mean() > 0.8
    assert colour_right(measure(video.roll(1, dims=2)), [Prompt("red", "disc")] * 4).max() == 0
    assert similarity_to_first(video[:, :1].expand_as(video)).min() > 0.999


def measure_mask(video):
    return (video.amax(dim=2, keepdim=True) - video.amin(dim=2, keepdim=True)) > 0.5


def test_the_codec_keeps_the_video(codec, clips):
    video, _ = clips
    latents = codec.encode(video)
    assert latents.shape == (len(PROMPTS), 24, 8, 8, 8)
    assert 0.8 < latents.std() < 1.2  # unit variance on fresh clips
    error = (codec.decode(latents) - video).square().mean().sqrt()
    assert error < 0.3 * video.std()  # 8 of 48 components
    assert torch.allclose(codec.encode(codec.decode(latents)), latents, atol=1e-5)  # a projection
    full = PatchCodec.fit(channels=48, clips=64)
    assert torch.allclose(full.decode(full.encode(video)), video, atol=1e-3)
    assert torch.equal(PatchCodec.fit().basis, codec.basis)


def test_prompts_are_read_from_words_and_features_tell_them_apart():
    assert Prompt.parse("a slow red disc") == Prompt("red", "disc", "slow")
    assert Prompt.parse("ring blue") == Prompt("blue", "ring")
    assert all(Prompt.parse(str(p)) == p for p in PROMPTS)
    features = embed(list(PROMPTS)).flatten(1)
    assert torch.cdist(features, features).fill_diagonal_(9).min() > 1
    assert no_text(2).shape == embed(list(PROMPTS[:2])).shape and no_text(2).abs().max() == 0


@pytest.mark.parametrize("text", ["", "red", "a red red disc", "a red disc jumps", "disc slow"])
def test_prompts_that_say_nothing_here_are_refused(text):
    with pytest.raises(rf.ArgumentError, match="Prompt"):
        Prompt.parse(text)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda c: Prompt("pink", "disc"), "colour"),
        (lambda c: c.encode(torch.zeros(1, 1, 3, 30, 32)), "video"),
        (lambda c: c.decode(torch.zeros(1, 1, 3, 8, 8)), "latents"),
        (lambda c: PatchCodec(0), "channels"),
    ],
)
def test_refusals(codec, call, argument):
    with pytest.raises(rf.ArgumentError, match=argument):
        call(codec)
