"""A job streamed into a folder, until its end or a signal."""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import rf_kernels as rf

from .folder import StreamFolder
from .job import PreparedStream, StreamJob


class Stopped(Exception):
    """A signal ended a stream between two chunks; it can be resumed."""

    def __init__(self, number: int, frames: int):
        super().__init__(number, frames)
        self.signal, self.frames = number, frames


class Stop:
    """Ctrl-C, and signals that ask a process to end, are noted until the chunk under way is finished; a
    second one ends it at once."""

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


def begin(job: StreamJob, folder: StreamFolder) -> tuple[PreparedStream, rf.SinkWindowCache, Tensor | None]:
    """Check a job and its folder, and bring both to where the stream goes on: the job with its model, the
    cache, and what the stream carries beside it.

    Raises:
        rf_kernels.ArgumentError: what cannot be; nothing was generated.
    """
    prepared = job.prepare()
    folder.begin(job.settings(), prepared.shape)
    cache = prepared.new_cache()
    carry = None if folder.complete else folder.restore(cache, prepared.pipeline)
    return prepared, cache, carry


def generate(
    prepared: PreparedStream, cache: rf.SinkWindowCache, carry: Tensor | None, folder: StreamFolder
) -> list[Path]:
    """Generate what is missing; the finished files.

    Raises:
        Stopped: a signal came.
    """
    with Stop() as stop:
        begin = time.perf_counter()
        for chunk in () if folder.complete else prepared.chunks(cache, carry):
            folder.append(chunk.latents[0])
            folder.save(cache, chunk.carry, now=stop.signal is not None)
            _progress(folder.frames, prepared.job.frames, time.perf_counter() - begin)
            if stop.signal is not None and not folder.complete:
                raise Stopped(stop.signal, folder.frames)
            begin = time.perf_counter()
        _write_facts(prepared, folder.part / "stream.json")
        return folder.finish(["stream.json"])


def _progress(frames: int, of: int, seconds: float) -> None:
    if sys.stderr.isatty():
        end = "\n" if frames == of else ""
        print(f"\r{frames} of {of} frames, {seconds:.2f} s a chunk", end=end, file=sys.stderr, flush=True)


def _write_facts(prepared: PreparedStream, path: Path) -> None:
    job = prepared.job
    files = {"checkpoint": str(job.checkpoint), "context": job.context and str(job.context)}
    versions = {"rf_kernels": rf.__version__, "torch": torch.__version__}
    facts = {
        "settings": job.settings(),
        "files": files,
        "model": asdict(prepared.model.config),
        "versions": versions,
    }
    path.write_text(json.dumps(facts, indent=2) + "\n")
