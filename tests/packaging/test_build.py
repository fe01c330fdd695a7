"""What goes into a wheel, that two wheels are compared for real, and that the library asks nothing of a
network. The builds themselves are tried by tests/packaging/check.py (`make check-install`)."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import check
import setuptools

import rf_kernels

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = (Path(rf_kernels.__file__).parent / "_C.abi3.so").read_bytes()


def wheel(
    path, library=LIBRARY, order=("a.py", "_C.abi3.so"), date_time=(2026, 9, 21, 14, 13, 20), mode=0o644
):
    content = {"a.py": b"x = 1\n", "_C.abi3.so": library}
    with zipfile.ZipFile(path, "w") as archive:
        for name in order:
            member = zipfile.ZipInfo(name, date_time)
            member.external_attr = mode << 16
            archive.writestr(member, content[name])
    return path


def one_bit_in(section):
    """The library with one bit of this section turned."""
    changed = bytearray(LIBRARY)
    at = LIBRARY.index(section[:4096])
    changed[at + len(section[:4096]) // 2] ^= 1
    return bytes(changed)


def test_a_difference_of_two_wheels_is_named(tmp_path):
    first = wheel(tmp_path / "first.whl")
    sections = check.sections(LIBRARY, tmp_path)
    assert check.differences(first, wheel(tmp_path / "equal.whl")) == []
    for changed, named in (
        ({"order": ("_C.abi3.so", "a.py")}, "order"),
        ({"order": ("a.py",)}, "_C.abi3.so"),
        ({"date_time": (2026, 9, 21, 14, 13, 22)}, "date_time"),
        ({"mode": 0o600}, "external_attr"),
        ({"library": one_bit_in(sections[".text"])}, "section .text"),
        ({"library": one_bit_in(sections[".note.gnu.build-id"])}, "section .note.gnu.build-id"),
    ):
        found = check.differences(first, wheel(tmp_path / "second.whl", **changed))
        assert named in " ".join(found), (changed.keys(), found)


def test_a_folder_inside_a_wheel_is_named(tmp_path):
    inside = wheel(tmp_path / "inside.whl", LIBRARY + b"/home of/somebody/file.h")
    assert check.folders_inside(inside, ["/home of/somebody"]) == ["_C.abi3.so: /home of/somebody"]
    assert check.folders_inside(inside, ["/home of/nobody"]) == []


LISTEN = """
import sys
events = []
network = ("socket", "urllib", "http")
sys.addaudithook(lambda event, args: events.append(event) if event.split(".")[0] in network else None)
{body}
print(f"{{len(events)}} events: {{events[:5]}}")
"""
USE = """
import runpy
import rf_kernels, rf_kernels.doctor, reward_forcing
import reward_forcing.cli, reward_forcing.run, reward_forcing.losses
assert rf_kernels.doctor.main(["--json"]) == 0
runpy.run_path("tests/packaging/smoke.py", run_name="__main__")
"""


def events(body):
    code = f"import sys; sys.path[:0] = ['.', 'python']\n{LISTEN.format(body=body)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_import_doctor_and_a_stream_open_no_socket():
    assert events(USE) == "0 events: []"


def test_a_socket_would_be_seen():
    assert events("import socket; socket.socket().close()") == "1 events: ['socket.__new__']"


def test_the_binary_cannot_resolve_a_name(tmp_path):
    """Sockets it has where the CUDA runtime is linked in, which talks to tools on the same machine; other
    machines it cannot find."""
    (tmp_path / "library").write_bytes(LIBRARY)
    listing = subprocess.run(["nm", "-D", tmp_path / "library"], capture_output=True, text=True, check=True)
    symbols = {line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()}
    assert "memcpy" in symbols
    assert not symbols & {"getaddrinfo", "getnameinfo", "gethostbyname", "gethostbyname_r", "res_query"}


def test_a_wheel_holds_the_two_packages_alone():
    """What is not the library does not ship in it; `make check-install` looks into the wheel itself."""
    found = re.search(r"where = (\[.*\])\ninclude = (\[.*\])", (ROOT / "pyproject.toml").read_text())
    where, include = map(ast.literal_eval, found.groups())
    packages = {name for folder in where for name in setuptools.find_packages(ROOT / folder, include=include)}
    assert {name.split(".")[0] for name in packages} == {"rf_kernels", "reward_forcing"}
    assert {"rf_kernels.ops", "rf_kernels.reference", "reward_forcing.pipeline"} <= packages
    assert not [
        name for name in packages if {"bench", "gpu_suite", "published", "tests"} & set(name.split("."))
    ]


def test_trained_weights_and_logs_stay_out_of_the_wheel(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert (tmp_path / "reward_forcing/evaluate.py").is_file() and found <= {".py", ".typed"}
    assert (ROOT / "python/reward_forcing/assets/distill.safetensors").is_file()
