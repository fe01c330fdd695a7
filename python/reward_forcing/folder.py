"""Where a stream's latents go: written chunk by chunk beside what a resume needs, moved into place when they
are complete.

While a stream runs, everything lies in ``<out>/stream.part``: ``latents.safetensors`` (its header is written
first, each chunk is appended), ``cache.safetensors`` (the cache after one of the chunks), ``settings.json``,
and, for streams that carry frames beside the cache, ``carry-N.safetensors`` (N: the cache's next frame). A
process may be killed anywhere: the cache on disk is never ahead of the latents, and
``<out>`` holds the files of one finished stream, or of none.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import struct
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from rf_kernels import ArgumentError

from ._check import expect
from .checkpoint import CheckpointError, read_safetensors

_WHO = "StreamFolder"
_PART = "stream.part"
LATENTS = "latents.safetensors"

#: Every file that a finished stream, or a report on one, leaves in its folder. They describe each other: all
#: go together.
OUTPUTS = (LATENTS, "stream.json", "report.json", "report.html", "preview.gif", "preview.png")


class StreamFolder:
    """The folder of one stream, for one process at a time; a context manager.

    Args:
        out: made if it is missing.
        resume: continue the unfinished stream that the folder holds.
        overwrite: discard an unfinished stream at once, and replace the files of a finished one at the end.
        save_seconds: least time between two saves of the cache, which bounds what a kill can lose.
    Raises:
        rf_kernels.ArgumentError: the folder cannot be used so; nothing in it has changed.
    """

    def __init__(
        self, out: Path, *, resume: bool = False, overwrite: bool = False, save_seconds: float = 60.0
    ):
        self.out, self.part = Path(out), Path(out) / _PART
        self._resume, self._overwrite, self._save_seconds = resume, overwrite, save_seconds

    def __enter__(self) -> StreamFolder:
        try:
            self._made = not self.out.exists()
            self.part.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
        except OSError as error:
            expect(False, _WHO, "out", "a folder that can be written", f"{self.out}: {error.strerror}")
        try:
            self._check_use()
        except BaseException:
            self._leave()
            raise
        self._file = None
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()
        self._leave()

    def _leave(self) -> None:
        """Nothing stays of a stream that never began."""
        if not self.begun:
            shutil.rmtree(self.part, ignore_errors=True)
            if self._made and not any(self.out.iterdir()):
                self.out.rmdir()
        self._lock.close()

    def _locked(self):
        """The open lock file. A lock of a file that is no longer in its place protects nothing: the run that
        held it has finished."""
        while True:
            self.part.mkdir(exist_ok=True)
            file = (self.part / "lock").open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                found = f"one that writes into {self.part}"
                expect(False, _WHO, "out", "a folder that no other run writes into", found)
            try:
                if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                    return file
            except FileNotFoundError:
                pass
            file.close()

    @property
    def begun(self) -> bool:
        """Whether an unfinished stream is here. Its latents are made last, and leave first."""
        return (self.part / LATENTS).exists()

    def _check_use(self) -> None:
        if self._resume:
            where = f"an unfinished stream in {self.part}"
            expect(self.begun, _WHO, "resume", where, "none")
        elif not self._overwrite:
            expected = (
                "a folder without an unfinished stream (--resume continues it, --overwrite discards it)"
            )
            expect(not self.begun, _WHO, "out", expected, self.part)
            expected = "a folder without files of an earlier stream (--overwrite replaces them at the end)"
            for name in OUTPUTS:
                expect(not (self.out / name).exists(), _WHO, "out", expected, self.out / name)

    # ---- a stream ------------------------------------------------------------------------------------------
    def begin(self, settings: dict, shape: tuple[int, int, int, int]) -> None:
        """Open the latents ``[F, C, H, W]``, which are float32: new ones, or those of the stream that is
        resumed.

        Args:
            settings: all that the latents depend on. A resume needs the same.
        """
        self.shape = shape
        header = _header(shape)
        self._begin, self._frame_bytes = len(header), 4 * math.prod(shape[1:])
        total = self._begin + shape[0] * self._frame_bytes
        settings = json.loads(json.dumps(settings))
        if self._resume:
            self._check_settings(settings)
            self._file = (self.part / LATENTS).open("r+b", buffering=0)
            same = self._file.read(self._begin) == header
            expect(same, _WHO, "resume", f"latents {list(shape)} in {self.part}", "another header")
        else:
            if self.begun:
                (self.part / LATENTS).unlink()
            (self.part / "cache.safetensors").unlink(missing_ok=True)
            self._forget_carries()
            free = shutil.disk_usage(self.out).free
            expect(
                total <= free, _WHO, "frames", f"latents that fit the {free} bytes free in {self.out}", total
            )
            (self.part / "settings.json").write_text(json.dumps(settings))
            (self.part / "header").write_bytes(header)
            (self.part / "header").rename(self.part / LATENTS)
            self._file = (self.part / LATENTS).open("r+b", buffering=0)
            self._file.seek(0, os.SEEK_END)
        self._saved_at = time.monotonic()

    def _check_settings(self, settings: dict) -> None:
        path = self.part / "settings.json"
        try:
            begun = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            expect(False, _WHO, "resume", "a readable settings.json", f"{path}: {error}")
        begun = begun if isinstance(begun, dict) else {}
        for name, value in settings.items():
            expected = f"{begun.get(name)!r}, with which the stream in {self.part} was begun"
            expect(name in begun and begun[name] == value, _WHO, name, expected, repr(value))

    @property
    def frames(self) -> int:
        """Whole frames on disk."""
        return (self._file.seek(0, os.SEEK_END) - self._begin) // self._frame_bytes

    @property
    def complete(self) -> bool:
        return self.frames == self.shape[0]

    def restore(self, cache, pipeline) -> Tensor | None:
        """Put cache and latents where the last save was, the beginning if there was none; what the stream
        carries beside its cache."""
        path, carry = self.part / "cache.safetensors", None
        if path.exists():
            try:
                cache.load(path)
                carry = self._carry(cache) if pipeline.carries else None
            except (ArgumentError, CheckpointError) as error:
                expect(False, _WHO, "resume", f"the saved cache of this stream in {path}", error)
        frame = pipeline.next_frame(cache, carry)
        found = f"{self.frames} frames in {self.part / LATENTS}"
        expect(
            frame <= self.frames,
            _WHO,
            "resume",
            f"at least the {frame} frames that the cache has seen",
            found,
        )
        self._file.truncate(self._begin + frame * self._frame_bytes)
        self._file.seek(0, os.SEEK_END)
        return carry

    def _carry_path(self, cache) -> Path:
        return self.part / f"carry-{cache.next_frame}.safetensors"

    def _carry(self, cache) -> Tensor:
        path = self._carry_path(cache)
        carry = read_safetensors(path).get("carry")
        fits = carry is not None and carry.dim() == 5 and carry.shape[2:] == self.shape[1:]
        expect(fits, _WHO, "resume", f"frames [1, n, ...] of this stream named `carry` in {path}", "others")
        return carry.to(cache.spec.device)

    def _forget_carries(self, but: Path | None = None) -> None:
        for path in self.part.glob("carry-*"):
            if path != but:
                path.unlink()

    def append(self, latents: Tensor) -> None:
        """Write the next frames ``[F, C, H, W]``."""
        data = memoryview(np.ascontiguousarray(latents.float().cpu().numpy(), "<f4")).cast("B")
        while data:
            data = data[self._file.write(data) :]

    def save(self, cache, carry: Tensor | None = None, *, now: bool = False) -> None:
        """Save the cache for a resume, and what the stream carries beside it, if it is time."""
        if now or time.monotonic() - self._saved_at >= self._save_seconds:
            os.fsync(self._file.fileno())
            path = None if carry is None else self._carry_path(cache)
            if path is not None:  # before the cache, which tells which one is read
                save_file({"carry": carry.contiguous()}, path)
                _sync(path)
            fresh = self.part / "cache.fresh"
            cache.save(fresh)
            _sync(fresh)
            fresh.rename(self.part / "cache.safetensors")
            self._forget_carries(but=path)
            self._saved_at = time.monotonic()

    def finish(self, side_files: Iterable[str] = ()) -> list[Path]:
        """Move the finished stream into place: the latents, and files of these names that were written into
        ``part``."""
        os.fsync(self._file.fileno())
        for name in OUTPUTS:
            (self.out / name).unlink(missing_ok=True)
        names = [*side_files, LATENTS]  # the latents last: until then a resume can do this again
        for name in names:
            (self.part / name).rename(self.out / name)
        return [self.out / name for name in names[::-1]]


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _header(shape: tuple[int, ...]) -> bytes:
    """The beginning of a safetensors file with one float32 tensor named `latents`."""
    entry = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 4 * math.prod(shape)]}
    text = json.dumps({"latents": entry}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
