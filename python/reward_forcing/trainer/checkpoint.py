"""Training checkpoints: sharded, written under another name, and renamed when every rank has written its
part.

A folder ``step-00000120`` is therefore whole or absent, whatever killed the run. It holds the size and CRC-32
of each of its files, which are compared before anything is read. Reading goes through
``torch.distributed.checkpoint``, whose index file is a pickle: resume from your own runs alone. Weights to
hand to others are the safetensors files that a run writes beside them.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
import zlib
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from .._check import expect
from .distributed import rank, together, world_size

#: A checkpoint, or one that the checkpoint of the same step was just about to replace.
_NAME = re.compile(r"step-(\d{8})(-replaced)?")


def folder(out: Path, step: int) -> Path:
    return out / f"step-{step:08d}"


def newest(out: Path) -> Path | None:
    """The whole checkpoint with the most steps, or None."""
    return max(_whole(out), key=lambda path: (path.name[:13], len(path.name) == 13), default=None)


def _whole(out: Path) -> list[Path]:
    return [path for path in out.glob("step-*") if _NAME.fullmatch(path.name)] if out.is_dir() else []


def save(state: dict, out: Path, step: int, *, keep: int = 2) -> Path:
    """Write the state of all ranks as ``step-...``, then drop all but the newest ``keep``.

    Raises:
        OSError: a rank could not write (a full disk, say). The older checkpoints are as they were.
    """
    target, unfinished = folder(out, step), out / f"unfinished-{step:08d}"

    def prepare():
        if rank() == 0:
            for left in out.glob("unfinished-*"):  # by a run that was killed while it wrote
                shutil.rmtree(left)
            out.mkdir(parents=True, exist_ok=True)

    def write():
        with _quiet():
            dcp.save(state, checkpoint_id=unfinished, no_dist=not dist.is_initialized())

    def sums():  # when all have written
        mine = sorted(path for path in unfinished.iterdir() if path.name != "sums")[rank() :: world_size()]
        lines = [json.dumps([path.name, *_sum(path)]) for path in mine]
        (unfinished / f"sums-{rank()}.json").write_text("\n".join(lines) + "\n")

    def publish():
        if rank() == 0:
            _publish(unfinished, target, keep)

    for action in (prepare, write, sums, publish):
        error = together(action)
        if error is not None:
            if rank() == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(f"checkpoint {target.name} was not written: {_reason(error)}") from error
    return target


def _publish(unfinished: Path, target: Path, keep: int) -> None:
    """At every moment there is a whole checkpoint of the newest step."""
    if target.exists():
        aside = target.with_name(f"{target.name}-replaced")
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    unfinished.rename(target)
    kept = sorted(path for path in _whole(target.parent) if len(path.name) == 13)[-keep:]
    for old in _whole(target.parent):
        if old not in kept:  # renamed first: killed half-way, it must not pass for a checkpoint
            shutil.rmtree(old.rename(old.with_name(f"unfinished-{old.name}")))


@contextmanager
def _quiet():
    """Without the library's warning that one process alone is saving."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _reason(error: BaseException) -> str:
    """One line that says what went wrong, out of what the checkpoint library wraps it in."""
    failures = getattr(error, "failures", None)
    while failures:  # torch.distributed.checkpoint: {rank: (exception, traceback)}
        error = next(iter(failures.values()))[0]
        failures = getattr(error, "failures", None)
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _sum(path: Path) -> tuple[int, int]:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return path.stat().st_size, crc


def load(state: dict, path: Path) -> None:
    """Fill ``state``, in place, from a checkpoint of the same run.

    Raises:
        rf_kernels.ArgumentError: another architecture's checkpoint (the first mismatching names are listed),
            or a damaged one. Nothing was filled.
    """

    def intact():
        for name, size, crc in sorted(_recorded(path))[rank() :: world_size()]:
            if not (path / name).is_file() or _sum(path / name) != (size, crc):
                raise ValueError(f"its file {name} is missing or damaged")

    def fits():
        if faults := _mismatches(state, path):
            raise ValueError("; ".join(faults))

    def read():
        with _quiet():
            dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())

    whole = f"a whole checkpoint (remove {path.name} to go on from an older one)"
    same = "a checkpoint of this configuration (another one needs another output folder)"
    for action, expected in ((intact, whole), (fits, same), (read, whole)):
        error = together(action)
        expect(error is None, "checkpoint.load", "path", expected, f"{path}: {error and _reason(error)}")


def _recorded(path: Path) -> Iterable[tuple[str, int, int]]:
    lists = sorted(path.glob("sums-*.json"))
    if not lists:
        raise ValueError("it has no list of its files")
    for file in lists:
        for line in file.read_text().splitlines():
            name, size, crc = json.loads(line)
            yield name, size, crc


def _mismatches(state: dict, path: Path) -> list[str]:
    """What differs in names and shapes between a state and a checkpoint, in words."""
    wanted = {name: tuple(t.shape) for name, t in _tensors(state, "")}
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    found = {name: tuple(m.size) for name, m in saved.items() if hasattr(m, "size")}
    shared = sorted(wanted.keys() & found.keys())
    differences = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "shape": [f"{n} {found[n]}, expected {wanted[n]}" for n in shared if found[n] != wanted[n]],
    }
    return [f"{kind}: {_some(names)}" for kind, names in differences.items() if names]


def _some(names: list[str], limit: int = 4) -> str:
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _tensors(values: object, prefix: str) -> Iterable[tuple[str, Tensor]]:
    """Tensors of nested mappings under the dotted names that the checkpoint library gives them."""
    if isinstance(values, Tensor):
        yield prefix, values
    elif isinstance(values, dict):
        for key, value in values.items():
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key))
