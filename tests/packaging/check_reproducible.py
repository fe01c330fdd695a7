"""One commit, one wheel: `make check-reproducible` (CI runs it; it compiles everything, so pytest does not).

A wheel of the commit is built in a fresh clone in another folder, with another umask, time zone, locale, home, temporary folder and
hash seed, in a namespace that has no network. It must be the first wheel, byte for byte; the first is `--wheel` (what `make wheel` made
here) or built from another clone. Where they differ the member and, in the binary, the section are named. No folder of the builds may
occur in it. Without a network too, the wheel is then installed and imported, the doctor runs and a stream is computed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OTHER = {"TZ": "Pacific/Kiritimati", "LC_ALL": "C", "PYTHONHASHSEED": "1"}
# What shows that a namespace has no network: its one interface is the loopback, and nothing outside can be reached.
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
    print(f"check-reproducible: {text}", flush=True)


def run(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        sys.exit(
            f"check-reproducible: {' '.join(map(str, command))} failed ({done.returncode}):\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def sections(data: bytes, folder: Path) -> dict[str, bytes]:
    """Section name -> content of an ELF file."""
    (folder / "elf").write_bytes(data)
    row = re.compile(r"\[ *\d+\] (\.\S*) +(\S+) +[0-9a-f]+ ([0-9a-f]+) ([0-9a-f]+) ")
    found = {}
    for name, kind, offset, size in row.findall(
        run("readelf", "-SW", folder / "elf", env=os.environ | {"LC_ALL": "C"})
    ):
        start = int(offset, 16)
        found[name] = data[start : start + int(size, 16)] if kind != "NOBITS" else b""
    return found


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
            found.append(f"names or their order: {sorted(set(a.namelist()) ^ set(b.namelist())) or a.namelist()}")
        for name in sorted(set(a.namelist()) & set(b.namelist())):
            x, y = a.getinfo(name), b.getinfo(name)
            for field in ("date_time", "external_attr", "compress_type", "create_system", "extra"):
                if getattr(x, field) != getattr(y, field):
                    found.append(f"{name}: {field} {getattr(x, field)} / {getattr(y, field)}")
            x, y = a.read(name), b.read(name)
            if x == y:
                continue
            found.append(f"{name}: {first_difference(x, y)}")
            if x.startswith(b"\x7fELF") and y.startswith(b"\x7fELF"):
                parts, others = sections(x, Path(folder)), sections(y, Path(folder))
                for part in dict.fromkeys([*parts, *others]):
                    if parts.get(part, b"") != others.get(part, b""):
                        found.append(
                            f"{name}, section {part}: {first_difference(parts.get(part, b''), others.get(part, b''))}"
                        )
    return found or ["the archives themselves (their members are equal)"]


def folders_inside(wheel: Path, folders) -> list[str]:
    """Which of these folders are named somewhere in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    return [f"{name}: {folder}" for name, data in content.items() for folder in folders if os.fsencode(folder) in data]


def offline_command() -> list[str]:
    """The words before a command that take its network away; empty where this machine does not allow that."""
    for words in (["unshare", "--net"], ["unshare", "--map-root-user", "--net"]):
        if shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0:
            return words
    return []


def build(folder: Path, prefix=(), **options) -> Path:
    """A wheel of the commit, from a clone in this folder."""
    folder.mkdir(parents=True)
    commit = run("git", "-C", ROOT, "rev-parse", "HEAD").strip()
    run("git", "clone", "-q", ROOT, folder / "rf_kernels", **options)
    run("git", "-C", folder / "rf_kernels", "checkout", "-q", commit, **options)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-index", "--no-deps"]
    run(*prefix, *pip, "-w", folder / "dist", ".", cwd=folder / "rf_kernels", **options)
    return next((folder / "dist").glob("*.whl"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--wheel", type=Path, help="the first wheel, built here from a clean checkout (default: one more clone)"
    )
    parser.add_argument("--with-network", action="store_true", help="where namespaces are not allowed: show the rest")
    arguments = parser.parse_args()
    if arguments.wheel and run("git", "-C", ROOT, "status", "--porcelain", "-uno"):
        sys.exit(
            "check-reproducible: files are changed; commit them first: a wheel of a changed tree cannot be built again"
        )
    offline = [] if arguments.with_network else offline_command()
    if not offline and not arguments.with_network:
        sys.exit(
            "check-reproducible: NOT SHOWN that build and import need no network: `unshare --net` is not permitted here. "
            "Run as root (in a container: with CAP_SYS_ADMIN), or show the rest with --with-network."
        )
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        (scratch / "tmp").mkdir()
        (scratch / "home").mkdir()
        environment = os.environ | OTHER | {"TMPDIR": str(scratch / "tmp"), "HOME": str(scratch / "home")}
        environment.pop("PYTHONPATH", None)
        if offline:
            run(*offline, sys.executable, "-c", NO_NETWORK)
        first = arguments.wheel or build(scratch / "first")
        second = build(scratch / "second" / "in another" / "folder", offline, env=environment, umask=0o077)
        places = [ROOT, scratch] + ([sys.prefix] if sys.prefix != sys.base_prefix else [])
        found = differences(first, second) + [f"a folder in {x}" for x in folders_inside(second, places)]
        if found:
            sys.exit(
                "check-reproducible: " + "\ncheck-reproducible: ".join(["two builds of one commit differ:", *found])
            )
        say(f"{second.name}: two builds, {second.stat().st_size} equal bytes, no folder of theirs inside")

        site = scratch / "site"
        run(*offline, sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site, second)
        shutil.copy(Path(__file__).with_name("smoke.py"), scratch)
        environment["PYTHONPATH"] = str(site)
        for command in (["-c", "import reward_forcing.cli"], ["-m", "rf_kernels.doctor"], ["smoke.py"]):
            text = run(*offline, sys.executable, *command, cwd=scratch, env=environment)
        assert "12 chunks streamed" in text, text
        where = run(sys.executable, "-c", "import rf_kernels; print(rf_kernels.__file__)", cwd=scratch, env=environment)
        assert where.startswith(str(site)), where
        if offline:
            say("built, installed, imported, the doctor and a stream run: without a network")


if __name__ == "__main__":
    main()
