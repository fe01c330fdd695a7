"""Builds and installations, each tried for real: `make check-install`.

    python tests/packaging/check.py install             the ways of building and installing
    python tests/packaging/check.py reproducible        a second build of the commit gives the wheel's bytes
    python tests/packaging/check.py python3.12:2.11.0   the tests under another Python and PyTorch

The first two need the wheel of `make wheel` in dist. They take minutes, so pytest does not run them.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMOKE = Path(__file__).with_name("smoke.py")
# What the binary may expect from its process: torch's C shims, Python's limited API, and the C and C++
# runtimes.
NEEDED = set(
    "libtorch.so libtorch_cpu.so libstdc++.so.6 libgcc_s.so.1 libc.so.6 libm.so.6 libdl.so.2 librt.so.1"
    " libpthread.so.0 ld-linux-x86-64.so.2 ld-linux-aarch64.so.1".split()
)
SYMBOLS = ("torch_", "aoti_torch_", "PyModule_Create2", "_ITM_", "__gmon_start__", "__cxa_finalize")
VERSIONED = ("@GLIBC", "@GLIBCXX", "@CXXABI", "@GCC")
# What the tests need beside PyTorch; the chip model builds with what it finds.
TEST_PACKAGES = (
    "numpy safetensors pytest tqdm matplotlib imageio pillow nvtx pybind11 cmake ninja sphinx ruff==0.17.5"
    " tomli"
)
# The environment of the second build: what must not show in the wheel.
OTHER = {"TZ": "Pacific/Kiritimati", "LC_ALL": "C", "PYTHONHASHSEED": "1"}
# What shows that a namespace has no network: its one interface is the loopback, and nothing outside can be
# reached.
NO_NETWORK = """
import socket
names = [name for _, name in socket.if_nameindex()]
assert names == ["lo"], names
try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
except OSError:
    pass
else:
    raise AssertionError("a connection was made")
"""


def say(text):
    print(f"check: {text}", flush=True)


def run(*command, check=True, **options):
    """What a command prints; the end of this program where it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if check and done.returncode != 0:
        sys.exit(
            f"check: {' '.join(map(str, command))} failed ({done.returncode}):\n{done.stdout}{done.stderr}"
        )
    return done.stdout if check else done


def environment_without(*names):
    return {k: v for k, v in os.environ.items() if k not in names}


def without_nvcc():
    """The environment with every folder that holds an nvcc taken off PATH."""
    folders = [p for p in os.environ["PATH"].split(os.pathsep) if p and not Path(p, "nvcc").exists()]
    clean = environment_without(
        *("CUDACXX", "CUDA_HOME", "CUDA_PATH", "RF_CUDA", "RF_BUILD_DIR", "RF_COMMIT", "SOURCE_DATE_EPOCH")
    )
    return clean | {"PATH": os.pathsep.join(folders)}


def head(length="--short=12"):
    return run("git", "-C", ROOT, "rev-parse", length, "HEAD").strip()


def the_wheel():
    wheels = sorted((ROOT / "dist").glob("rf_kernels-*.whl"))
    assert len(wheels) == 1 and "cp310-abi3" in wheels[0].name, (
        f"expected one wheel in dist (`make wheel`), found {wheels}"
    )
    return wheels[0]


# ---- the ways of building and installing -------------------------------------------------------------------


def check_refusal(scratch):
    env = without_nvcc() | {"RF_CUDA": "ON", "RF_BUILD_DIR": str(scratch / "refused")}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", scratch / "lib"]
    done = run(*command, cwd=ROOT, env=env, check=False)
    text = done.stdout + done.stderr
    assert done.returncode != 0 and "no nvcc was found" in text and "Install the CUDA toolkit" in text, text
    say("RF_CUDA=ON without nvcc is refused, with what to install")


def check_environment(python, scratch, expect_cuda):
    """The doctor and the smoke test, from a folder that is not the source tree; the facts of the build."""
    shutil.copy(SMOKE, scratch)
    there = {"cwd": scratch, "env": environment_without("PYTHONPATH")}
    print(run(python, "-m", "rf_kernels.doctor", **there))
    ask = (
        "import json, rf_kernels; print(json.dumps({'file': rf_kernels.__file__} | rf_kernels.build_info()))"
    )
    info = json.loads(run(python, "-c", ask, **there))
    assert str(ROOT) not in info["file"], info
    assert (info["nvcc"] != "none") == expect_cuda, info
    print(run(python, scratch / SMOKE.name, **there), end="")
    return info


def check_binary(path):
    dynamic = run("readelf", "-d", path)
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert needed <= NEEDED, f"unexpected libraries: {needed - NEEDED}"
    undefined = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", path).splitlines()]
    strange = [s for s in undefined if not s.startswith(SYMBOLS) and not any(v in s for v in VERSIONED)]
    assert not strange, f"undefined symbols outside the allow-list: {strange}"
    say(
        f"{path.name}: {len(undefined)} undefined symbols, all of the allow-list; needs"
        f" {', '.join(sorted(needed))}"
    )


