"""Other people's streaming systems, from their own checkouts, with and without `integrations.wan.patch`.

    python -m benchmarks.integrations DIR                 the table of docs/integrations.md
    python -m benchmarks.integrations DIR --repeats 15    and the times
    python -m benchmarks.integrations DIR --system NAME   one system

DIR holds checkouts named as in `upstream.py`. Their own pipelines run on a CPU, small, with random weights:
five chunks and more, evictions, several denoising forwards and the clean one. Each system runs in a process
of its own, because they share the names of their modules.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed

import rf_kernels.integrations.wan as integration

from .upstream import FAULTS, SYSTEMS, Rig, same_noise


def distance(a, b) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def measure(rig: Rig, frames: int) -> dict:
    """Relative L2 over a stream in float32; bf16's own distance from float64 and that of the patched one."""
    found = {}
    outs = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        pipeline = rig.pipeline(dtype)
        outs[dtype, False] = rig.run(pipeline, frames, dtype)
        unpatch = integration.patch(pipeline.generator, rig.family)
        outs[dtype, True] = rig.run(pipeline, frames, dtype)
        unpatch()
        again = rig.run(pipeline, frames, dtype)
        assert torch.equal(again, outs[dtype, False]), "unpatch does not restore"
    exact = outs[torch.float64, False]
    found["float64"] = distance(outs[torch.float64, True], exact)
    found["float32"] = distance(outs[torch.float32, True], outs[torch.float32, False])
    found["bf16_own"] = distance(outs[torch.bfloat16, False], exact)
    found["bf16_patched"] = distance(outs[torch.bfloat16, True], exact)
    return found


def _timed(rig, pipeline, frames, dtype):
    """Seconds of a stream, and those in self-attention apart from its four linears."""
    inside = [0.0]
    handles = []
    for block in pipeline.generator.model.blocks:
        module, began = block.self_attn, []
        for part, sign in ((module, 1), (module.q, -1), (module.k, -1), (module.v, -1), (module.o, -1)):
            handles.append(
                part.register_forward_pre_hook(lambda *_, began=began: began.append(time.thread_time()))
            )

            def after(*_, sign=sign, began=began):
                inside[0] += sign * (time.thread_time() - began.pop())

            handles.append(part.register_forward_hook(after))
    begin = time.thread_time()
    rig.run(pipeline, frames, dtype)
    seconds = time.thread_time() - begin
    for handle in handles:
        handle.remove()
    return seconds, inside[0]


def times(rig: Rig, frames: int, repeats: int) -> dict:
    """Both in turn, in one process, on one thread: the ratio of the medians, and that of the minima."""
    torch.set_num_threads(1)
    pipeline = rig.pipeline(torch.float32)
    seconds = {(key, patched): [] for key in ("stream", "path") for patched in (False, True)}
    for i in range(repeats + 1):
        for patched in (False, True):
            unpatch = integration.patch(pipeline.generator, rig.family) if patched else lambda: None
            found = _timed(rig, pipeline, frames, torch.float32)
            unpatch()
            if i:  # the first round warms up
                seconds["stream", patched].append(found[0])
                seconds["path", patched].append(found[1])
    return {
        f"{key}_{name}": of(seconds[key, False]) / of(seconds[key, True])
        for key in ("stream", "path")
        for name, of in (("median", statistics.median), ("min", min))
    }


