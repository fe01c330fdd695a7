"""`reward-forcing stream`: stream the latents of a video from a checkpoint into a folder, as they are generated.

A wrong value is one line on stderr and exit code 2, before anything is generated. Ctrl-C ends a stream after the chunk under way and
exits with 130; the same command with `--resume` continues it, and its latents are those of a run that nobody stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

import rf_kernels as rf

from .config import StreamConfig
from .folder import StreamFolder
from .job import PreparedStream, StreamJob

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: The options whose names differ from the arguments that they set.
_OPTIONS = {
    "local_attn_size": "--window",
    "denoising_step_list": "--steps",
    "nominal": "--steps",
    "num_heads": "--heads",
}


class Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str):
        fail(message.removeprefix("argument "))


def fail(message: str, code: int = 2):
    """End with one line on stderr."""
    _say("error: " + " ".join(message.split()))
    sys.exit(code)


def _say(line: str) -> None:
    print(f"reward-forcing: {line}", file=sys.stderr)


def refused(error: rf.ArgumentError) -> str:
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
    """The options of a stream. ``defaults`` replace those of a published model; an option without one is required."""
    defaults = {"height": 60, "width": 104, "dtype": "bfloat16", "out": Path("out"), "heads": None, **defaults}
    if "device" not in defaults:
        defaults["device"] = "cuda" if torch.cuda.is_available() else "cpu"

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
    add("device", "cpu, cuda or cuda:N")
    add("chunk-frames", "frames generated together", at_least_1, 3)
    add("sink-frames", "frames of the sink (default: 3, or 0 with --sink-policy none)", at_least_0)
    add("window", "frames attended, the sink included", at_least_1, 9)
    add("sink-policy", "ema, static or none", _one_of(("ema", "static", "none")), "ema")
    add(
        "sink-state",
        "compensated, float32 or published",
        _one_of(("compensated", "float32", "published")),
        "compensated",
    )
    add("alpha", "decay of the sink's average", number, 0.999)
    add("steps", "nominal denoising steps", at_least_0, [1000, 750, 500, 250], nargs="+")
    add("shift", "timestep shift", number, 5.0)


def stream_job(options: argparse.Namespace) -> StreamJob:
    """The job that the options describe."""
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
    )
    names = ("checkpoint", "frames", "height", "width", "heads", "context", "seed", "device")
    return StreamJob(**{n: getattr(options, n) for n in names}, dtype=_DTYPES[options.dtype], stream=stream)


class Stop:
    """Ctrl-C, and signals that ask a process to end, are noted until the chunk under way is finished; a second one ends it at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __enter__(self) -> Stop:
        self.signal: int | None = None
        # One that the parent ignores (nohup, a job in the background) stays ignored.
        heard = [s for s in self.SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
        self._previous = {s: signal.signal(s, self._note) for s in heard}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        if sys.stderr.isatty():
            print("\nfinishing this chunk; again to stop at once", file=sys.stderr)


def _progress(frames: int, of: int, seconds: float) -> None:
    if sys.stderr.isatty():
        end = "\n" if frames == of else ""
        print(f"\r{frames} of {of} frames, {seconds:.2f} s a chunk", end=end, file=sys.stderr, flush=True)


def _stream(prepared: PreparedStream, cache: rf.SinkWindowCache, folder: StreamFolder, stop: Stop) -> None:
    """Generate what is missing, until a signal says otherwise."""
    begin = time.perf_counter()
    for chunk in prepared.chunks(cache):
        folder.append(chunk.latents[0])
        folder.save(cache, now=stop.signal is not None)
        _progress(folder.frames, prepared.job.frames, time.perf_counter() - begin)
        if stop.signal is not None:
            return
        begin = time.perf_counter()


def _write_facts(prepared: PreparedStream, settings: dict, path: Path) -> None:
    job = prepared.job
    files = {"checkpoint": str(job.checkpoint), "context": job.context and str(job.context)}
    versions = {"rf_kernels": rf.__version__, "torch": torch.__version__}
    facts = {"settings": settings, "files": files, "model": asdict(prepared.model.config), "versions": versions}
    path.write_text(json.dumps(facts, indent=2) + "\n")


def _run(options: argparse.Namespace, again: str) -> int:
    with ExitStack() as stack:
        try:
            use = {"resume": options.resume, "overwrite": options.overwrite, "save_seconds": options.save_seconds}
            folder = stack.enter_context(StreamFolder(options.out, **use))
            job = stream_job(options)
            prepared = job.prepare()
            settings = job.settings()
            folder.begin(settings, prepared.shape)
            cache = prepared.new_cache()
            if not folder.complete:
                folder.restore(cache)
        except rf.ArgumentError as error:
            fail(refused(error))
        stop = stack.enter_context(Stop())
        if not folder.complete:
            _stream(prepared, cache, folder, stop)
        if not folder.complete:
            _say(f"stopped after {folder.frames} of {job.frames} frames; {again}")
            return 128 + stop.signal
        _write_facts(prepared, settings, folder.part / "stream.json")
        for path in folder.finish(["stream.json"]):
            print(path)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="reward-forcing", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    stream = commands.add_parser("stream", help="stream latents from a checkpoint", allow_abbrev=False)
    add_stream_options(stream)
    text = "least time between two saves of the state that a resume needs (default: 60)"
    seconds = _value("a finite number of at least 0", float, lambda value: 0 <= value < math.inf)
    stream.add_argument("--save-seconds", type=seconds, default=60.0, help=text)
    either = stream.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="continue the unfinished stream in --out")
    either.add_argument("--overwrite", action="store_true", help="replace the stream that is in --out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns, or exits with, 0: finished, 1: failed on the way, 2: refused, 128 + n: stopped by signal n."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parse(argv)
    repeated = [word for word in argv if word not in ("--resume", "--overwrite")]
    again = f"go on with: reward-forcing {shlex.join(repeated)} --resume"
    try:
        return _run(options, again)
    except KeyboardInterrupt:
        _say(f"stopped; {again if StreamFolder(options.out).begun else 'nothing was written'}")
        return 128 + signal.SIGINT
    except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        fail(str(error), code=1)
    except RuntimeError as error:  # on the CPU PyTorch has no error of its own for it
        if "DefaultCPUAllocator" not in str(error):
            raise
        fail(str(error), code=1)


if __name__ == "__main__":
    sys.exit(main())
