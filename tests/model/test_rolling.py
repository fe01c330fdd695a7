"""Ways of streaming beside chunk after chunk: a rolling window of noise, and stretches that start over. Each
against a plain loop in float64 over a memory that keeps all keys and values and knows no slots."""

from dataclasses import dataclass, replace

import pytest
import torch

import rf_kernels as rf
from helpers.training import STREAM, TINY
from reward_forcing.models import CausalWanModel
from reward_forcing.pipeline import StreamingPipeline
from rf_kernels.reference.streaming import rms_norm, rotate, softmax_attention, token_positions
from rf_kernels.testing import assert_equal_bits

CONTEXT = torch.randn(2, 3, TINY.text_dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
GRID = (2, 3)
F, S = 2, 3  # the first chunks lie in the sink, and across its end


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = CausalWanModel(TINY).double().requires_grad_(False)
    for p in model.parameters():  # a fresh head is zero
        p.data = torch.randn_like(p) * (0.1 if p.dim() == 1 else p[0].numel() ** -0.5)
    return model


def clip(frames, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(2, frames, TINY.in_dim, 4, 6, generator=draws, dtype=torch.float64)


def noise_source():
    draws = torch.Generator().manual_seed(7)
    return lambda x: torch.randn(x.shape, generator=draws, dtype=x.dtype)


def own_noise(x):
    """A function of what is noised: a stream draws the same however it is cut."""
    return (3 * x).sin()


class Memory:
    """What stands in for an open chunk: raw keys and values of every frame and layer, of the newest forward
    that wrote them. ``seen``: the frames that the next forward attends, each with its position."""

    def __init__(self, model):
        spec = model.cache_spec(4, 6, sink_frames=S, window_frames=1, batch=2)
        self.cache = type("Cache", (), {"spec": spec})
        self.kv = [{} for _ in range(spec.layers)]
        self.own, self.seen = [], []

    @property
    def frames(self):
        return len(self.own)

    hears = False

    def attend(self, layer, q, k, v, *, q_norm, k_norm, norm, eps):
        q, k = (
            rms_norm(x.flatten(2), w.weight, eps).unflatten(2, x.shape[2:])
            for x, w in ((q, q_norm), (k, k_norm))
        )
        kv = self.kv[layer]
        for (frame, _), *pair in zip(self.own, *(x.chunk(self.frames, 1) for x in (k, v)), strict=True):
            kv[frame] = pair
        seen = [*self.seen, *self.own]
        keys = [rotate(kv[frame][0], token_positions([at], GRID)) for frame, at in seen]
        values = torch.cat([kv[frame][1] for frame, _ in seen], 1)
        q = rotate(q, token_positions([at for _, at in self.own], GRID))
        return softmax_attention(q, torch.cat(keys, 1), values)


@dataclass
class Plain:
    """The forwards of a stream over ``Memory``."""

    line: StreamingPipeline
    policy: str = "static"
    alpha: float = 0.9
    sinks: int = S
    anchor: int = 0  # frames seen, where the memory has more

    def __post_init__(self):
        self.text = self.line.model.text_keys(CONTEXT)
        self.memory = Memory(self.line.model)
        self.gone = set()

    def flow(self, z, t, begin):
        """One forward of the frames from ``begin`` on: sink, window, and themselves."""
        memory, config, end, S = self.memory, self.line.config, begin + z.shape[1], self.sinks
        past = [f for f in range(S, begin) if f not in self.gone]
        own = len(range(max(S, begin), max(S, end)))
        for e in past[: max(0, len(past) + own - config.window_frames)]:
            self.gone.add(e)
            for kv in memory.kv if self.policy == "ema" else ():
                j = (e - S) % S
                kv[j] = [self.alpha * a + (1 - self.alpha) * b for a, b in zip(kv[j], kv[e], strict=True)]
        shift = max(0, end - (self.anchor or config.local_attn_size))
        memory.seen = [(j, j + shift) for j in range(min(S, begin))]
        memory.seen += [(f, f) for f in past if f not in self.gone and (not self.anchor or f >= shift + S)]
        if self.anchor and not t.any():  # a context pass
            memory.seen = [(f, f) for f in range(begin) if f >= shift]
        memory.own = [(f, f) for f in range(begin, end)]
        return self.line.model(z.transpose(1, 2), t, self.text, memory).transpose(1, 2)


def rolled(line, noise, source, prefix=None):
    """The published order: chunk c of N comes in with forward c and is finished in forward c + T - 1."""
    anchor = 9 if line.config.sink_policy.startswith("rolling") else 0
    plain = Plain(line, line.config.sink_policy, anchor=anchor)
    scheduler, levels = line.scheduler, line.timesteps
    T, parts, first = len(levels), list(noise.split(F, 1)), 0
    if prefix is not None:
        for given in prefix.split(F, 1):
            plain.flow(given, torch.zeros(2, F), first)
            first += F
    for forward in range(len(parts) + T - 1):
        inside = range(max(0, forward - T + 1), min(len(parts), forward + 1))
        t = torch.tensor([[levels[forward - c] for c in inside for _ in range(F)]]).expand(2, -1)
        z = torch.cat([parts[c] for c in inside], 1)
        x0 = scheduler.x0_from_flow(plain.flow(z, t, first + inside[0] * F), z, t)
        rest = [c for c in inside if forward - c + 1 < T]
        if rest:
            kept = x0[:, -len(rest) * F :]
            t = torch.tensor([[levels[forward - c + 1] for c in rest for _ in range(F)]]).expand(2, -1)
            for c, z in zip(rest, scheduler.add_noise(kept, source(kept), t).split(F, 1), strict=True):
                parts[c] = z
        if len(rest) < len(inside):
            parts[inside[0]] = x0[:, :F]
            if line.config.clean_forward:
                plain.flow(x0[:, :F], torch.zeros(2, F), first + inside[0] * F)
    return torch.cat(parts, 1)


def rolling(model, policy="static", steps=(1000, 700, 300), extra=2, **options):
    sink = 0 if policy == "none" else S
    size = {"chunk_frames": F, "sink_frames": sink, "local_attn_size": sink + len(steps) * F + extra}
    config = replace(STREAM, **size, sink_policy=policy, denoising_step_list=steps, rolling=True, **options)
    return StreamingPipeline(model, config)


def test_what_a_context_pass_sees_in_rolling_forcing(model):
    """The newest frames that were ever finished, more of them than a denoising forward has room for."""
    line = rolling(model, "rolling:frames=9,chunk=2", extra=7)  # 9 frames, and two chunks of noise
    expected = rolled(line, clip(24), noise_source())
    found = line.rollout(clip(24), CONTEXT, noise_source=noise_source())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("policy", ["static", "ema"])
@pytest.mark.parametrize(
    "frames, given, extra, options",
    [(18, 0, 2, {}), (16, 4, 0, {}), (2, 0, 2, {}), (18, 0, 3, {"clean_forward": False})],
    ids=["", "behind given frames", "shorter than the window", "noisy context"],
)
def test_a_rolling_window_is_the_plain_loop(model, policy, frames, given, extra, options):
    line = rolling(model, policy, extra=extra, **options)
    prefix = clip(given, 5) if given else None
    expected = rolled(line, clip(frames), noise_source(), prefix)
    cache = line.new_cache(2, 4, 6)
    found = line.rollout(
        clip(frames), CONTEXT, initial_latent=prefix, noise_source=noise_source(), cache=cache
    )
    torch.testing.assert_close(found[:, given:], expected, rtol=1e-9, atol=1e-9)
    assert cache.next_frame == given + frames


@pytest.mark.parametrize("options", [{}, {"clean_forward": False}], ids=["", "noisy context"])
def test_a_rolling_stream_goes_on_from_its_carry(model, options):
    """Bit for bit, behind any chunk, from a saved cache."""
    line, parts = rolling(model, **options), list(clip(14).split(F, 1))
    whole = list(line.stream(parts, CONTEXT, noise_source=own_noise))
    assert [c.first_frame for c in whole] == list(range(0, 14, F))
    assert [0 if c.carry is None else c.carry.shape[1] // F for c in whole] == [2, 2, 2, 2, 2, 1, 0]
    for n in range(1, 7):
        cache, fresh = (line.new_cache(2, 4, 6) for _ in range(2))
        begun = line.stream(parts, CONTEXT, cache=cache, noise_source=own_noise)
        *_, last = (next(begun) for _ in range(n))
        fresh.load_state_dict(cache.state_dict())
        assert line.next_frame(fresh, last.carry) == n * F
        more = line.stream(parts[n + 2 :], CONTEXT, cache=fresh, carry=last.carry, noise_source=own_noise)
        for a, b in zip(more, whole[n:], strict=True):
            assert_equal_bits(a.latents, b.latents)
            assert a.first_frame == b.first_frame


@pytest.mark.parametrize("failing", range(2, 9))
def test_a_rolling_stream_survives_an_exception(model, failing):
    """In ramp-up, between chunks and in ramp-down: the start and the carry of the chunk before it."""
    line, parts, calls = rolling(model), list(clip(14).split(F, 1)), []

    def broken(x):
        calls.append(x)
        if len(calls) == failing:
            raise RuntimeError("no noise")
        return own_noise(x)

    whole = list(line.stream(parts, CONTEXT, noise_source=own_noise))
    cache, found, again = line.new_cache(2, 4, 6, undo_frames=S + 8), [], {"start": 0}
    with pytest.raises(RuntimeError, match="no noise"):
        for chunk in line.stream(parts, CONTEXT, cache=cache, noise_source=broken):
            found.append(chunk)
            again = {"start": chunk.first_frame + F, "carry": chunk.carry}
    assert len(found) == max(0, failing - 3)
    carried = again["carry"].shape[1] // F if found else 0
    left = parts[len(found) + carried :]
    more = line.stream(left, CONTEXT, cache=cache, noise_source=own_noise, **again)
    for a, b in zip([*found, *more], whole, strict=True):
        assert_equal_bits(a.latents, b.latents)


def test_what_a_rolling_window_cannot_take(model):
    line, noise = rolling(model), clip(6)
    cache = line.new_cache(2, 4, 6)
    for options, word in (
        ({"carry": noise, "cache": cache}, "at most 2 chunks of 2 frames"),
        ({"carry": noise[:, :3], "cache": cache}, "at most 2 chunks of 2 frames"),
        ({"carry": noise[:, :4]}, "the one that goes with carry"),
        ({"carry": noise[:, :4], "initial_latent": noise}, "None with initial_latent"),
    ):
        with pytest.raises(rf.ArgumentError, match=word):
            list(line.stream([], CONTEXT, **options))
    with pytest.raises(rf.ArgumentError, match="chunks of 2 frames, found 3"):
        list(line.stream([clip(3)], CONTEXT, cache=cache))
    assert cache.next_frame == 0


@pytest.mark.parametrize("policy", ["static", "ema"])
def test_without_a_clean_forward_the_last_step_stays(model, policy):
    """Causal-rCM, Diagonal Distillation: chunks see the keys of the last denoising step."""
    size = {"chunk_frames": F, "local_attn_size": 7, "denoising_step_list": (1000, 600, 300)}
    line = StreamingPipeline(model, replace(STREAM, **size, sink_policy=policy, clean_forward=False))
    plain, expected = Plain(line, policy), []
    for number, z in enumerate(clip(16).split(F, 1)):
        for step, level in enumerate(line.timesteps):
            t = torch.full((2, F), level)
            x0 = line.scheduler.x0_from_flow(plain.flow(z, t, number * F), z, t)
            following = torch.full((2, F), line.timesteps[min(step + 1, 2)])
            z = line.scheduler.add_noise(x0, own_noise(x0), following)
        expected.append(x0)
    found = line.rollout(clip(16), CONTEXT, noise_source=own_noise)
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-9, atol=1e-9)


# ---- stretches ---------------------------------------------------------------------------------------------
def restarting(model, policy="none", window=8, restart=(8, 4)):
    sink = 0 if policy == "none" else S
    size = {"chunk_frames": F, "sink_frames": sink, "local_attn_size": window}
    steps = {"denoising_step_list": (1000, 500)}
    return StreamingPipeline(model, replace(STREAM, **size, **steps, sink_policy=policy, restart=restart))


def in_stretches(line, noise, prefix):
    """Rollouts of their own, each behind the last frames of the one before it."""
    scheduler, (frames, overlap) = line.scheduler, line.config.restart

    def fresh():
        return Plain(line, line.config.sink_policy, sinks=line.config.sink_frames)

    plain, at, video = fresh(), 0, noise[:, :0]
    pending = [(x, True) for x in prefix.split(F, 1) if x.shape[1]] + [(x, False) for x in noise.split(F, 1)]
    for z, given in pending:
        if at + F > frames:
            plain, at = fresh(), 0
            for x in video[:, -overlap:].split(F, 1):
                plain.flow(x, torch.zeros(2, F), at)
                at += F
        for step, t in enumerate([] if given else line.timesteps):
            t = torch.full((2, F), t)
            z = scheduler.x0_from_flow(plain.flow(z, t, at), z, t)
            if step == 0:
                x0, t = z, torch.full((2, F), line.timesteps[1])
                z = scheduler.add_noise(x0, own_noise(x0), t)
        plain.flow(z, torch.zeros(2, F), at)
        video, at = torch.cat([video, z], 1), at + F
    return video


@pytest.mark.parametrize("prefix", [0, 4])
@pytest.mark.parametrize(
    "policy, window, restart",
    [("none", 8, (8, 4)), ("none", 6, (6, 2)), ("static", 7, (10, 4)), ("ema", 7, (12, 2))],
)
def test_stretches_are_rollouts_of_their_own(model, policy, window, restart, prefix):
    """Append-only; and with a window that slides within a stretch."""
    line = restarting(model, policy, window, restart)
    given = clip(prefix, 5)
    expected = in_stretches(line, clip(20), given)
    cache = line.new_cache(2, 4, 6)
    options = {"initial_latent": given} if prefix else {}
    found = line.rollout(clip(20), CONTEXT, noise_source=own_noise, cache=cache, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert cache.next_frame == prefix + 20
    length = cache.next_frame - cache.first_frame
    assert length <= restart[0] and cache.first_frame % (restart[0] - restart[1]) == 0


def test_stretches_go_on_from_their_carry(model):
    line, parts = restarting(model), list(clip(20).split(F, 1))
    whole = list(line.stream(parts, CONTEXT, noise_source=own_noise))
    for n in range(1, 10):
        cache, fresh = (line.new_cache(2, 4, 6) for _ in range(2))
        begun = line.stream(parts, CONTEXT, cache=cache, noise_source=own_noise)
        *_, last = (next(begun) for _ in range(n))
        assert_equal_bits(last.carry, torch.cat([c.latents for c in whole[:n]], 1)[:, -4:])
        fresh.load_state_dict(cache.state_dict())
        more = line.stream(parts[n:], CONTEXT, cache=fresh, carry=last.carry, noise_source=own_noise)
        for a, b in zip(more, whole[n:], strict=True):
            assert_equal_bits(a.latents, b.latents)
            assert a.first_frame == b.first_frame
    with pytest.raises(rf.ArgumentError, match="the last 4 frames of the stream, found 0 frames"):
        list(line.stream(parts, CONTEXT, cache=fresh))
    assert fresh.next_frame == 20


def test_a_stretch_begins_anywhere(model):
    """At any frame of an empty cache; from its beginning; from a frame of it."""
    line = restarting(model)
    parts, cache = list(clip(20).split(F, 1)), line.new_cache(2, 4, 6)
    options = {"cache": cache, "noise_source": own_noise}
    whole = list(line.stream(parts, CONTEXT, **options, start=0))
    later = list(line.stream(parts, CONTEXT, noise_source=own_noise, start=30))
    assert [c.first_frame for c in later] == list(range(30, 50, F))
    for a, b in zip(later, whole, strict=True):
        assert_equal_bits(a.latents, b.latents)
    again = list(line.stream(parts[8:], CONTEXT, **options, start=16, carry=whole[7].carry))
    for a, b in zip(again, whole[8:], strict=True):
        assert_equal_bits(a.latents, b.latents)
    for a, b in zip(line.stream(parts, CONTEXT, **options, start=0), whole, strict=True):
        assert_equal_bits(a.latents, b.latents)


@pytest.mark.parametrize("policy", ["static", "ema", "recall:frames=1"])
def test_a_second_try_is_as_if_there_had_been_no_draft(model, policy):
    """Frames leave, and are absorbed, once: bit for bit."""
    config = replace(STREAM, chunk_frames=F, local_attn_size=7, sink_policy=policy)
    draft, careful = (
        StreamingPipeline(model, replace(config, denoising_step_list=steps))
        for steps in ((1000,), (1000, 500))
    )
    tried, plain = (careful.new_cache(2, 4, 6) for _ in range(2))
    for i, z in enumerate(clip(20).split(F, 1)):
        (expected,) = careful.stream([z], CONTEXT, cache=plain, noise_source=own_noise)
        if i % 3 != 1:  # else nobody drafts
            (chunk,) = draft.stream([clip(F, i)], CONTEXT, cache=tried)
            again = {"start": chunk.first_frame}
        else:
            again = {}
        (found,) = careful.stream([z], CONTEXT, cache=tried, noise_source=own_noise, **again)
        assert_equal_bits(found.latents, expected.latents)
