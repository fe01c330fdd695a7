"""``python -m benchmarks.audit``: what the compiler made of the CUDA kernels in the built library, held
against what was intended.

Disassembles ``rf_kernels/_C.abi3.so`` (no GPU, no CUDA toolkit: the disassembler of Triton's package, a test
dependency) and checks every kernel: no spills and no local memory anywhere; 128-bit global accesses in the
memory-bound ops; for the Hopper attention kernels also the shapes of their matrix instructions, bulk tensor
loads, register hand-over, registers at launch, and that softmax really overlaps the matrix product: the
exponentials of a key tile stand between the two waits of the main loop (a source that says so is not enough:
ptxas moves waits). The main loop's instructions are counted: all of them, those of a tile in which no row
rescales, those between the wait for O and the next product, those before K is handed back. Of the merge of
split tiles the loads in flight are counted; of the memory-bound ops the instructions for 16 bytes and the
loads in flight (issue_model.py). Exits 1 when something is not as intended, 2 when it cannot look.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from . import issue_model

LIBRARY = Path(__file__).resolve().parents[1] / "rf_kernels" / "_C.abi3.so"

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")


@dataclass
class Kernel:
    """One function of one architecture: its resources as the cubin states them, its instructions as (address,
    text)."""

    name: str
    arch: str
    instructions: list = field(default_factory=list)
    predicated: set = field(default_factory=set)  # addresses of instructions under a predicate
    registers: int = 0
    stack: int = 0
    local: int = 0

    @property
    def title(self):
        """The name without its arguments."""
        name = re.sub(
            r"\((?:anonymous namespace|.*)\)$", "", self.name.replace("(anonymous namespace)::", "")
        )
        return re.sub(r"^void ", "", name)

    def count(self, *prefixes):
        return sum(any(text.startswith(p) for p in prefixes) for _, text in self.instructions)


def tools() -> Path:
    """The folder of cuobjdump and nvdisasm: ``RF_CUDA_TOOLS``, Triton's package, or the CUDA toolkit on
    PATH."""
    candidates = [os.environ.get("RF_CUDA_TOOLS")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        candidates.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    on_path = shutil.which("cuobjdump")
    candidates.append(on_path and Path(on_path).parent)
    for folder in filter(None, candidates):
        if all((Path(folder) / tool).exists() for tool in ("cuobjdump", "nvdisasm")):
            return Path(folder)
    raise FileNotFoundError(
        "no cuobjdump with nvdisasm: pip install triton, or set RF_CUDA_TOOLS to a CUDA toolkit's bin folder"
    )


def _dump(*arguments) -> str:
    folder = tools()
    environment = dict(os.environ, PATH=f"{folder}{os.pathsep}{os.environ.get('PATH', '')}")
    done = subprocess.run([folder / "cuobjdump", *arguments], capture_output=True, text=True, env=environment)
    if done.returncode != 0 and "does not contain device code" not in done.stderr:
        raise RuntimeError(f"cuobjdump failed: {done.stderr.strip()[:500]}")
    return done.stdout


def _demangle(names):
    """With c++filt where there is one; else the mangled names."""
    if not names or shutil.which("c++filt") is None:
        return {n: n for n in names}
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def kernels(library: Path = LIBRARY, arch: str | None = None) -> list[Kernel]:
    """The kernels of a library, of one architecture ("sm_90a") or of every one it holds machine code for."""
    only = ("-arch", arch) if arch else ()
    found, kernel, arch = {}, None, ""
    for line in _dump(*only, "-sass", library).splitlines():
        # Not "code for": there CUDA 12's cuobjdump says sm_90 of sm_90a.
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            kernel = found.setdefault((arch, match[1]), Kernel(match[1], arch))
        elif kernel is not None and (match := _INSTRUCTION.match(line)):
            address, text = int(match[1], 16), match[2].strip()
            kernel.instructions.append((address, _PREDICATE.sub("", text)))
            if _PREDICATE.match(text):
                kernel.predicated.add(address)
    arch = ""
    name = None
    for line in _dump(*only, "-res-usage", library).splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        if match := re.search(r"Function (\S+):", line):
            name = match[1]
        if match := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            kernel = found.get((arch, name))
            if kernel is not None:
                kernel.registers, kernel.stack, kernel.local = map(int, match.groups())
    readable = _demangle(sorted({k.name for k in found.values()}))
    for k in found.values():
        k.name = readable[k.name]
    return [k for k in found.values() if k.instructions]


def main_loop(kernel: Kernel):
    """The smallest loop that holds matrix products with both operand forms (V transposed, and not): QK^T and
    PV."""
    best = []
    for address, text in kernel.instructions:
        match = re.search(r"^BRA\b.*?(0x[0-9a-f]+)", text)
        if not match or int(match[1], 16) >= address:
            continue
        body = [(a, t) for a, t in kernel.instructions if int(match[1], 16) <= a <= address]
        products = [t for _, t in body if t.startswith("HGMMA")]
        both = any("tnspB" in t for t in products) and any("tnspB" not in t for t in products)
        if both and (not best or len(body) < len(best)):
            best = body
    return best


def between_waits(loop) -> Counter:
    """Instructions after the wait for S (one group still in flight) and before the wait for O (none)."""
    inside, counted = False, Counter()
    for _, text in loop:
        if text.startswith("WARPGROUP.DEPBAR"):
            inside = text.rstrip().endswith("0x1")
        elif inside:
            counted[text.split()[0]] += 1
    return counted


@dataclass
class LoopFigures:
    """A main loop in numbers. `executed`: the instructions of a turn in which every forward branch inside the
    loop skips what it can skip: no row rescales, no query tile ends, no barrier makes the warp spin (that
    code lies outside)."""

    instructions: int
    executed: int
    after_wait: int  # executed between the wait for O and the next matrix product
    before_release: int  # between the wait for S and the arrival that hands K back
    counts: Counter  # by opcode, of all instructions

    def __getitem__(self, opcode):
        return self.counts[opcode]


def _executed(loop):
    """The loop's (address, text) without what forward branches inside it skip."""
    end, skip_to, kept = loop[-1][0], 0, []
    for address, text in loop:
        if address < skip_to:
            continue
        kept.append((address, text))
        match = re.search(r"^BRA\b.*?(0x[0-9a-f]+)", text)
        if match and address < int(match[1], 16) <= end:
            skip_to = int(match[1], 16)
    return kept


