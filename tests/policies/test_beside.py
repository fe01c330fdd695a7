"""What policies have beside the slots, and what a model tells them: against the rule in float64, and in every
way that a forward runs."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounter

import rf_kernels as rf
from helpers import policy_rules as rules
from helpers.cache_case import attend, make, state_of, step, tensors, text_of
from helpers.training import STREAM, TINY
from reward_forcing import CausalWanModel, policies
from reward_forcing.checkpoint import load_causal_model
from reward_forcing.models.head_parallel import HeadParallel, share_heads
from reward_forcing.pipeline import StreamingPipeline
from rf_kernels.testing import assert_equal_bits, fingerprint, relative_l2


def test_an_answer_is_that_of_its_query_heads():
    """Also of queries with more heads than keys, in the layer that is asked, under the norm that is given."""
    S, W, F = 2, 5, 3
    cache = make(S, W, policy=policies.LinearState(), layers=2, batch=2)
    told = [rules.Told(S, W, grid=cache.spec.grid) for _ in range(2)]
    weight, k_weight = (1 + torch.rand(32, dtype=torch.float64) for _ in range(2))

    def normed(x, w):
        return x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * w

    for number in range(6):
        with cache.chunk(F) as chunk:
            for layer in range(2):
                told[layer].ends.append(F * (number + 1))
                q, k, v = tensors(cache, F, 10 * number + layer, 4)
                norms = {"q_norm": weight, "norm": "head", "eps": 1e-3}
                chunk.attend(layer, q, k, v, k_norm=k_weight, **norms)
                expected = rules.linear(
                    told[layer], normed(q, weight), range(F * number, F * number + F), "relu", S + W
                )
                assert relative_l2(chunk.beside(layer, q, **norms), expected) < 1e-12
                remember(told[layer], F * number, normed(k, k_weight), v)
    assert expected.abs().max() > 0


def remember(told, begin, k, v):
    n = told.grid[0] * told.grid[1]
    for i in range(k.shape[1] // n):
        at = slice(i * n, (i + 1) * n)
        told.k[begin + i], told.v[begin + i], told.at[begin + i] = (
            k[:, at].detach(),
            v[:, at].detach(),
            begin + i,
        )


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_answer_has_gradients(checkpointed):
    """For the queries and the model's own map; also when later chunks have changed the state, and through a
    checkpointed block. While there is nothing to answer from, the map's bias counts for nothing."""
    S, W, F = 2, 5, 3
    cache = make(S, W, policy=policies.LinearState())
    told = rules.Told(S, W, grid=cache.spec.grid)
    project = torch.nn.Linear(32, 32, dtype=torch.float64)
    for number in range(6):
        told.ends.append(F * (number + 1))
        q, k, v = (x.requires_grad_() for x in tensors(cache, F, number))
        own_at = range(F * number, F * number + F)
        answer = rules.linear(told, q, own_at, "relu", S + W)
        expected = project(answer) * bool(answer.any())
        with cache.chunk(F) as chunk:

            def block(q, k, v, chunk=chunk):
                y = chunk.attend(0, q, k, v)
                return y.detach() * 0 + chunk.beside(0, q, project=project)

            if checkpointed:
                found = torch.utils.checkpoint.checkpoint(block, q, k, v, use_reentrant=False)
            else:
                found = block(q, k, v)
        with torch.no_grad():
            saved = cache.state_dict()
            for i in range(3):  # nothing of what the backward needs is the cache's
                step(cache, F, 90 + i)
        assert relative_l2(found.detach(), expected.detach()) < 1e-12
        inputs = (q, *project.parameters())
        pairs = [torch.autograd.grad(y.square().sum(), inputs, allow_unused=True) for y in (found, expected)]
        for a, b in zip(*pairs, strict=True):
            assert (a is None or not a.any()) if b is None else relative_l2(a, b) < 1e-12
        cache.load_state_dict(saved)
        remember(told, F * number, k, v)
    assert pairs[0][2].abs().max() > 0


