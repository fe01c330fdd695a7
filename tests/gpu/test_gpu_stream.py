"""Streams on CUDA: a whole denoising forward captured and replayed, results that never change, memory and
streams that misbehave, no wait for the device, and the recorded streams of the published code."""

import copy
import dataclasses
from itertools import pairwise

import pytest
import torch

import rf_kernels as rf
from benchmarks.gpu_suite import model as model_stage
from helpers.dmd_gradient_case import made
from helpers.ema_evict_case import Case as EvictCase
from helpers.golden_cases import Case, as_dtype, parametrize
from helpers.golden_streams import Geometry, recorded_calls, total_frames
from helpers.gpu_tools import (
    SERVED,
    Captured,
    busy,
    deterministic_algorithms,
    moved,
    new_stream,
    no_synchronisation,
    poisoned_memory,
)
from helpers.promise_tools import POLICIES, make_cache, states_of
from helpers.rope_append_case import inputs as append_inputs
from reward_forcing import CausalWanModel, ModelConfig, StreamConfig, StreamingPipeline, policies
from reward_forcing.models.blocks import CausalSelfAttention
from rf_kernels.testing import assert_equal_bits

CONFIG = ModelConfig(
    dim=256, ffn_dim=512, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=16, text_len=8, freq_dim=32
)
FRAMES, LENGTH, LATENT = 3, 9, (1, 4, 3, 10, 14)  # 35 tokens a frame: no multiple of anything


def make_model(device, dtype=torch.bfloat16, linear_proj=False):
    torch.manual_seed(7)
    model = CausalWanModel(dataclasses.replace(CONFIG, linear_proj=linear_proj))
    for block in model.blocks if linear_proj else ():
        torch.nn.init.normal_(block.self_attn.linear_proj.weight, std=0.2)
    return model.to(device, dtype).requires_grad_(False)