def loop_figures(loop) -> LoopFigures:
    kept = [text for _, text in _executed(loop)]
    waits = [i for i, text in enumerate(kept) if text.startswith("WARPGROUP.DEPBAR")]
    product = next(i for i, text in enumerate(kept) if text.startswith("HGMMA"))
    releases = [
        i for i, text in enumerate(kept) if text.startswith("SYNCS.ARRIVE") and waits and i > waits[0]
    ]
    return LoopFigures(
        instructions=len(loop),
        executed=len(kept),
        after_wait=len(kept) - 1 - waits[-1] + product if waits else len(kept),
        before_release=releases[0] - waits[0] - 1 if releases else len(kept),
        counts=Counter(re.split(r"[.\s]", text)[0] for _, text in loop),
    )


# Per instantiation of the attention kernel: registers at launch, matrix shapes (QK^T, PV), exponentials of a
# tile per thread. 64 rows x tile_n scores over 128 threads are tile_n / 2 exponentials; 2 more rescale the
# two rows. Of the loop at most: executed instructions, those between the wait for O and the next product,
# those before K is handed back. 16-byte loads of the merge of two parts of a tile that are under way at once.
_ATTENTION = {
    128: {
        "registers": 168,
        "products": ("64x176x16", "64x128x16"),
        "exponentials": 176 // 2,
        "loop": (560, 120, 40),
        "merge": 17,
    },
    64: {
        "registers": 128,
        "products": ("64x128x16", "64x64x16"),
        "exponentials": 128 // 2,
        "loop": (430, 100, 40),
        "merge": 9,
    },
}
_ATTENTION_VARIANTS = 8  # bf16 and fp16, head dims 64 and 128, one end for all rows or rows of their own