def test_an_answer_under_compile_is_that_of_eager():
    """One graph for all stages of a stream, layers and chunks."""
    caches = [make(2, 5, policy=policies.LinearState(), dtype=torch.float32, layers=2) for _ in range(2)]
    project = torch.nn.Linear(32, 32)

    def block(chunk, layer, q, k, v):
        return chunk.attend(layer, q, k, v) + chunk.beside(layer, q, project=project)

    counter = CompileCounter()
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    with torch.no_grad():
        for number in range(7):
            outputs = []
            for cache, run in zip(caches, (block, compiled), strict=True):
                with cache.chunk(3) as chunk:
                    for layer in range(2):
                        index = torch.tensor(layer)
                        outputs.append(run(chunk, index, *tensors(cache, 3, 10 * number + layer)))
            assert_equal_bits(torch.stack(outputs[:2]), torch.stack(outputs[2:]))
    assert counter.frame_count == 1
    with caches[1].chunk(3) as chunk:  # with grad it leaves the graph
        q, k, v = tensors(caches[1], 3, 5)
        project.zero_grad()
        y = torch.compile(block, backend="eager")(chunk, torch.tensor(0), q.requires_grad_(), k, v)
        y.sum().backward()
        block(chunk, 1, q, k, v)
    assert q.grad.abs().max() > 0 and project.weight.grad.abs().max() > 0


def test_heads_with_states_of_their_own():
    """Heads as rows: two with a linear state, one with a plain window; those without answer zeros."""
    F, S, W = 2, 1, 5
    sinks = [policies.LinearState(), rf.StaticSink(rephase=True), policies.LinearState("softmax")]
    whole = make(S, W, heads=3, policy=policies.LinearState())
    rows = rf.SinkWindowRows(dataclasses.replace(whole.spec, batch=3, heads=1), sink=sinks)
    told = rules.Told(S, W, grid=whole.spec.grid)
    project = torch.nn.Linear(32, 32, dtype=torch.float64).requires_grad_(False)
    for number in range(8):
        told.ends.append(F * (number + 1))
        q, k, v = tensors(whole, F, number)
        own_at = range(F * number, F * (number + 1))
        with rows.chunk(F) as batch, torch.no_grad():
            by_head = [x[0].transpose(0, 1).unsqueeze(2) for x in (q, k, v)]
            batch.attend(0, *by_head)
            found = batch.beside(0, by_head[0])
            projected = batch.beside(0, by_head[0], project=project)
            with pytest.raises(rf.ArgumentError, match="q.*of 3 samples"):
                batch.beside(0, by_head[0][:2])
        for head, phi in ((0, "relu"), (2, "softmax")):
            expected = rules.linear(told, q, own_at, phi, S + W)[:, :, head : head + 1]
            assert relative_l2(found[head : head + 1], expected) < 1e-12
            there = bool(expected.any())
            assert relative_l2(projected[head], project(found[head]) * there) < 1e-12
        assert not found[1].any() and not projected[1].any()
        remember(told, F * number, k, v)


def test_what_is_refused_of_beside():
    cache = make(2, 4, policy=policies.LinearState(), layers=2, undo_frames=4)
    q, k, v = tensors(cache, 2, 0)
    before = fingerprint(*state_of(cache))
    with cache.chunk(2, undo=True) as chunk:
        with pytest.raises(rf.ArgumentError, match="beside.*layer.*has written, found 0"):
            chunk.beside(0, q)
        chunk.attend(0, q, k, v)
        for wrong in (q[:, :3], q[..., :16], q.float(), q[0], None):
            with pytest.raises(rf.ArgumentError, match="beside.*`q`.*multiple of 2, 32"):
                chunk.beside(0, wrong)
        chunk.beside(0, q)
        chunk.attend(1, q, k, v)
        expected = r"asks for `beside` in every layer, found none in layers \[1\] under LinearState"
        with pytest.raises(rf.ArgumentError, match=expected):
            chunk.commit()
    assert not chunk.is_open and fingerprint(*state_of(cache)) == before
    with make(2, 4).chunk(2) as chunk:
        chunk.attend(0, q, k, v)
        with pytest.raises(rf.ArgumentError, match="a policy that answers beside the slots, found EMASink"):
            chunk.beside(0, q)
    for wrong, expected in (({"phi": "elu"}, "relu, softmax"), ({"span": 5}, "0, or at least 6")):
        with pytest.raises(rf.ArgumentError, match=expected):
            make(2, 4, policy=policies.LinearState(**wrong))
    with pytest.raises(rf.ArgumentError, match="sink_frames.*at least 1"):
        make(0, 4, policy=policies.LinearState())


