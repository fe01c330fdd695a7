"""Training checkpoints: sharded, written under another name, and renamed when every rank has written its
part.

A folder ``step-00000120`` is therefore whole or absent, whatever killed the run. Reading one goes through
``torch.distributed.checkpoint``, whose index file is a pickle: resume from your own runs alone. Weights to
hand to others are the safetensors files that a run writes beside them.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from .._check import expect
from .distributed import agreed, rank

_NAME = re.compile(r"step-(\d{8})")


def folder(out: Path, step: int) -> Path:
    return out / f"step-{step:08d}"


def newest(out: Path) -> Path | None:
    """The whole checkpoint with the most steps, or None."""
    whole = [path for path in out.glob("step-*") if _NAME.fullmatch(path.name)] if out.is_dir() else []
    return max(whole, default=None)


def save(state: dict, out: Path, step: int, *, keep: int = 2) -> Path:
    """Write the state of all ranks as ``step-...``, then drop all but the newest ``keep``.

    Raises:
        OSError: a rank could not write (a full disk, say). The older checkpoints are as they were.
    """
    target, unfinished = folder(out, step), out / f"unfinished-{step:08d}"
    if rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed while it wrote
        out.mkdir(parents=True, exist_ok=True)
    if dist.is_initialized():
        dist.barrier()
    try:
        dcp.save(state, checkpoint_id=unfinished, no_dist=not dist.is_initialized())
        error = None
    except (
        Exception
    ) as caught:  # any failure of any rank must reach the verdict, or the others would wait for ever
        error = caught
    if not agreed(error is None, "cpu"):
        if rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        reason = f": {error}" if error is not None else " (another rank failed)"
        raise OSError(f"checkpoint {target.name} was not written{reason}") from error
    if rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
        for old in sorted(path for path in out.glob("step-*") if _NAME.fullmatch(path.name))[:-keep]:
            shutil.rmtree(old)
    if dist.is_initialized():
        dist.barrier()
    return target


def load(state: dict, path: Path) -> None:
    """Fill ``state``, in place, from a checkpoint of the same run.

    Raises:
        rf_kernels.ArgumentError: another architecture's checkpoint, or a damaged one.
    """
    try:
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        expect(
            False, "checkpoint.load", "path", "a whole checkpoint of this configuration", f"{path}: {first}"
        )
