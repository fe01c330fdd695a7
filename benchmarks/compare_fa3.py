"""``python -m benchmarks.compare_fa3 [CHECKOUT]``: the main loops of FlashAttention-3 and of this library's
Hopper kernel, side by side.

Compiles the hdim 64 and 128 forward of a checkout of FlashAttention (the folder that holds ``hopper/``; else
FLASH_ATTENTION_SOURCE; bf16, not causal, no clusters) with the nvcc that is on PATH and the CUTLASS headers
of this environment, disassembles both, and prints what their main loops are made of. No GPU. Without a
checkout it says so and ends well: nothing of FlashAttention is kept here. ``--listing`` prints the
instructions too.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from itertools import zip_longest
from pathlib import Path

from . import audit

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "compare_fa3"
HEAD_DIMS = (128, 64)
# As hopper/setup.py compiles; the extended shapes are 64 x 176 x 16 and its like.
FLAGS = (
    "-O3",
    "-std=c++17",
    "--use_fast_math",
    "--expt-relaxed-constexpr",
    "--expt-extended-lambda",
    "-DNDEBUG",
    "-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED",
    "-DCUTLASS_ENABLE_GDC_FOR_SM90",
    "-DCUTLASS_DEBUG_TRACE_LEVEL=0",
    "-gencode=arch=compute_90a,code=sm_90a",
)


def source(head_dim: int) -> str:
    """One kernel alone. Arch, both head dims, cluster; input and output; then causal, local, softcap, varlen,
    paged, append, qv, packed heads, split, column-major V."""
    types = "cutlass::bfloat16_t, cutlass::bfloat16_t"
    switches = ", ".join(["false"] * 10)
    return (
        f'#include "flash_fwd_launch_template.h"\ntemplate void run_flash_fwd<90, {head_dim}, {head_dim}, 1,'
        f" {types}, {switches}>(Flash_fwd_params&, cudaStream_t);\n"
    )


def checkout(argument: str | None) -> Path | None:
    """The folder with FlashAttention-3's headers, or None when none was named; ValueError for a folder that
    has none."""
    named = argument or os.environ.get("FLASH_ATTENTION_SOURCE")
    if not named:
        return None
    for folder in (Path(named), Path(named) / "hopper"):
        if (folder / "flash_fwd_launch_template.h").is_file():
            return folder
    raise ValueError(
        f"expected a checkout of FlashAttention with hopper/flash_fwd_launch_template.h, found {named}"
    )


def cutlass_include() -> Path:
    packaged = Path(sysconfig.get_paths()["purelib"]) / "cutlass_library" / "source" / "include"
    return Path(os.environ.get("RF_CUTLASS_INCLUDE") or packaged)


def compiled(folder: Path, head_dim: int, nvcc: str) -> Path:
    BUILD.mkdir(parents=True, exist_ok=True)
    unit, cubin = BUILD / f"fa3_hdim{head_dim}.cu", BUILD / f"fa3_hdim{head_dim}.cubin"
    unit.write_text(source(head_dim))
    print(f"compiling FlashAttention-3, head dim {head_dim} (a minute or two)", file=sys.stderr, flush=True)
    command = [nvcc, *FLAGS, f"-I{folder}", f"-isystem={cutlass_include()}", "-cubin", "-o", cubin, unit]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"FlashAttention-3, head dim {head_dim}, does not compile:\n{done.stderr[-3000:]}")
    return cubin


def column(kernel: audit.Kernel, tile_m: int) -> dict:
    """What a main loop is made of, by the names of the table's rows."""
    loop = audit.main_loop(kernel)
    figures = audit.loop_figures(loop)
    # The QK^T shape is the one whose B operand is not transposed: m64 n<keys of a tile> k16.
    tile_n = int(
        next(m[1] for _, t in loop if "tnspB" not in t and (m := re.match(r"HGMMA\.64x(\d+)x16", t)))
    )
    waits = audit.between_waits(loop)
    return {
        "query x key tile": f"{tile_m} x {tile_n}",
        "registers at launch": kernel.registers,
        "bytes of stack": kernel.stack,
        "instructions of the loop": figures.instructions,
        "executed per key tile": figures.executed,
        "executed per 100 keys": f"{100 * figures.executed / tile_n:.0f}",
        "exponentials between the two waits": f"{waits['MUFU.EX2']} of {tile_n // 2}",
        "from the wait for O to the next product": figures.after_wait,
        "from the wait for S to the release of K": figures.before_release,
        **{
            f"`{opcode}`": figures[opcode]
            for opcode in (
                "HGMMA",
                "MUFU",
                "FMNMX",
                "FFMA",
                "FADD",
                "FMUL",
                "F2FP",
                "SHFL",
                "R2UR",
                "UMOV",
                "UIADD3",
                "IMAD",
                "BSSY",
                "STSM",
            )
        },
    }


def kernels(library: Path, wanted: str) -> list[audit.Kernel]:
    return [
        k for k in audit.kernels(library, "sm_90a" if library.suffix == ".so" else None) if wanted in k.name
    ]


def table(columns: dict[str, dict]) -> str:
    rows = next(iter(columns.values()))
    lines = [f"| main loop | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    return "\n".join(
        lines + [f"| {row} | {' | '.join(str(c[row]) for c in columns.values())} |" for row in rows]
    )


def listing(left: audit.Kernel, right: audit.Kernel) -> str:
    texts = [[t for _, t in audit.main_loop(k)] for k in (left, right)]
    return "\n".join(
        f"{i:4d}  {a[:76]:76s}  {b}" for i, (a, b) in enumerate(zip_longest(*texts, fillvalue=""))
    )


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare_fa3", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "checkout", nargs="?", help="a checkout of FlashAttention (else FLASH_ATTENTION_SOURCE)"
    )
    parser.add_argument(
        "--library", type=Path, default=audit.LIBRARY, help="this library's kernels (rf_kernels/_C.abi3.so)"
    )
    parser.add_argument("--listing", action="store_true", help="the instructions of both loops too")
    options = parser.parse_args(arguments)
    try:
        folder = checkout(options.checkout)
        if folder is None:
            print(
                "compare_fa3: nothing to compare with. Name a checkout of FlashAttention (an argument, or"
                " FLASH_ATTENTION_SOURCE): git clone https://github.com/Dao-AILab/flash-attention"
            )
            return 0
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise FileNotFoundError("no nvcc on PATH")
        columns, pairs = {}, []
        for head_dim in HEAD_DIMS:
            (ours,) = [k for k in kernels(options.library, f"HeadDim{head_dim}") if "bf16" in k.title]
            (theirs,) = kernels(compiled(folder, head_dim, nvcc), "FlashAttnFwdSm90")
            columns[f"this library, D {head_dim}"] = column(ours, 128 if head_dim == 128 else 192)
            columns[f"FlashAttention-3, D {head_dim}"] = column(theirs, 128 if head_dim == 128 else 192)
            pairs.append((ours, theirs))
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        print(f"compare_fa3: {error}", file=sys.stderr)
        return 2
    version = re.search(
        r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    print(
        f"nvcc {version[1] if version else 'unknown'}; static counts of machine code, not"
        f" times\n\n{table(columns)}"
    )
    if options.listing:
        for head_dim, pair in zip(HEAD_DIMS, pairs, strict=True):
            print(f"\nhead dim {head_dim}: this library | FlashAttention-3\n{listing(*pair)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