class Stream:
    """A model's stream with its own cache; chunks and timesteps are drawn from a seed."""

    def __init__(self, model, device, state="compensated", policy=None):
        self.model, self.device = model, device
        self.text = model.text_keys(self.draw(1, 8, 16, seed=1))
        policy = policy or rf.EMASink(0.9, state=state)
        spec = model.cache_spec(*LATENT[3:], sink_frames=3, window_frames=LENGTH - 3, undo_frames=FRAMES)
        self.cache = rf.SinkWindowCache(spec, sink=policy)
        self.x = self.draw(*LATENT, seed=2)
        self.t = torch.full((1, 1), 1000.0, device=device)

    def draw(self, *shape, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, device="cpu").to(self.device, self.model.dtype)

    def load(self, seed):
        """New contents of the input tensors, at the same addresses."""
        self.x.copy_(self.draw(*LATENT, seed=seed))
        self.t.fill_(float(seed % 1000))

    def forward(self, opened):
        return self.model(self.x, self.t, self.text, opened)

    def chunk(self, number, forwards=2):
        """One committed chunk; the outputs of its forwards."""
        results = []
        with self.cache.chunk(FRAMES) as opened:
            for i in range(forwards):
                self.load(100 * number + i)
                results.append(self.forward(opened).clone())
        return results

    def fill(self):
        """As many chunks as fill the cache, and one that evicts."""
        for number in range(LENGTH // FRAMES + 1):
            self.chunk(number)


@torch.no_grad()
def test_a_default_device_and_a_copy(device):
    """Built under a default device, as applications do, and copied with its pinned memory and events: the
    same bits."""
    model = make_model(device)
    plain = Stream(model, device)
    plain.fill()
    with torch.device(device):
        stream = Stream(model, device)
        stream.fill()
    copied = Stream(model, device)
    copied.cache = copy.deepcopy(stream.cache)
    expected = plain.chunk(20)
    for other in (stream, copied):
        for ours, theirs in zip(other.chunk(20), expected, strict=True):
            assert_equal_bits(ours, theirs)


@pytest.mark.parametrize(
    "policy", [rf.EMASink(0.9), rf.EMASink(0.9, state="float32"), rf.StaticSink(True)], ids=str
)
@torch.no_grad()
def test_a_latent_is_kept_as_keys_and_values_are(matrix_device, policy):
    """One latent for keys and values beside a cache that is given its channels once more: slots and sink of
    the same bits, from kernels without values and with."""
    sizes = {"layers": 1, "batch": 2, "heads": 1, "head_dim": 224, "grid": (3, 5), "rope": rf.RoPE3D.wan(32)}
    sizes |= {"sink_frames": 2, "window_frames": 5, "dtype": torch.bfloat16, "device": matrix_device}
    latent, ordinary = (
        rf.SinkWindowCache(rf.CacheSpec(**sizes, value_dims=dims), sink=policy) for dims in ((32, 224), None)
    )
    for number in range(6):
        g = torch.Generator().manual_seed(number)
        q, k = (
            torch.randn(2, 45, h, 224, generator=g, device="cpu").to(matrix_device, torch.bfloat16)
            for h in (12, 1)
        )
        v = torch.cat([torch.zeros_like(k[..., :32]), k[..., 32:]], -1)
        with latent.chunk(3) as one, ordinary.chunk(3) as other:
            out, expected = one.attend(0, q, k), other.attend(0, q, k, v)[..., 32:]
        torch.testing.assert_close(out, expected, rtol=2**-7, atol=2**-7)
        assert_equal_bits(latent.k, ordinary.k)
        for ours, theirs in zip(latent.sink_state(0), ordinary.sink_state(0), strict=True):
            assert_equal_bits(ours, theirs[..., -ours.shape[-1] :])
    assert latent.nbytes < 0.6 * ordinary.nbytes


# ---- CUDA graphs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SERVED, ids=str)
@torch.no_grad()
def test_captured_forward_follows_the_stream(device, dtype):
    """Captured once in a full cache, replayed over chunks: slots, angles and the sink's schedule are read
    from the plan's memory.

    Two graphs: the first forward of a chunk, which evicts, and the repeated one. Every output and the whole
    cache are the bits of a stream without graphs.
    """
    model = make_model(device, dtype)
    eager, graphed = Stream(model, device), Stream(model, device)
    for stream in (eager, graphed):
        stream.fill()
    current = []  # the chunk: replays on the CPU are calls, and need it

    opened = graphed.cache.open(FRAMES, undo=True)
    graphed.forward(opened)  # warm-up: library handles, workspaces
    opened.rollback()
    current[:] = [graphed.cache.open(FRAMES, undo=True)]
    first = Captured(lambda: graphed.forward(current[0]), device)  # nothing of the chunk has been evicted yet
    repeat = Captured(lambda: graphed.forward(current[0]), device)
    current[0].rollback()

    for number in range(10, 18 if device == "cuda" else 13):
        expected = eager.chunk(number, forwards=3)
        opened = graphed.cache.open(FRAMES)
        current[:] = [opened]
        for i, graph in enumerate((first, repeat, repeat)):
            graphed.load(100 * number + i)
            assert_equal_bits(graph.replay(), expected[i])
        opened.mark_written()  # what a replayed append cannot note down
        opened.commit()
    assert_equal_bits(graphed.cache.k, eager.cache.k)
    assert_equal_bits(graphed.cache.v, eager.cache.v)
    for layer in range(eager.cache.spec.layers):
        for ours, theirs in zip(graphed.cache.sink_state(layer), eager.cache.sink_state(layer), strict=True):
            assert_equal_bits(ours, theirs)


@pytest.mark.parametrize("text", ["merged:threshold=0.3", "patches:patches=5"])
@torch.no_grad()
def test_a_captured_forward_reads_the_weights_of_keys_anew(device, text):
    """The first forward of a chunk runs the policy. The repeated one is captured, and reads the weights where
    they always lie."""
    model = make_model(device)
    eager, graphed = (Stream(model, device, policy=policies.parse(text)) for _ in range(2))
    for stream in (eager, graphed):
        stream.fill()
        stream.chunk(9)
    current, seen = [], []
    with graphed.cache.chunk(FRAMES, undo=True) as opened:
        current[:] = [opened]
        for _ in range(2):  # warm-up
            graphed.forward(opened)
        repeat = Captured(lambda: graphed.forward(current[0]), device)
        opened.rollback()
    for number in range(10, 15):
        expected = eager.chunk(number)
        with graphed.cache.chunk(FRAMES) as opened:
            current[:] = [opened]
            graphed.load(100 * number)
            assert_equal_bits(graphed.forward(opened), expected[0])
            graphed.load(100 * number + 1)
            assert_equal_bits(repeat.replay(), expected[1])
        seen.append(graphed.cache._sink.tensors["bias"].clone())
    assert not all(torch.equal(a, b) for a, b in pairwise(seen)) or text.startswith("patches")
    assert_equal_bits(graphed.cache.k, eager.cache.k)


@torch.no_grad()
def test_graphed_chunks_are_those_of_the_pipeline(device):
    """A whole chunk from captured forwards, as the benchmark times it: the latents of StreamingPipeline, bit
    for bit."""
    model, stream = make_model(device), StreamConfig(denoising_step_list=(1000, 750, 500))
    latent, context = (
        torch.randn(1, 3, 4, *LATENT[3:]).to(device, model.dtype),
        torch.zeros(1, 8, 16, device=device),
    )
    plain, graphed = (model_stage.Ours(model, stream, latent, context.to(model.dtype)) for _ in range(2))
    for number in range(5):
        given = torch.randn(latent.shape, generator=torch.Generator().manual_seed(number)).to(
            device, model.dtype
        )
        plain.step(given)
        graphed.step(given)
    plain.step(latent)
    graphs, chunks = model_stage.Graphs(graphed), plain.chunks()  # the graphs take a chunk to make
    for number in range(3):
        torch.manual_seed(number)
        expected = next(chunks).latents
        torch.manual_seed(number)
        assert_equal_bits(graphs.chunk(), expected)
    assert_equal_bits(graphed.cache.k, plain.cache.k)


def test_captured_ops_read_new_contents(device):
    """``dmd_gradient`` and ``sink_window_attention`` alone: replayed on new inputs in the same memory."""
    x, kw = made((2, 3, 4, 19, 23), torch.bfloat16)
    x, kw = moved(x, device), {name: moved(value, device) for name, value in kw.items()}
    q, k, v = (torch.randn(1, n, 2, 128, device=device).bfloat16() for n in (130, 300, 300))

    def both():
        gradient, aux = rf.dmd_gradient(x, **kw, return_aux=True)
        return gradient, *aux, rf.sink_window_attention(q, k, v, kv_tokens=257)

    both()
    graph = Captured(both, device)
    for _ in range(3):
        for tensor in (x, kw["fake"], q, k, v):
            tensor.copy_(torch.randn(tensor.shape).to(tensor.dtype))
        found = [t.clone() for t in graph.replay()]
        for ours, direct in zip(found, both(), strict=True):
            assert_equal_bits(ours, direct)


# ---- the same bits, every time -----------------------------------------------------------------------------


def every_op(device, dtype):
    """name -> a call on fixed inputs that returns all it computes and writes."""
    sizes = (200, 611) if device == "cpu" else (1560, 14040)
    q, k, v = (torch.randn(1, n, 3, 128, device=device).to(dtype) for n in (sizes[0], sizes[1], sizes[1]))
    case = EvictCase(dtype, "compensated", n=39, heads=3, head_dim=16)
    evict = [moved(t, device) for t in case.tensors]
    evict_options = {name: moved(value, device) for name, value in case.options.items()}
    append, append_options = append_inputs(dtype)
    append = [moved(t, device) for t in append]
    append_options = {name: moved(value, device) for name, value in append_options.items()}
    x, kw = made((2, 21, 4, 19, 23), dtype)
    x, kw = moved(x, device), {name: moved(value, device) for name, value in kw.items()}
    grad_out = torch.randn_like(q)

    def attention():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out, lse = rf.sink_window_attention(*leaves, kv_tokens=sizes[1] - 5, return_lse=True)
        return out.detach(), lse

    def attention_backward():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = rf.sink_window_attention(*leaves, kv_tokens=sizes[1] - 5)
        return torch.autograd.grad(out, leaves, grad_out)

    def evicted():
        tensors = [None if t is None else t.clone() for t in evict]
        rf.ema_evict(*tensors, **evict_options)
        return [t for t in tensors if t is not None]

    def appended():
        caches = [t.clone() for t in append[3:]]
        return [rf.rope_append(*append[:3], *caches, **append_options), *caches]

    def gradient():
        result, aux = rf.dmd_gradient(x, **kw, return_aux=True)
        return [result, *aux]

    return {
        "sink_window_attention": attention,
        "its backward": attention_backward,
        "ema_evict": evicted,
        "rope_append": appended,
        "dmd_gradient": gradient,
    }


@pytest.mark.parametrize("dtype", SERVED, ids=str)
def test_a_hundred_times_the_same_bits(device, dtype):
    """Forward of every op. (The backward of attention is PyTorch's on CUDA, whose sums over queries are
    atomic: not promised.)"""
    for name, call in every_op(device, dtype).items():
        if name == "its backward" and device == "cuda":
            continue
        expected = [t.clone() for t in call()]
        for repeat in range(100 if device == "cuda" else 5):
            for found, wanted in zip(call(), expected, strict=True):
                same = found.reshape(-1).view(torch.uint8) == wanted.reshape(-1).view(torch.uint8)
                assert bool(same.all()), f"{name}: repeat {repeat} differs"


# ---- memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SERVED, ids=str)
def test_new_memory_full_of_nan_changes_nothing(device, dtype):
    for name, call in every_op(device, dtype).items():
        if name == "its backward" and device == "cuda":
            continue
        with deterministic_algorithms():
            expected = [t.clone() for t in call()]
        with poisoned_memory(device):
            found = [t.clone() for t in call()]
        for ours, wanted in zip(found, expected, strict=True):
            assert bool(ours.isnan().eq(wanted.isnan()).all()), name
            assert_equal_bits(ours, wanted)


@pytest.mark.parametrize("policy", POLICIES)
def test_slots_that_were_never_written_are_never_seen(device, policy):
    """A stream in a cache full of NaN, from its first chunk on, against one in a clean cache."""
    clean, poisoned = (make_cache(policy, dtype=torch.bfloat16, head_dim=64, device=device) for _ in range(2))
    for tensor in (poisoned.k, poisoned.v, *states_of(poisoned).values()):
        tensor.fill_(float("nan"))
    tokens = 2 * clean.spec.frame_tokens
    for chunk in range(6):
        with clean.chunk(2) as expected, poisoned.chunk(2) as found:
            for layer in range(clean.spec.layers):
                g = torch.Generator().manual_seed(10 * chunk + layer)
                qkv = [torch.randn(1, tokens, 2, 64, generator=g).bfloat16().to(device) for _ in range(3)]
                out = expected.attend(layer, *qkv)
                assert bool(out.isfinite().all())
                assert_equal_bits(found.attend(layer, *qkv), out)
    assert clean.next_frame > clean.ring.length


# ---- streams -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SERVED, ids=str)
def test_work_goes_to_the_current_stream(device, dtype):
    """While the default stream is busy: the results of a stream of its own are there before the default
    stream is done."""
    for name, call in every_op(device, dtype).items():
        expected, own = [t.clone() for t in call()], new_stream(device)
        with own:
            # memory and workspaces: an allocation could wait for the device
            warm = [t.clone() for t in call()]
        del warm
        if device == "cuda":
            torch.cuda.synchronize()
        busy(device)
        with own:
            found = [t.clone() for t in call()]
            if device == "cuda":
                torch.cuda.current_stream().synchronize()
                assert not torch.cuda.default_stream().query(), f"{name}: waited for the default stream"
        if device == "cuda":
            torch.cuda.synchronize()
        if name == "its backward" and device == "cuda":
            assert all(bool(t.isfinite().all()) for t in found)
            continue
        for ours, wanted in zip(found, expected, strict=True):
            assert_equal_bits(ours, wanted)


def test_order_within_a_stream_is_kept(device):
    """Inputs that are written late on a stream of its own are the ones that the op reads."""
    late = [torch.randn(1, n, 2, 128, device=device).bfloat16() for n in (130, 300, 300)]
    expected = rf.sink_window_attention(*late, kv_tokens=300)
    for _ in range(3):
        q, k, v = (torch.full_like(t, float("nan")) for t in late)
        if device == "cuda":
            torch.cuda.synchronize()
        with new_stream(device):
            busy(device, seconds=0.1)
            for target, source in zip((q, k, v), late, strict=True):
                target.copy_(source)
            out = rf.sink_window_attention(q, k, v, kv_tokens=300)
            if device == "cuda":
                torch.cuda.current_stream().synchronize()
        assert_equal_bits(out, expected)


def test_two_streams_at_once(device):
    """Two caches on two CUDA streams, interleaved: each as if it were alone (a workspace per stream)."""
    model = make_model(device)
    with torch.no_grad():
        alone = Stream(model, device)
        numbers = range(12 if device == "cuda" else 4)
        expected = [alone.chunk(number) for number in numbers]
        users = [Stream(model, device) for _ in range(2)]
        contexts = [torch.cuda.Stream() if device == "cuda" else None for _ in users]
        if device == "cuda":
            torch.cuda.synchronize()
        found = [[], []]
        for number in numbers:
            for user, context, results in zip(users, contexts, found, strict=True):
                with torch.cuda.stream(context):  # None: no change
                    results.append(user.chunk(number))
        if device == "cuda":
            torch.cuda.synchronize()
    for results in found:
        for ours, theirs in zip(results, expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert_equal_bits(a, b)


# ---- no wait for the device --------------------------------------------------------------------------------


@torch.no_grad()
def test_streaming_never_waits_for_the_device(device):
    """Planning, appends, attention, commits, the whole pipeline but for the start of a stream."""
    model = make_model(device)
    stream = Stream(model, device)
    stream.fill()
    pipeline = StreamingPipeline(model, StreamConfig(denoising_step_list=(1000, 500)))
    noise = [torch.randn(1, 3, 4, *LATENT[3:], device=device).bfloat16() for _ in range(5)]
    cache = pipeline.new_cache(1, *LATENT[3:])
    chunks = pipeline.stream(noise, torch.zeros(1, 8, 16, device=device).bfloat16(), cache=cache)
    next(chunks)
    with no_synchronisation(device):
        with stream.cache.chunk(FRAMES) as opened:
            for _ in range(2):
                stream.forward(opened)
        produced = list(chunks)
    assert len(produced) == 4 and all(bool(chunk.latents.isfinite().all()) for chunk in produced)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@torch.no_grad()
@pytest.mark.parametrize(
    "policy",
    [
        "two-rates:adaptive=true",
        "strided",
        "cyclic",
        "important",
        "merged",
        "recall",
        "ahead",
        "shots",
        "random",
        "linear",
        "routed",
        "patches:patches=5",
    ],
)
def test_policies_by_name_never_wait_and_are_those_of_the_cpu(policy):
    """In float32: to the rounding of other kernels."""
    config = StreamConfig(denoising_step_list=(1000, 500), sink_policy=policy, cuts=(9,))
    found = []
    for place in ("cpu", "cuda"):
        model = make_model(place, torch.float32, linear_proj=policy == "linear")
        pipeline = StreamingPipeline(model, config)
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(1, 3, 4, *LATENT[3:], generator=generator).to(place) for _ in range(6)]
        cache = pipeline.new_cache(1, *LATENT[3:])
        text = torch.zeros(1, 8, 16, device=place)
        chunks = pipeline.stream(noise, text, cache=cache, noise_source=torch.zeros_like)
        first = next(chunks)
        with no_synchronisation(place):
            rest = list(chunks)
        found.append(torch.cat([chunk.latents.cpu() for chunk in (first, *rest)], 1))
    assert (found[0] - found[1]).norm() <= 1e-3 * found[0].norm()


def test_losses_never_wait_for_the_device(device):
    x, kw = made((2, 3, 4, 19, 23), torch.bfloat16)
    x, kw = moved(x, device).requires_grad_(), {name: moved(value, device) for name, value in kw.items()}
    reward = torch.rand(2, device=device)
    with no_synchronisation(device):
        loss, aux = rf.dmd_loss(x, **kw, weight=rf.reward_weight(reward, 2.0), return_aux=True)
        loss.backward()
    assert bool(x.grad.isfinite().all()) and int(aux.dropped) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_wait_would_be_noticed():
    """The one mode that reads the device raises under the watch of the two tests above."""
    cache = make_cache(
        rf.EMASink(0.9, on_nonfinite="raise"), device="cuda", dtype=torch.bfloat16, head_dim=64
    )
    with no_synchronisation("cuda"), pytest.raises(RuntimeError, match="synchroniz"):
        for _ in range(6):
            qkv = [
                torch.zeros(1, 2 * cache.spec.frame_tokens, 2, 64, device="cuda").bfloat16() for _ in range(3)
            ]
            with cache.chunk(2) as chunk:
                for layer in range(cache.spec.layers):
                    chunk.append(layer, *qkv)


# ---- the published code's recorded streams -----------------------------------------------------------------


@parametrize("ema_self_attention_stream")
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@torch.no_grad()
def test_recorded_stream(device, case: Case, dtype):
    """One layer over the recorded chunks. Where the recording documents a bug of the published code, the
    library's own rule in float64 is compared with (docs/compatibility.md)."""
    recorded = "bf16.out" if dtype == "bf16" else "out_f64"
    if recorded not in case.tensors and not case.documents_bug:
        pytest.skip(f"the case has no {recorded}")
    hyper, tensors, run_dtype = case.hyper, case.tensors, as_dtype(dtype)
    n, x = hyper["frame_seqlen"], tensors["x"]
    lengths = (
        tensors["call_len"] if "call_len" in tensors else torch.full((len(x),), hyper["tokens_per_call"])
    )
    calls = list(recorded_calls(case, [int(length) // n for length in lengths]))
    geometry = Geometry.of(case, hyper["cache_capacity_tokens"], total_frames(calls))
    config = ModelConfig(
        dim=hyper["dim"], ffn_dim=hyper["dim"], num_heads=hyper["num_heads"], num_layers=1, eps=hyper["eps"]
    )
    layer = CausalSelfAttention(config)
    layer.load_state_dict(case.weights(), strict=True)
    layer = layer.to(device, run_dtype)
    spec = rf.CacheSpec(
        layers=1,
        batch=hyper["batch"],
        heads=hyper["num_heads"],
        head_dim=hyper["head_dim"],
        grid=geometry.grid,
        sink_frames=geometry.sink_frames,
        window_frames=geometry.window_frames,
        rope=config.rope,
        dtype=run_dtype,
        device=device,
    )
    cache = rf.SinkWindowCache(spec, sink=geometry.sink_policy("compensated"))
    reference, weights = geometry.reference(), dict(case.weights())
    outputs, ruled = [], []
    for call in calls:
        if call.opens:
            opened = cache.open(call.frames)
            reference.begin(call.frames)
        given = x[call.index, :, : call.frames * n]
        pad = (0, 0, 0, x.shape[2] - call.frames * n)
        y = layer(given.to(device, run_dtype), 0, opened).cpu()
        outputs.append(torch.nn.functional.pad(y, pad))
        if case.documents_bug:
            y = reference.self_attention(given, weights, hyper["num_heads"], hyper["eps"])
            ruled.append(torch.nn.functional.pad(y, pad))
        if call.closes:
            opened.commit()
    expected = torch.stack(ruled) if case.documents_bug else tensors[recorded]
    case.tolerance(dtype, "out").check(torch.stack(outputs), expected, "out")
