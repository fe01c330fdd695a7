"""``integrations.diffusers`` against the real package, small and random: a stream is our model's on the same
weights, a whole sequence is diffusers' own, and checkpoints go both ways."""

import importlib.util

import pytest
import torch

import rf_kernels as rf
from rf_kernels.integrations import diffusers as integration

if importlib.util.find_spec("diffusers") is None:
    pytest.skip("diffusers is not installed", allow_module_level=True)

SIZES = {"num_layers": 2, "in_channels": 4, "out_channels": 4, "text_dim": 12, "freq_dim": 16, "ffn_dim": 48}


@pytest.fixture(scope="module")
def transformer():
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    made = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=16, **SIZES)
    for p in made.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ours(transformer):
    from reward_forcing.config import ModelConfig
    from reward_forcing.models import CausalWanModel

    config = ModelConfig(
        dim=32,
        ffn_dim=48,
        num_heads=2,
        num_layers=2,
        in_dim=4,
        out_dim=4,
        text_dim=12,
        text_len=6,
        freq_dim=16,
    )
    model = CausalWanModel(config)
    model.load_state_dict(integration.published_state(transformer.state_dict()), strict=True)
    return model.eval().requires_grad_(False)


def inputs(frames=2):
    torch.manual_seed(1)
    return torch.randn(1, 4, frames, 6, 8), torch.tensor([[400.0]]), torch.randn(1, 6, 12)


def test_a_whole_sequence_is_diffusers_own(transformer):
    x, t, text = inputs(4)
    wanted = transformer(x, t[0], text).sample
    stream = integration.StreamingTransformer(transformer)
    assert torch.equal(transformer(x, t[0], text).sample, wanted)
    # one chunk of the whole sequence is that sequence
    cache = stream.cache(6, 8, sink_frames=0, window_frames=4, sink_policy=rf.NoSink())
    with cache.chunk(4) as chunk:
        for step in (t, t[0]):
            found = stream(x, step, text, chunk)
            assert (found - wanted).norm() < 4e-6 * wanted.norm()
    stream.restore()
    assert all(type(b.attn1.processor).__name__ == "WanAttnProcessor" for b in transformer.blocks)


def test_a_stream_is_that_of_our_model(transformer, ours):
    stream = integration.StreamingTransformer(transformer)
    sizes = {"sink_frames": 2, "window_frames": 4}
    caches = [
        stream.cache(6, 8, sink_policy=rf.EMASink(0.9), **sizes),
        rf.SinkWindowCache(ours.cache_spec(6, 8, **sizes), sink=rf.EMASink(0.9)),
    ]
    x, t, text = inputs(12)
    keys = ours.text_keys(text)
    for i in range(0, 12, 2):
        now = x[:, :, i : i + 2]
        with caches[0].chunk(2) as a, caches[1].chunk(2) as b:
            for _ in range(2):
                found, wanted = stream(now, t, text, a), ours(now, t, keys, b)
                assert (found - wanted).norm() < 4e-6 * wanted.norm()
    stream.restore()


@pytest.mark.parametrize("shard_bytes", [1 << 30, 4096])
def test_checkpoints_go_both_ways(transformer, tmp_path, shard_bytes):
    from safetensors.torch import load_file

    transformer.save_pretrained(tmp_path / "real", max_shard_size="20KB")
    published = integration.convert(
        tmp_path / "real", tmp_path / "published", "published", shard_bytes=shard_bytes
    )
    assert (len(published) > 1) == (shard_bytes < 1 << 20)
    state = {name: t for path in published for name, t in load_file(path).items()}
    assert state.keys() == integration.published_state(transformer.state_dict()).keys()
    integration.convert(tmp_path / "published", tmp_path / "back", "diffusers", shard_bytes=shard_bytes)
    index = tmp_path / "back" / "diffusion_pytorch_model.safetensors.index.json"
    assert index.exists() == (shard_bytes < 1 << 20)
    again = {name: t for path in integration.shards(tmp_path / "back") for name, t in load_file(path).items()}
    assert again.keys() == transformer.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in transformer.state_dict().items())
    # what has the wanted names already is copied
    integration.convert(tmp_path / "back", tmp_path / "same", "diffusers")
    assert len(list((tmp_path / "same").iterdir())) == 1


def test_a_converted_checkpoint_holds_one_shard_in_memory(transformer, tmp_path, monkeypatch):
    import safetensors.torch

    held, save = [], safetensors.torch.save_file
    monkeypatch.setattr(
        safetensors.torch,
        "save_file",
        lambda tensors, *a, **k: (
            held.append(sum(t.nbytes for t in tensors.values())),
            save(tensors, *a, **k),
        )[1],
    )
    transformer.save_pretrained(tmp_path / "real", max_shard_size="20KB")
    integration.convert(tmp_path / "real", tmp_path / "out", "published", shard_bytes=8192)
    largest = max(p.nbytes for p in transformer.parameters())
    assert len(held) > 3 and max(held) < 8192 + largest


def test_refusals(transformer, tmp_path):
    with pytest.raises(rf.ArgumentError, match="blocks.0.attn1.to_q.weight.*"):
        integration.to_diffusers("blocks.0.attn1.to_q.weight")
    with pytest.raises(rf.ArgumentError, match="img_emb"):
        integration.to_diffusers("img_emb.proj.0.weight")
    with pytest.raises(rf.ArgumentError, match="argument `layout`"):
        integration.convert(tmp_path, tmp_path, "other")
    with pytest.raises(rf.ArgumentError, match="argument `transformer`"):
        integration.StreamingTransformer(torch.nn.Linear(2, 2))
