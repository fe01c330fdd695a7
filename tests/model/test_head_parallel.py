"""Two ranks that share a sample by tokens and heads compute what one process computes."""

import subprocess
import textwrap

import pytest

from helpers.training import ENVIRONMENT, ROOT, torchrun

SCRIPT = """
    import dataclasses, sys
    import torch, torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    import rf_kernels as rf
    from helpers.training import STREAM, TINY
    from reward_forcing.models import BidirectionalWanModel, CausalWanModel
    from reward_forcing.models.head_parallel import HeadParallel, parallelize_heads
    from reward_forcing.pipeline import StreamingPipeline
    from reward_forcing.trainer import Rollout

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)

    def built(kind, sizes=TINY):
        torch.manual_seed(0)
        model = kind(sizes).double()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.15)
        return model

    def gradients(model, run):
        model.zero_grad(set_to_none=True)
        run()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    def compare(one, two):
        for name, gradient in two.items():
            dist.all_reduce(gradient)
            error = (gradient / 2 - one[name]).norm() / one[name].norm()
            assert error <= 1e-12, (name, float(error))

    # The stream: 21 frames through a window of 9, with a sink that absorbs; then replay. And with a linear
    # state beside the window.
    noise, context = draw(2, 21, 4, 4, 4), draw(2, 3, 8)
    renoise = [draw(2, 3, 4, 4, 4) for _ in range(40)]
    tapes, grads = {}, {}
    grad = draw(2, 21, 4, 4, 4)
    beside = dataclasses.replace(TINY, linear_proj=True)
    linear = dataclasses.replace(STREAM, sink_policy="linear")
    for checkpointing, sizes, stream in ((False, TINY, STREAM), (True, TINY, STREAM), (True, beside, linear)):
        for ranks in (1, 2):
            model, cache = built(CausalWanModel, sizes), {}
            model.checkpointing = checkpointing
            if ranks == 2:
                parallelize_heads(model, mesh)
                cache = {"heads": TINY.num_heads // 2}
            left = iter(renoise)
            rollout = Rollout(StreamingPipeline(model, stream), cache=cache)
            tapes[ranks] = rollout.generate(noise, context, [3, 1, 0, 2, 3, 1, 2], lambda *a: next(left))
            grads[ranks] = gradients(model, lambda: rollout.replay(tapes[ranks], context, grad))
        assert (tapes[2].x - tapes[1].x).abs().max() <= 1e-12 * tapes[1].x.abs().max()
        compare(grads[1], grads[2])

    # The bidirectional model on a whole clip.
    clip, t, outputs = draw(2, 4, 5, 4, 4), torch.tensor([300.0, 700.0], dtype=torch.float64), {}
    weight = draw(2, 4, 5, 4, 4)
    for ranks in (1, 2):
        model = built(BidirectionalWanModel)
        if ranks == 2:
            parallelize_heads(model, mesh)
        def run():
            outputs[ranks] = model(clip, t, context)
            (outputs[ranks] * weight).sum().backward()
        grads[ranks] = gradients(model, run)
    assert (outputs[2] - outputs[1]).abs().max() <= 1e-12 * outputs[1].abs().max()
    compare(grads[1], grads[2])

    for call, text in ((lambda: HeadParallel(mesh, 3), "heads"),
                       (lambda: model.parallel.split(torch.zeros(1, 9, 4), 3), "tokens a frame")):
        try:
            call()
            raise SystemExit("not refused")
        except rf.ArgumentError as error:
            assert text in str(error)
    sys.stdout.write(f"rank {dist.get_rank()} agrees\\n")  # one write: the ranks share the pipe
"""


@pytest.mark.heavy
def test_two_ranks_are_one_process(tmp_path):
    """Float64: outputs, and every parameter's gradient (the mean over the ranks), past evictions, with and
    without activation checkpointing."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = ENVIRONMENT | {"PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}:{ROOT / 'tests'}"}
    done = subprocess.run(torchrun(str(script)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(line.split()[1] for line in done.stdout.splitlines() if "agrees" in line) == ["0", "1"]