def install(scratch, torch):
    """RF_CUDA=ON without nvcc is refused. The source archive builds without nvcc, in isolation, in a fresh
    environment. The wheel holds the two packages alone, and works there too; its binary needs nothing outside
    of the allow-list."""
    check_refusal(scratch)
    run(sys.executable, "-m", "venv", scratch / "venv")
    python = scratch / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", torch, "numpy", "safetensors")
    # The archive, not the tree: that it holds all that a build needs shows only where there is nothing else.
    run(sys.executable, "setup.py", "-q", "sdist", "-d", scratch / "archive", cwd=ROOT)
    (archive,) = (scratch / "archive").glob("rf_kernels-*.tar.gz")
    run(python, "-m", "pip", "install", "-q", archive, cwd=scratch, env=without_nvcc())
    info = check_environment(python, scratch, expect_cuda=False)
    assert info["commit"].removesuffix("+dirty") == head(), (info["commit"], head())
    say(f"`pip install` of {archive.name} ({archive.stat().st_size} bytes), isolated and without nvcc, works")

    wheel = the_wheel()
    run(python, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", wheel)
    check_environment(python, scratch, expect_cuda=shutil.which("nvcc") is not None)
    say(f"{wheel.name} works in a fresh environment")
    with zipfile.ZipFile(wheel) as members:
        inside = {name.split("/")[0] for name in members.namelist()}
        members.extract("rf_kernels/_C.abi3.so", scratch)
    assert {n for n in inside if not n.endswith(".dist-info")} == {"rf_kernels", "reward_forcing"}, inside
    check_binary(scratch / "rf_kernels" / "_C.abi3.so")
    audit = [
        Path(sys.executable).parent / "abi3audit",
        "--strict",
        "--summary",
        "--assume-minimum-abi3",
        "3.10",
        wheel,
    ]
    done = run(*audit, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    say("abi3audit: " + " ".join((done.stdout + done.stderr).split()[1:]))


# ---- one commit, one wheel ---------------------------------------------------------------------------------


def sections(data: bytes, folder: Path) -> dict[str, bytes]:
    """Section name -> content of an ELF file."""
    (folder / "elf").write_bytes(data)
    row = re.compile(r"\[ *\d+\] (\.\S*) +(\S+) +[0-9a-f]+ ([0-9a-f]+) ([0-9a-f]+) ")
    listing = run("readelf", "-SW", folder / "elf", env=os.environ | {"LC_ALL": "C"})
    places = {
        name: (kind, int(offset, 16), int(size, 16)) for name, kind, offset, size in row.findall(listing)
    }
    return {
        name: data[at : at + size] if kind != "NOBITS" else b"" for name, (kind, at, size) in places.items()
    }


def first_difference(a: bytes, b: bytes) -> str:
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    near = slice(max(0, at - 24), at + 40)
    return f"{len(a)} and {len(b)} bytes, from byte {at} on: {a[near]!r} / {b[near]!r}"


def differences(first: Path, second: Path) -> list[str]:
    """In what two wheels differ; empty where every byte is equal."""
    if first.read_bytes() == second.read_bytes():
        return []
    found = []
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(first) as a, zipfile.ZipFile(second) as b:
        if a.namelist() != b.namelist():
            found.append(
                f"names or their order: {sorted(set(a.namelist()) ^ set(b.namelist())) or a.namelist()}"
            )
        for name in sorted(set(a.namelist()) & set(b.namelist())):
            for field in ("date_time", "external_attr", "compress_type", "create_system", "extra"):
                x, y = (getattr(archive.getinfo(name), field) for archive in (a, b))
                found += [f"{name}: {field} {x} / {y}"] if x != y else []
            x, y = a.read(name), b.read(name)
            if x == y:
                continue
            found.append(f"{name}: {first_difference(x, y)}")
            if x.startswith(b"\x7fELF") and y.startswith(b"\x7fELF"):
                parts, others = sections(x, Path(folder)), sections(y, Path(folder))
                for part in dict.fromkeys([*parts, *others]):
                    x, y = parts.get(part, b""), others.get(part, b"")
                    found += [f"{name}, section {part}: {first_difference(x, y)}"] if x != y else []
    return found or ["the archives themselves (their members are equal)"]


def folders_inside(wheel: Path, folders) -> list[str]:
    """Which of these folders are named somewhere in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    return [
        f"{name}: {folder}"
        for name, data in content.items()
        for folder in folders
        if os.fsencode(folder) in data
    ]


def offline_command() -> list[str]:
    """The words before a command that take its network away."""
    for words in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        if shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0:
            return words
    sys.exit(
        "check: NOT SHOWN that build and import need no network: `unshare --net` is not permitted here. "
        "Run as root (in a container: with CAP_SYS_ADMIN), or show the rest with --with-network."
    )


def reproducible(scratch, with_network):
    """The commit is built again in a fresh clone in another folder, with another umask, time zone, locale,
    home, temporary folder and hash seed, in a namespace that has no network. It must be the first wheel, byte
    for byte, and name no folder of the builds. Without a network too, it is then installed and imported, the
    doctor runs and a stream is computed."""
    if run("git", "-C", ROOT, "status", "--porcelain", "-uno"):
        sys.exit(
            "check: files are changed; commit them first: a wheel of a changed tree cannot be built again"
        )
    offline = [] if with_network else offline_command()
    environment = (
        environment_without("PYTHONPATH")
        | OTHER
        | {"TMPDIR": str(scratch / "tmp"), "HOME": str(scratch / "home")}
    )
    for name in ("tmp", "home"):
        (scratch / name).mkdir()
    if offline:
        run(*offline, sys.executable, "-c", NO_NETWORK)
    first, clone = the_wheel(), scratch / "in another" / "folder"
    clone.parent.mkdir()
    there = {"env": environment, "umask": 0o077}
    run("git", "clone", "-q", ROOT, clone, **there)
    run("git", "-C", clone, "checkout", "-q", head("--verify"), **there)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-index", "--no-deps"]
    run(*offline, *pip, "-w", scratch / "dist", ".", cwd=clone, **there)
    (second,) = (scratch / "dist").glob("*.whl")
    places = [ROOT, scratch] + ([sys.prefix] if sys.prefix != sys.base_prefix else [])
    found = differences(first, second) + [f"a folder in {x}" for x in folders_inside(second, places)]
    if found:
        sys.exit("\n".join(["check: two builds of one commit differ:", *found]))
    say(f"{second.name}: two builds, {second.stat().st_size} equal bytes, no folder of theirs inside")

    site = scratch / "site"
    run(
        *offline,
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--target",
        site,
        second,
    )
    shutil.copy(SMOKE, scratch)
    there = {"cwd": scratch, "env": environment | {"PYTHONPATH": str(site)}}
    for command in (["-c", "import reward_forcing.run"], ["-m", "rf_kernels.doctor"], ["smoke.py"]):
        text = run(*offline, sys.executable, *command, **there)
    assert "12 chunks streamed" in text, text
    where = run(sys.executable, "-c", "import rf_kernels; print(rf_kernels.__file__)", **there)
    assert where.startswith(str(site)), where
    say(
        "installed, imported, the doctor and a stream run"
        + (": without a network, as the build" if offline else "")
    )


# ---- one extension, many Pythons and PyTorches -------------------------------------------------------------


def versions(pairs, select):
    """Each pair gets an environment of its own in build/versions, and there the tests run on the one
    rf_kernels/_C.abi3.so that `make ext` built. Prints one line a pair: versions, and what pytest counted."""
    lines, failed = [], False
    for interpreter, torch in pairs:
        folder = ROOT / "build" / "versions" / f"{Path(interpreter).name}-torch-{torch}"
        python = folder / "bin" / "python"
        if not (folder / ".complete").exists():
            run(interpreter, "-m", "venv", "--clear", folder)
            run(python, "-m", "pip", "install", "-q", f"torch=={torch}", *TEST_PACKAGES.split())
            (folder / ".complete").touch()
        env = environment_without("PYTHONPATH", "VIRTUAL_ENV")
        about = "import sys, torch; print('Python', sys.version.split()[0] + ', PyTorch', torch.__version__)"
        name = run(python, "-c", about, env=env).strip()
        say(name)
        done = run(
            python,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            select,
            "tests",
            cwd=ROOT,
            env=env,
            check=False,
        )
        if done.returncode != 0:
            failed = True
            print(done.stdout[-20000:], done.stderr[-4000:], sep="\n")
        lines.append(f"{name}: {(done.stdout.strip().splitlines() or ['no output'])[-1].strip('= ')}")
    print(*lines, sep="\n")
    sys.exit(failed)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", help="install, reproducible, or pairs INTERPRETER:TORCH")
    parser.add_argument(
        "--torch", default="torch==2.13.0", help="install: the PyTorch of the fresh environment"
    )
    parser.add_argument(
        "--with-network", action="store_true", help="reproducible: where namespaces are not allowed"
    )
    parser.add_argument(
        "--select", default="not heavy", help="versions: pytest's -m (default: the everyday run)"
    )
    arguments = parser.parse_args()
    pairs = [tuple(what.rsplit(":", 1)) for what in arguments.what if ":" in what]
    if wrong := [
        what for what in arguments.what if ":" not in what and what not in ("install", "reproducible")
    ]:
        parser.error(
            f"{wrong[0]!r}: expected install, reproducible or INTERPRETER:TORCH, e.g. python3.12:2.11.0"
        )
    for name, check, option in (
        ("install", install, arguments.torch),
        ("reproducible", reproducible, arguments.with_network),
    ):
        if name in arguments.what:
            with tempfile.TemporaryDirectory() as folder:
                check(Path(folder), option)
    if pairs:
        versions(pairs, arguments.select)


if __name__ == "__main__":
    main()