def _rollout(rig: Rig, frames: int, patched: bool, chunk: int | None, midway: bool):
    """A training rollout of theirs: the video, and the gradients of all parameters and of the noise. The loss
    is on all frames, or on those of one chunk; `midway`: its backward runs when the next chunk has begun."""
    trainer = rig.trainer(frames)
    wrapper = trainer.generator
    if patched:
        integration.patch(wrapper, rig.family)
    noise = rig.noise(frames, torch.float64).requires_grad_()
    weights = rig.noise(frames, torch.float64, seed=3)
    own = slice(None) if chunk is None else slice(chunk * rig.chunk, (chunk + 1) * rig.chunk)
    waiting = []

    def generator(**given):
        out = wrapper(**given)
        at = given["current_start"] // (rig.frame_tokens * rig.chunk)
        if midway and at == chunk and out[1].requires_grad:
            waiting.append((out[1] * weights[:, own]).sum())
        if waiting and at > chunk:
            waiting.pop().backward()
        return out

    generator.model, trainer.generator = wrapper.model, generator
    text = rig.text(torch.float64)(["a prompt"])
    with same_noise(), contextlib.redirect_stdout(None):
        video = trainer.inference_with_trajectory(noise, **text)[0]
    if not midway:
        (video * weights)[:, own].sum().backward()
    grads = [noise.grad, *(p.grad for p in wrapper.parameters())]
    return video.detach(), torch.cat([g.flatten() for g in grads if g is not None])


def gradients(rig: Rig, frames: int = 15) -> dict:
    """Relative L2 of the gradients of their training rollout, patched from unpatched, in float64."""
    found = {}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    for name, chunk in (("all", None), ("one", 2)):
        video, wanted = _rollout(rig, frames, False, chunk, False)
        ours, grads = _rollout(rig, frames, True, chunk, chunk is not None)
        found[f"grad_{name}"] = distance(grads, wanted)
        assert distance(ours, video) < 1e-7, "the rollout is another one"
    return found


@contextlib.contextmanager
def checked_out(folder: Path, cls):
    """The checkout, at the system's ref."""
    if cls.ref is None:
        yield folder / cls.checkout
        return
    with tempfile.TemporaryDirectory() as out:
        archive = subprocess.Popen(
            ["git", "-C", folder / cls.checkout, "archive", cls.ref], stdout=subprocess.PIPE
        )
        subprocess.run(["tar", "x", "-C", out], stdin=archive.stdout, check=True)
        if archive.wait():
            raise SystemExit(f"{cls.checkout} has no {cls.ref}")
        yield Path(out)


def run(folder: Path, name: str, *, repeats: int = 0) -> dict:
    cls, settings = FAULTS[name] if name in FAULTS else (SYSTEMS[name], {})
    frames = cls.frames or (21 if cls.chunk == 3 else 24)
    commit = subprocess.run(
        ["git", "-C", folder / cls.checkout, "rev-parse", "--short", cls.ref or "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    with checked_out(folder, cls) as root:
        rig = cls(root, heads=2, head_dim=32, grid=(4, 6), **settings)
        found = {"system": cls.checkout, "ref": cls.ref or "", "commit": commit, "ran": cls.ran}
        found |= measure(rig, frames)
        if cls.training_class:
            found |= gradients(rig)
        if repeats:
            found |= times(cls(root, heads=6, head_dim=128, grid=(8, 13), **settings), frames, repeats)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--system", choices=[*SYSTEMS, *FAULTS], action="append")
    parser.add_argument("--repeats", type=int, default=0, help="streams to time; 0: none")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    names = arguments.system or [*SYSTEMS, *FAULTS]
    if arguments.json and len(names) == 1:
        print(json.dumps({"name": names[0]} | run(arguments.folder, names[0], repeats=arguments.repeats)))
        return
    print("| system | commit | ran | float64 | float32 | bf16: theirs, patched | stream | cache path |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        command = [sys.executable, "-m", "benchmarks.integrations", arguments.folder, "--json"]
        command += ["--system", name, "--repeats", str(arguments.repeats)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"| {name} | failed: {done.stderr.strip().splitlines()[-1]} |")
            continue
        r = json.loads(done.stdout.strip().splitlines()[-1])
        ratios = [f"{r[f'{key}_median']:.2f}x" if f"{key}_median" in r else "" for key in ("stream", "path")]
        row = [r["system"], f"{r['commit']} {r['ref']}".strip(), r["ran"], f"{r['float64']:.1e}"]
        row += [f"{r['float32']:.1e}", f"{r['bf16_own']:.2e}, {r['bf16_patched']:.2e}", *ratios]
        if "grad_all" in r:
            row[2] += f", training rollout (gradients {r['grad_all']:.1e}, {r['grad_one']:.1e})"
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