def check_attention(kernel: Kernel) -> list[str]:
    """What is not as intended in a Hopper attention kernel."""
    head_dim = 128 if "HeadDim128" in kernel.name else 64
    intended, wrong = _ATTENTION[head_dim], []
    shapes = {m[1] for _, t in kernel.instructions if (m := re.match(r"HGMMA\.(\w+?)\.F32", t))}
    if shapes != set(intended["products"]):
        wrong.append(f"matrix products {sorted(shapes)}, intended {sorted(intended['products'])}")
    if kernel.registers != intended["registers"]:
        wrong.append(f"{kernel.registers} registers at launch, intended {intended['registers']}")
    if kernel.count("UTMALDG.5D") != 3:
        wrong.append(
            f"{kernel.count('UTMALDG.5D')} bulk tensor loads, intended 3 (one issue site each for Q, K and V)"
        )
    if kernel.count("USETMAXREG") != 2:
        wrong.append(f"{kernel.count('USETMAXREG')} register hand-overs, intended 2")
    merge = issue_model.loads_in_flight([text for _, text in kernel.instructions])
    if merge < intended["merge"]:
        wrong.append(f"{merge} loads of the merge in flight, intended {intended['merge']}")
    loop = main_loop(kernel)
    if not loop:
        return [*wrong, "no main loop with both matrix products"]
    exponentials = between_waits(loop)["MUFU.EX2"]
    if exponentials < intended["exponentials"]:
        wrong.append(
            f"{exponentials} exponentials between the two waits of the main loop, intended"
            f" {intended['exponentials']}"
        )
    return wrong + check_loop(loop_figures(loop), *intended["loop"])


def check_loop(found: LoopFigures, executed: int, after_wait: int, before_release: int) -> list[str]:
    """What is not as intended in the main loop's figures."""
    wrong = []
    # R2UR: an address that the compiler took for divergent and moved to the uniform registers at run time.
    # BSSY, BSYNC: a branch after which it gathers the lanes of a warp again.
    for opcode in ("R2UR", "BSSY", "BSYNC"):
        if found[opcode]:
            wrong.append(f"{found[opcode]} {opcode} in the main loop, intended none")
    if found.executed > executed:
        wrong.append(f"{found.executed} instructions executed per key tile, intended at most {executed}")
    if found.after_wait > after_wait:
        wrong.append(
            f"{found.after_wait} instructions from the wait for O to the next product, intended at most"
            f" {after_wait}"
        )
    if found.before_release > before_release:
        wrong.append(
            f"K handed back {found.before_release} instructions after its wait, intended at most"
            f" {before_release}"
        )
    return wrong


def check(kernel: Kernel) -> list[str]:
    """What is not as intended in any kernel, and in an attention kernel besides."""
    wrong = []
    local = kernel.count("LDL", "STL")
    if local or kernel.stack or kernel.local:
        wrong.append(
            f"{local} local-memory accesses, {kernel.stack} bytes of stack, {kernel.local} of local memory"
        )
    if "sink_window_attention_fwd_sm90" in kernel.name:
        wrong += check_attention(kernel)
    return wrong


# The memory-bound ops, by the name of their kernels. Each has an instantiation for aligned rows that moves 16
# bytes a thread; the others are for rows that are not.
_MEMORY_BOUND = ("rope_append_kernel", "evict_kernel", "dmd_kernel", "dmd_straight_kernel")


