"""Stage: variants of the Hopper attention kernel beside the kernel as it is installed.

``python -m benchmarks.gpu_suite.tuning FOLDER --device cuda --rows FILE``: the libraries of ``make tuning``
(benchmarks/tuning), one change each. All of them get the same memory; a variant whose output differs from
float64 is named and not timed.
"""

import ctypes
import sys
from pathlib import Path

import torch

from ..sink_window_attention import Shape
from .attention import job
from .jobs import Options, measured_roof, run_jobs


class Variant:
    """A library of benchmarks/tuning/variant.cu."""

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
        pointer, numbers = ctypes.c_void_p, ctypes.POINTER
        self._forward = library.rf_variant_forward
        self._forward.restype = ctypes.c_int
        self._forward.argtypes = [
            *(pointer,) * 5,
            numbers(ctypes.c_int64),
            numbers(ctypes.c_int32),
            ctypes.c_float,
            pointer,
            pointer,
        ]
        self._workspace_bytes = library.rf_variant_workspace_bytes
        self._workspace_bytes.restype, self._workspace_bytes.argtypes = ctypes.c_int64, [ctypes.c_int]

    def make(self, q, k, v, _split=0):
        """A call on these tensors: q ``[B, Nq, Hq, D]``, k and v ``[B, Nkv, Hkv, D]``, all rows valid."""
        sms = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
        workspace = torch.zeros(self._workspace_bytes(sms), dtype=torch.uint8, device=q.device)
        strides = [stride for t in (q, k, v) for stride in t.stride()[:3]]
        batch, tokens, heads, dim = q.shape
        strides = (ctypes.c_int64 * 12)(*strides, tokens * heads * dim, heads * dim, dim)
        sizes = (ctypes.c_int32 * 8)(
            batch, tokens, heads, k.shape[2], dim, k.shape[1], q.dtype == torch.float16, sms
        )

        def call():
            out = q.new_empty(q.shape)
            lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
            stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else None
            pointers = [t.data_ptr() for t in (q, k, v, out, lse)]
            error = self._forward(*pointers, strides, sizes, dim**-0.5, workspace.data_ptr(), stream)
            if error:
                raise RuntimeError(f"CUDA error {error}")
            return out

        return call


def loaded(folder: Path) -> dict:
    """name -> make(q, k, v, tokens of the sink) -> call, as in attention.py's PEERS."""
    return {path.stem: Variant(path).make for path in sorted(folder.glob("*.so"))}


def shapes(tiny: bool, quick: bool) -> list[Shape]:
    """The main loop alone first: exactly one query tile for each of 132 SMs, whole key tiles, nothing cut."""
    if tiny:
        return [Shape("tiny chunk", grid=(2, 3), heads=2, head_dim=64)]
    found = [
        Shape("1.3B chunk"),
        Shape("1.3B frame", frames=1),
        Shape("one tile an SM", grid=(11, 128), frames=1, sink_frames=0, window_frames=10),
    ]
    return (
        found
        if quick
        else [*found, Shape("1.3B chunk, 3 heads", heads=3), Shape("head dim 64, chunk", head_dim=64)]
    )


def main(arguments=None) -> None:
    folder, *rest = sys.argv[1:] if arguments is None else arguments
    options, makes = Options.parse(rest), loaded(Path(folder))
    if not makes:
        options.rows.add("note", text="no variants of the attention kernel are built (make tuning)")
        return
    found = [job(shape, peers=makes) for shape in shapes(options.tiny, options.quick)]
    run_jobs(found, options, measured_roof(options))


if __name__ == "__main__":
    main()
