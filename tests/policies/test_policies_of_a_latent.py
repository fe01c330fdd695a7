"""Every policy on a cache whose values are channels of its keys, beside an ordinary cache that is given a
copy of them."""

import dataclasses

import pytest
import torch

import rf_kernels as rf
from reward_forcing import policies
from rf_kernels.testing import max_error

NAMES = dict(policies.NAMES)  # those that ship: a page adds one
SINKS = {"none": 0, "state": 0, "two-rates": 3, "cyclic": 3}
TEXTS = {"state": "state:chunk=3", "merged": "merged:threshold=0.1", "rope-cut": "rope-cut:jump=3,keep=2"}
REFUSED = {"linear", "routed"}  # an answer as wide as a key; a text in keys of the model's heads
TURNED, COLUMNS = 12, slice(12, 32)


def cache_of(name, latent):
    spec = rf.CacheSpec(
        layers=1,
        batch=2,
        heads=1,
        head_dim=32,
        grid=(2, 3),
        sink_frames=SINKS.get(name, 2),
        window_frames=6,
        rope=rf.RoPE3D.wan(TURNED),
        dtype=torch.float64,
        device="cpu",
        value_dims=(COLUMNS.start, COLUMNS.stop) if latent else None,
    )
    return rf.SinkWindowCache(spec, sink=policies.parse(TEXTS.get(name, name)))


@pytest.mark.parametrize("name", sorted(set(NAMES) - REFUSED))
def test_a_latent_is_kept_as_keys_and_values_are(name):
    latent, ordinary = cache_of(name, True), cache_of(name, False)
    g = torch.Generator().manual_seed(1)
    seen = []
    for number in range(13):
        frames = 3
        q, k = (torch.randn(2, frames * 6, h, 32, generator=g, dtype=torch.float64) for h in (4, 1))
        v = torch.zeros_like(k)
        v[..., COLUMNS] = k[..., COLUMNS]
        cut = number in (5, 9)
        with latent.chunk(frames, cut=cut) as one, ordinary.chunk(frames, cut=cut) as other:
            for _ in range(2):
                out = one.attend(0, q, k)
                expected = other.attend(0, q, k, v)[..., COLUMNS]
        assert max_error(out, expected) < 1e-12 * float(expected.abs().max())
        seen.append(out)
    tokens = latent.kv_tokens
    assert max_error(latent.k[:, :, :tokens], ordinary.k[:, :, :tokens]) < 1e-12
    assert max_error(latent.v[:, :, :tokens], ordinary.v[:, :, :tokens, :, COLUMNS]) < 1e-12
    assert latent._stream.left and len({float(x.sum()) for x in seen}) == len(seen)
    assert latent.nbytes < ordinary.nbytes


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused(name):
    with pytest.raises(rf.ArgumentError, match="`sink`.+channels of the keys"):
        cache_of(name, True)


def test_a_policy_that_does_not_say_so_is_refused():
    class Twice(policies.MemoryState):
        latent = False

    @dataclasses.dataclass(frozen=True)
    class Policy(rf.SinkPolicy):
        def bind(self, spec):
            return Twice(self, spec)

    with pytest.raises(rf.ArgumentError, match="`sink`.+channels of the keys.+found Policy"):
        rf.SinkWindowCache(cache_of("static", True).spec, sink=Policy())