def check_memory_bound(found: list[Kernel]) -> list[str]:
    """Which memory-bound op has no instantiation with 128-bit loads and stores on some architecture."""
    wrong = []
    for name in _MEMORY_BOUND:
        family = [k for k in found if name in k.name]
        for arch in sorted({k.arch for k in family}):
            if not any(wide(k, "LDG") and wide(k, "STG") for k in family if k.arch == arch):
                wrong.append(f"{name} ({arch}): no instantiation with 128-bit loads and stores")
    return wrong


def wide(kernel: Kernel, access: str) -> int:
    """How many global loads ("LDG") or stores ("STG") of 16 bytes a kernel has."""
    return sum(text.startswith(access) and ".128" in text for _, text in kernel.instructions)


def table(found: list[Kernel]) -> str:
    """One line per kernel."""
    head = (
        "kernel",
        "arch",
        "regs",
        "stack",
        "instr",
        "HGMMA",
        "UTMALDG",
        "LDG.128",
        "STG.128",
        "EX2 in overlap",
        "loop",
        "executed",
        "to product",
        "to release",
    )
    rows = [head]
    for k in sorted(found, key=lambda k: (k.title, k.arch)):
        loop = main_loop(k)
        figures = loop_figures(loop) if loop else None
        rows.append(
            (
                short_title(k),
                k.arch,
                k.registers,
                k.stack,
                len(k.instructions),
                k.count("HGMMA"),
                k.count("UTMALDG"),
                wide(k, "LDG"),
                wide(k, "STG"),
                between_waits(loop)["MUFU.EX2"] if loop else "-",
                *(
                    (figures.instructions, figures.executed, figures.after_wait, figures.before_release)
                    if loop
                    else "----"
                ),
            )
        )
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(head))]
    aligned = lambda i, x: str(x).ljust(widths[i]) if i < 2 else str(x).rjust(widths[i])  # noqa: E731
    return "\n".join("  ".join(aligned(i, x) for i, x in enumerate(row)) for row in rows)


def short_title(kernel: Kernel) -> str:
    """The function's own name and what distinguishes its instantiation."""
    match = re.search(r"([A-Za-z_]\w*)(<.*)?$", kernel.title)
    arguments = match[2] or ""
    marks = re.findall(
        r"Rows|bf16|f16|kFwdConfigHeadDim\d+|\bfloat\b|\bdouble\b|\(bool\)[01]|\b\d+\b", arguments
    )
    marks = [
        m.replace("kFwdConfigHeadDim", "D ").replace("(bool)", "").replace("Rows", "rows") for m in marks
    ]
    return match[1] + (f"<{', '.join(marks)}>" if marks else "")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=__doc__.splitlines()[0])
    parser.add_argument("library", nargs="?", type=Path, default=LIBRARY)
    parser.add_argument("--arch", help="one architecture alone, e.g. sm_90a (faster)")
    options = parser.parse_args(arguments)
    try:
        found = kernels(options.library, options.arch)
    except (FileNotFoundError, RuntimeError) as error:
        print(f"benchmarks.audit: {error}", file=sys.stderr)
        return 2
    if not found:
        print(
            f"benchmarks.audit: {options.library.name} holds no CUDA kernels (RF_CUDA=OFF)", file=sys.stderr
        )
        return 2
    print(table(found))
    print(issue_model.table(found))
    wrong = [f"{short_title(k)} ({k.arch}): {text}" for k in found for text in check(k)]
    wrong += check_memory_bound(found) + issue_model.check(found)
    attention = [k for k in found if "sink_window_attention_fwd_sm90" in k.name]
    if attention and len(attention) != _ATTENTION_VARIANTS:
        wrong.append(f"{len(attention)} Hopper attention kernels, intended {_ATTENTION_VARIANTS}")
    for line in wrong:
        print(f"NOT AS INTENDED: {line}")
    print(f"{len(found)} kernels, {len(attention)} of them for Hopper's matrix units; {len(wrong)} findings")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
