"""`make tuning`: every variant of the Hopper attention kernel as a library, build/tuning/<name>.so, for the
stage `tuning` of benchmarks.gpu_suite; and what the compiler made of each.

The command is that of the library's own build (build/cmake/compile_commands.json, from `make ext`), with the
variant's edited sources first on the include path. A variant that spills is built and measured all the same:
its line says so.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import variants  # noqa: E402

from benchmarks import audit  # noqa: E402

BUILD = ROOT / "build" / "tuning"
SOURCE = ROOT / "benchmarks" / "tuning" / "variant.cu"


def own_command() -> list[str]:
    """How the library's build compiles the kernel, up to its input and output."""
    database = ROOT / "build" / "cmake" / "compile_commands.json"
    entries = json.loads(database.read_text()) if database.exists() else []
    commands = [shlex.split(e["command"]) for e in entries if e["file"].endswith("sm90/launch.cu")]
    if not commands:
        sys.exit(
            "tuning: no Hopper kernels in build/cmake; `make ext` with nvcc and CUTLASS first (README.md)"
        )
    command = commands[0]
    return command[: command.index("-c")]


def build(variant) -> Path:
    library, sources = BUILD / f"{variant.name}.so", BUILD / "sources" / variant.name
    stamp = sources / ".command"
    compiler, *flags = own_command()
    command = [compiler, f"-I{sources}", *flags, "-shared", "-cudart=static", str(SOURCE), "-o", str(library)]
    newest = max(f.stat().st_mtime for f in [*ROOT.glob("csrc/**/*.*"), *sources.glob("**/*.h"), SOURCE])
    unchanged = library.exists() and stamp.exists() and stamp.read_text() == shlex.join(command)
    if unchanged and library.stat().st_mtime > newest:
        return library
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"tuning: {variant.name} does not compile:\n{done.stderr}")
    stamp.write_text(shlex.join(command))
    return library


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these variants alone")
    arguments = parser.parse_args()
    known = {v.name: v for v in variants.VARIANTS}
    if unknown := set(arguments.only or ()) - set(known):
        parser.error(f"--only: expected {', '.join(known)}, found {', '.join(sorted(unknown))}")
    chosen = [known[name] for name in arguments.only or known]
    variants.write(ROOT, BUILD / "sources", chosen)
    print(f"{'variant':24s} {'D':>4s} {'regs':>5s} {'stack':>6s} {'instr':>6s} {'EX2 in overlap':>15s}")
    for variant in chosen:
        for kernel in audit.kernels(build(variant)):
            if "bf16" in kernel.title:
                head_dim = 128 if "HeadDim128" in kernel.title else 64
                overlap = audit.between_waits(audit.main_loop(kernel))["MUFU.EX2"]
                print(
                    f"{variant.name:24s} {head_dim:4d} {kernel.registers:5d} {kernel.stack:6d}"
                    f" {len(kernel.instructions):6d} {overlap:15d}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