def test_a_linear_state_counts_a_frame_once():
    """Also when the stream goes back over counted frames, begins at another frame, and starts over."""
    cache, other = (make(2, 5, policy=policies.LinearState()) for _ in range(2))
    for number, start in enumerate((None, None, None, 4, None, None)):
        with cache.chunk(3, start=start) as chunk:
            attend(chunk, 0, *tensors(cache, 3, number))
    counted = cache._sink.tensors["frames"]
    assert counted.item() == 8 and cache.next_frame == 13
    with cache.chunk(3, start=0) as chunk:
        attend(chunk, 0, *tensors(cache, 3, 0))
    assert counted.item() == 0
    with other.chunk(3, start=7) as chunk:
        attend(chunk, 0, *tensors(cache, 3, 0))
    for number in range(1, 6):
        expected, found = (step(each, 3, number) for each in (cache, other))
        assert relative_l2(found[0], expected[0]) < 1e-10  # positions that differ by 7 for all


def test_a_model_with_a_map_of_its_own_streams_with_a_linear_state(tmp_path):
    """Read from a file that has one; under another policy it is refused, and so is a model without."""
    torch.manual_seed(0)
    model = CausalWanModel(dataclasses.replace(TINY, linear_proj=True)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model = load_causal_model(tmp_path / "model.safetensors", num_heads=2, text_len=3, dtype=torch.float64)
    assert model.config.linear_proj
    noise, context = torch.randn(1, 15, 4, 4, 4).double(), torch.randn(1, 3, 8).double()

    def latents(model, policy):
        config = dataclasses.replace(STREAM, sink_policy=policy, denoising_step_list=(1000, 500))
        return StreamingPipeline(model, config).rollout(noise, context, noise_source=torch.zeros_like)

    with_state = latents(model, "linear")
    for block in model.blocks:
        torch.nn.init.zeros_(block.self_attn.linear_proj.weight)
        torch.nn.init.zeros_(block.self_attn.linear_proj.bias)
    without = latents(model, "linear")
    plain = CausalWanModel(TINY).double()
    plain.load_state_dict(model.state_dict(), strict=False)
    assert relative_l2(without, latents(plain, "static")) < 1e-12
    assert_equal_bits(with_state[:, :6], without[:, :6])
    assert (with_state - without)[:, 6:].norm() > 0
    with pytest.raises(rf.ArgumentError, match="sink_policy.*a policy that answers, found 'static'"):
        latents(model, "static")
    with pytest.raises(rf.ArgumentError, match="a model without linear_proj can stream with, found 'linear'"):
        latents(plain, "linear")


def test_a_text_is_told_in_every_way_that_a_forward_runs():
    """Compiled, under grad and in a checkpointed block, whose recomputation tells nothing; the last prompt
    counts."""
    caches = [make(3, 4, policy=policies.RoutedFrames(2, 1), layers=2, dtype=torch.float64) for _ in range(3)]

    def block(chunk, layer, text, q, k, v):
        chunk.tell(layer, text)
        return chunk.attend(layer, q, k, v)

    def checkpointed(chunk, layer, text, q, k, v):
        q, k = q.requires_grad_(), k.requires_grad_()
        y = torch.utils.checkpoint.checkpoint(block, chunk, layer, text, q, k, v, use_reentrant=False)
        backwards.append((y, k))
        return y

    counter, backwards, chosen = CompileCounter(), [], set()
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    for number in range(8):
        outputs = []
        for cache, run in zip(caches, (block, compiled, checkpointed), strict=True):
            with torch.set_grad_enabled(run is checkpointed), cache.chunk(2) as chunk:
                for layer in range(2):
                    inputs = tensors(cache, 2, 10 * number + layer)
                    outputs.append(run(chunk, torch.tensor(layer), text_of(cache, 9 * number), *inputs))
        for found in (outputs[2:4], outputs[4:]):
            assert_equal_bits(torch.stack(found).detach(), torch.stack(outputs[:2]))
        numbers = [cache._sink.tensors["number"] for cache in caches]
        assert torch.equal(numbers[0], numbers[1]) and torch.equal(numbers[0], numbers[2])
        chosen |= {tuple(x) for x in numbers[0].flatten(0, 1).tolist()}
    assert counter.frame_count == 1 and len(chosen) > 6
    before = fingerprint(*state_of(caches[2]))
    for y, k in backwards:
        assert torch.isfinite(torch.autograd.grad(y.sum(), k)[0]).all()
    assert fingerprint(*state_of(caches[2])) == before


def test_what_is_refused_of_tell():
    cache = make(2, 4, policy=policies.RoutedFrames(1, 1), undo_frames=4, batch=2)
    (q, k, v), text = tensors(cache, 2, 0), text_of(cache, 0)
    with (
        pytest.raises(rf.ArgumentError, match="tells the text by `tell` in every layer"),
        cache.chunk(2) as c,
    ):
        c.attend(0, q, k, v)
    cache.reset()
    for number in range(3):
        step(cache, 2, number)
    before = fingerprint(*state_of(cache))
    with cache.chunk(2, undo=True) as chunk:
        for wrong in (text[:1], text[..., :16], text[:, :0], text[0], None):
            with pytest.raises(rf.ArgumentError, match=r"tell.*`text`.*\[2, T, a multiple of 2, 32\]"):
                chunk.tell(0, wrong)
        with pytest.raises(rf.ArgumentError, match="tells the text by `tell` before it attends"):
            chunk.attend(0, q, k, v)
        assert fingerprint(*state_of(cache)) == before and not chunk.written
        chunk.tell(0, text.repeat(1, 1, 2, 1))  # more heads than keys have
        chunk.attend(0, q, k, v)
        assert fingerprint(*state_of(cache)) != before
        chunk.rollback()
    assert fingerprint(*state_of(cache)) == before
    rows = rf.SinkWindowRows(cache.spec, sink=[policies.RoutedFrames(1, 1), rf.EMASink()])
    with rows.chunk(2) as batch:
        with pytest.raises(rf.ArgumentError, match="tell.*`text`.*2 samples"):
            batch.tell(0, text[:1])
        batch.tell(0, text)
        batch.attend(0, q, k, v)
    with make(2, 4).chunk(2) as chunk:
        assert not chunk.hears
        chunk.tell(0, "nothing is looked at")
        chunk.attend(0, q[:1], k[:1], v[:1])
    for wrong in ({"frames": 3}, {"every": 0}):
        with pytest.raises(rf.ArgumentError, match="RoutedFrames"):
            make(2, 4, policy=policies.RoutedFrames(**wrong))


def test_a_prompt_that_changes_changes_what_is_kept():
    """Through the pipeline: the model tells its cross-attention's keys, of the prompt that streams."""
    torch.manual_seed(0)
    model = CausalWanModel(TINY).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = dataclasses.replace(STREAM, sink_policy="routed:frames=2", denoising_step_list=(1000, 500))
    pipeline = StreamingPipeline(model, config)
    noise = list(torch.randn(9, 1, 3, 4, 4, 4).double())
    prompts, kept = torch.randn(2, 1, 3, 8).double() * 3, []
    for second in prompts:
        cache = pipeline.new_cache(1, 4, 4)
        for part, prompt in ((noise[:4], prompts[0]), (noise[4:], second)):
            list(pipeline.stream(part, prompt, cache=cache, noise_source=torch.zeros_like))
        kept.append(cache._sink.tensors["number"].tolist())
    assert kept[0] != kept[1]
    assert all(n % 3 == 0 for layers in kept for layer in layers for n in layer[0][1:])


def test_a_rank_tells_its_own_heads():
    """Those that its cache has, of ranks that share a sample by heads."""
    model, text = CausalWanModel(TINY), torch.randn(1, 5, TINY.num_heads, TINY.head_dim)
    share_heads(model, HeadParallel.alone(2, TINY.num_heads))
    cache = make(
        2, 4, policy=policies.RoutedFrames(1, 1), dtype=torch.float32, heads=1, head_dim=TINY.head_dim
    )
    for number in range(4):
        with cache.chunk(2) as chunk:
            model.blocks[0].self_attn.tell(text, 0, chunk)
            chunk.attend(0, *tensors(cache, 2, number))
    assert relative_l2(chunk.plan.told[0], text[:, :, :1].mean(1)) < 1e-6
