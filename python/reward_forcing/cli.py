"""`reward-forcing stream`: stream the latents of a video from a checkpoint into a folder, as they are
generated.

A wrong value is one line on stderr and exit code 2, before anything is generated. Ctrl-C ends a stream after
the chunk under way and exits with 130; the same command with `--resume` continues it, and its latents are
those of a run that nobody stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # PyTorch takes seconds to import: options are refused, and Ctrl-C is heard, before
    from .job import StreamJob

_DTYPES = ("float64", "float32", "bfloat16", "float16")

#: Help of an option that two commands have.
SET = "lay a value over the file's, as in --set distill.beta=4; once or more"

#: The options whose names differ from the arguments that they set.
_OPTIONS = {
    "local_attn_size": "--window",
    "denoising_step_list": "--steps",
    "nominal": "--steps",
    "num_heads": "--heads",
    "sink_policy": "--policy",
}


class Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str):
        fail(message.removeprefix("argument "))


def fail(message: str, code: int = 2):
    """End with one line on stderr."""
    say("error: " + " ".join(message.split()))
    sys.exit(code)


def say(line: str) -> None:
    print(f"reward-forcing: {line}", file=sys.stderr)


def refused(error: ValueError) -> str:
    """The text of a refused argument, in the names of the options."""
    match = re.match(r"[\w.]+: argument `([\w, ]+)`: ", str(error))
    if match is None:
        return str(error)
    names = match[1].split(", ")
    options = ", ".join(_OPTIONS.get(name, "--" + name.replace("_", "-")) for name in names)
    return f"{options}: {str(error)[match.end() :]}"


def _value(expected: str, read: Callable, fits: Callable = lambda value: True):
    """The type of an option: ``read`` from its text, refused unless it ``fits``."""

    def parse(text: str):
        try:
            value = read(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
        return value

    return parse


def _whole(least: int | None = None):
    if least is None:
        return _value("a whole number", int)
    return _value(f"a whole number of at least {least}", int, lambda n: n >= least)


def _one_of(names):
    return _value(f"one of {', '.join(names)}", str, lambda text: text in names)


def add_stream_options(parser: argparse.ArgumentParser, **defaults) -> None:
    """The options of a stream. ``defaults`` replace those of a published model; an option without one is
    required."""
    defaults = {
        "height": 60,
        "width": 104,
        "dtype": "bfloat16",
        "out": Path("out"),
        "heads": None,
        **defaults,
    }

    def add(name, text, type=str, default=None, **more):
        default = defaults.get(name.replace("-", "_"), default)
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{name}", help=text + shown, type=type, default=default, **more)

    at_least_0, at_least_1 = _whole(0), _whole(1)
    number = _value("a finite number", float, math.isfinite)
    add("checkpoint", ".safetensors or .pt", Path, required="checkpoint" not in defaults)
    add("frames", "latent frames", at_least_1, required="frames" not in defaults)
    add("height", "latent rows", at_least_1)
    add("width", "latent columns", at_least_1)
    add("heads", "attention heads, where the tensors do not tell", at_least_1)
    add("context", "safetensors file with text features named `context`; random features without it", Path)
    add("out", "folder of the latents", Path)
    add("seed", "of the noise", _whole(), 0)
    add("dtype", ", ".join(_DTYPES), _one_of(_DTYPES))
    add("device", "cpu, cuda or cuda:N; cuda where there is a GPU if none is named")
    add("chunk-frames", "frames generated together", at_least_1, 3)
    add("sink-frames", "frames of the sink (default: 3, or 0 with --policy none)", at_least_0)
    add("window", "frames attended, the sink included", at_least_1, 9)
    text = "of the sink: NAME or NAME:ARGUMENT=VALUE,... (docs/policies.md)"
    parser.add_argument(
        *("--policy", "--sink-policy"), dest="sink_policy", default="ema", help=f"{text} (default: ema)"
    )
    add(
        "sink-state",
        "compensated, float32 or published",
        _one_of(("compensated", "float32", "published")),
        "compensated",
    )
    add("alpha", "decay of the sink's average", number, 0.999)
    add("steps", "nominal denoising steps", at_least_0, [1000, 750, 500, 250], nargs="+")
    add("shift", "timestep shift", number, 5.0)
    add("cuts", "frames at which a shot begins, for policies that know of shots", at_least_0, [], nargs="+")
    text = "leave the keys and values of the last denoising step, without a forward on the finished chunk"
    parser.add_argument("--noisy-context", action="store_true", help=text)
    add_ways(parser)


def add_ways(parser: argparse.ArgumentParser) -> None:
    """The options of ways of streaming (docs/stream.md)."""
    text = "denoise as many chunks together as there are steps, each a step behind the one before it"
    parser.add_argument("--rolling", action="store_true", help=text)
    text, sizes = "start over after so many frames, with the last OVERLAP of them", ("FRAMES", "OVERLAP")
    parser.add_argument("--restart", type=_whole(1), nargs=2, default=[], metavar=sizes, help=text)


def stream_job(options: argparse.Namespace) -> StreamJob:
    """The job that the options describe."""
    import torch

    from .config import StreamConfig
    from .job import StreamJob

    sink_frames = options.sink_frames
    if sink_frames is None:
        sink_frames = 0 if options.sink_policy == "none" else 3
    stream = StreamConfig(
        chunk_frames=options.chunk_frames,
        sink_frames=sink_frames,
        local_attn_size=options.window,
        alpha=options.alpha,
        sink_policy=options.sink_policy,
        sink_state=options.sink_state,
        denoising_step_list=tuple(options.steps),
        shift=options.shift,
        clean_forward=not options.noisy_context,
        cuts=tuple(options.cuts),
        rolling=options.rolling,
        restart=tuple(options.restart),
    )
    names = ("checkpoint", "frames", "height", "width", "heads", "context", "seed")
    values = {name: getattr(options, name) for name in names}
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return StreamJob(**values, device=device, dtype=getattr(torch, options.dtype), stream=stream)


def _stream(options: argparse.Namespace, again: str) -> int:
    import torch

    import rf_kernels as rf

    from .folder import StreamFolder
    from .run import Stopped, begin, generate

    use = {"resume": options.resume, "overwrite": options.overwrite, "save_seconds": options.save_seconds}
    with ExitStack() as stack:
        try:
            try:
                folder = stack.enter_context(StreamFolder(options.out, **use))
                begun = begin(stream_job(options), folder)
            except rf.ArgumentError as error:
                fail(refused(error))
            for path in generate(*begun, folder):
                print(path)
        except Stopped as stopped:
            say(f"stopped after {stopped.frames} of {options.frames} frames; {again}")
            return 128 + stopped.signal
        except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
            fail(str(error), code=1)
        except RuntimeError as error:  # on the CPU PyTorch has no error of its own for memory that runs out
            if "DefaultCPUAllocator" not in str(error):
                raise
            fail(str(error), code=1)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="reward-forcing", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    stream = commands.add_parser("stream", help="stream latents from a checkpoint", allow_abbrev=False)
    add_stream_options(stream)
    text = "least time between two saves of the state that a resume needs (default: 60)"
    number = _value("a finite number", float, math.isfinite)
    seconds = _value("a finite number of at least 0", float, lambda value: 0 <= value < math.inf)
    stream.add_argument("--save-seconds", type=seconds, default=60.0, help=text)
    either = stream.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="continue the unfinished stream in --out")
    either.add_argument("--overwrite", action="store_true", help="replace the stream that is in --out")
    train = commands.add_parser("train", help="train one stage (docs/training.md)", allow_abbrev=False)
    train.add_argument("--config", type=Path, help="YAML file of the run")
    train.add_argument("--out", type=Path, help="folder of the run; an interrupted one goes on there")
    text = "print what the run takes on each rank, and allocate nothing; the published run without --config"
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=SET)
    train.add_argument("--plan", action="store_true", help=text)
    at_least_1 = _whole(1)
    train.add_argument("--ranks", type=at_least_1, nargs="+", default=[8, 64], help="of --plan (8 64)")
    size = {"type": at_least_1, "nargs": 2, "default": [60, 104], "metavar": ("HEIGHT", "WIDTH")}
    train.add_argument("--latent", **size, help="rows and columns of a latent, of --plan (60 104)")
    train.add_argument("--json", type=Path, help="write the plan to this file too")
    video = commands.add_parser("generate", help="a video from a prompt", allow_abbrev=False)
    add_stream_options(video, frames=21, out=Path("video.mp4"))
    video.add_argument("--prompt", required=True, help="what the video shows")
    text = "folder (or name on the hub) with tokenizer/, text_encoder/ and vae/ as diffusers keeps them"
    video.add_argument(
        "--wan", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help=f"{text} (default: %(default)s)"
    )
    rate = _value("a finite number above 0", float, lambda value: 0 < value < math.inf)
    video.add_argument("--fps", type=rate, default=16.0, help="frames per second of the file (default: 16)")
    judge = commands.add_parser(
        "evaluate", help="students of the embedded world: measures and intervals", allow_abbrev=False
    )
    judge.add_argument("--out", type=Path, required=True, help="JSON file of all figures")
    judge.add_argument(
        "--student",
        type=_value("NAME=PATH", str, lambda text: all(text.partition("="))),
        action="append",
        help="a checkpoint under a name, once or more; the first is the base of differences (default: the"
        " trained ones of the repository)",
    )
    judge.add_argument("--teacher", type=Path, help="checkpoint (default: that of the repository)")
    judge.add_argument("--guidance", type=number, default=1.0, help="of the teacher's clips (default: 1)")
    policies = ["none", "static", "ema:0.99", "ema:0.9"]
    text = f"policies as for `stream --policy`; NAME@S has S sink frames (default: {' '.join(policies)})"
    judge.add_argument("--sinks", dest="policies", nargs="+", default=policies, help=text)
    judge.add_argument("--window", type=_whole(1), help="frames attended (default: as trained)")
    add_ways(judge)
    for name, default in (("prompts", 64), ("seeds", 3), ("frames", 60)):
        judge.add_argument(f"--{name}", type=_whole(1), default=default, help=f"(default: {default})")
    options = parser.parse_args(argv)
    if options.command == "train" and not options.plan:
        missing = [f"--{name}" for name in ("config", "out") if getattr(options, name) is None]
        if missing:
            train.error(f"the following arguments are required: {', '.join(missing)}")
    return options


def _plan(options: argparse.Namespace) -> int:
    import json

    import rf_kernels as rf

    from .trainer import load
    from .trainer.plan import plan, table, wan

    try:
        config = wan() if options.config is None else load(options.config, options.set)
        height, width = options.latent
        plans = [plan(config, ranks, height=height, width=width) for ranks in options.ranks]
    except (rf.ArgumentError, FileNotFoundError) as error:
        fail(str(error))
    print(table(plans))
    if options.json is not None:
        options.json.write_text(json.dumps(plans, indent=2) + "\n")
    return 0


def video(options: argparse.Namespace) -> int:
    """A video from a prompt."""
    import torch

    import rf_kernels as rf

    from .generate import generate

    if options.context is not None:
        fail("--context: not beside --prompt")
    try:
        frames = generate(stream_job(options), options.prompt, options.wan, options.out, fps=options.fps)
    except rf.ArgumentError as error:
        fail(refused(error))
    except KeyboardInterrupt:
        say("stopped; nothing was written")
        return 128 + signal.SIGINT
    except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        fail(str(error), code=1)
    print(options.out)
    say(f"{frames} frames")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    import rf_kernels as rf

    from . import evaluate
    from .checkpoint import CheckpointError

    try:
        if options.student is None:
            students = {stage: evaluate.shipped(stage)[0] for stage in ("causal", "ode", "distill")}
        else:
            students = dict(text.split("=", 1) for text in options.student)
        names = ("policies", "prompts", "seeds", "frames", "teacher", "guidance")
        chosen = {name: getattr(options, name) for name in names}
        stream = {"rolling": options.rolling, "restart": tuple(options.restart)}
        if options.window is not None:
            stream["local_attn_size"] = options.window
        report = evaluate.evaluate(students, **chosen, stream=stream, progress=say)
        evaluate.write(report, options.out)
    except (rf.ArgumentError, CheckpointError, FileNotFoundError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    print(evaluate.as_text(report))
    print(options.out)
    return 0


def train(config: Path, out: Path, changes: Sequence[str] = ()) -> int:
    """Train a stage, in one process or as one rank of a ``torchrun`` launch; every error is one line."""
    import torch

    import rf_kernels as rf

    from .checkpoint import CheckpointError
    from .trainer import load, run
    from .trainer.checkpoint import newest
    from .trainer.distributed import lost_a_rank

    rank = os.environ.get("RANK")
    who = "" if rank is None else f"rank {rank}: "
    try:
        weights = run(load(config, changes), out)
        if rank in (None, "0"):
            print(weights)
    except (rf.ArgumentError, CheckpointError, FileNotFoundError) as error:
        fail(who + str(error))
    except KeyboardInterrupt:
        say(f"{who}stopped; the same command goes on from the newest checkpoint")
        return 128 + signal.SIGINT
    except (ArithmeticError, OSError, torch.OutOfMemoryError) as error:
        fail(who + str(error), code=1)
    except RuntimeError as error:
        if not lost_a_rank(error):
            raise
        path = newest(out)
        last = f"the same command goes on from {path}" if path else "no checkpoint was written yet"
        fail(f"{who}another rank is gone; {last}", code=1)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns, or exits with, 0: finished, 1: failed on the way, 2: refused, 128 + n:
    stopped by signal n."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parse(argv)
    if options.command == "train":
        return _plan(options) if options.plan else train(options.config, options.out, options.set)
    if options.command == "generate":
        return video(options)
    if options.command == "evaluate":
        return _evaluate(options)
    repeated = [word for word in argv if word not in ("--resume", "--overwrite")]
    again = f"go on with: reward-forcing {shlex.join(repeated)} --resume"
    try:
        return _stream(options, again)
    except KeyboardInterrupt:
        unfinished = options.out / "stream.part" / "latents.safetensors"
        say(f"stopped; {again if unfinished.exists() else 'nothing was written'}")
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
