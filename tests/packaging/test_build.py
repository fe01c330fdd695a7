"""What a build says of itself, that two builds are compared for real, and that the library asks nothing of a network.

The builds themselves are in tests/packaging/check_install.py and tests/packaging/check_reproducible.py."""

import copy
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import check_reproducible
import pytest
import sbom_tools

import rf_kernels
import sbom

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = (Path(rf_kernels.__file__).parent / "_C.abi3.so").read_bytes()
TOOLS = {"cxx_flags": "-O3", "cuda_flags": "-O3", "cmake": "4.4.4", "ninja": "1.13.2"}


def document(info=None, epoch=1_790_000_000):
    info = info or rf_kernels.build_info()
    return sbom.document(info | TOOLS, hashlib.sha256(LIBRARY).hexdigest(), "3.11.7", "84.2.1", epoch)


def test_the_sbom_is_of_the_standards_form_and_of_this_binary():
    made = json.loads(json.dumps(document()))
    sbom_tools.check(made, rf_kernels.build_info(), LIBRARY)
    assert made["metadata"]["timestamp"] == "2026-09-21T14:13:20Z"
    assert "timestamp" not in document(epoch=None)["metadata"]


def test_a_cpu_build_lists_no_cuda():
    info = rf_kernels.build_info() | {"nvcc": "none", "cuda_runtime": "none", "cutlass": "none", "cuda_archs": ""}
    made = document(info)
    sbom_tools.check(made, info, LIBRARY)
    assert {part["name"] for part in made["components"]} & {"cutlass", "cuda-cudart", "cuda-nvcc"} == set()


def test_equal_builds_have_equal_sboms_and_others_have_not():
    assert document() == document()
    assert document()["serialNumber"] != document(rf_kernels.build_info() | {"commit": "another"})["serialNumber"]


EDITS = {
    "a version": lambda d: d["components"][0].update(version="0.0.1"),
    "a key": lambda d: d["components"][0].update(colour="blue"),
    "a reference": lambda d: d["dependencies"][0]["dependsOn"].append("nothing"),
    "the commit": lambda d: d["metadata"]["component"]["properties"][0].update(value="another"),
    "the hash": lambda d: d["metadata"]["component"]["components"][0]["hashes"][0].update(content="0" * 64),
    "a part": lambda d: d["components"].pop(0),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_wrong_sbom_is_found(name):
    made = copy.deepcopy(document())
    EDITS[name](made)
    with pytest.raises((AssertionError, KeyError)):
        sbom_tools.check(made, rf_kernels.build_info(), LIBRARY)


def wheel(path, library=LIBRARY, order=("a.py", "_C.abi3.so"), date_time=(2026, 9, 21, 14, 13, 20), mode=0o644):
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
    sections = check_reproducible.sections(LIBRARY, tmp_path)
    assert check_reproducible.differences(first, wheel(tmp_path / "equal.whl")) == []
    for changed, named in (
        ({"order": ("_C.abi3.so", "a.py")}, "order"),
        ({"order": ("a.py",)}, "_C.abi3.so"),
        ({"date_time": (2026, 9, 21, 14, 13, 22)}, "date_time"),
        ({"mode": 0o600}, "external_attr"),
        ({"library": one_bit_in(sections[".text"])}, "section .text"),
        ({"library": one_bit_in(sections[".note.gnu.build-id"])}, "section .note.gnu.build-id"),
    ):
        found = check_reproducible.differences(first, wheel(tmp_path / "second.whl", **changed))
        assert named in " ".join(found), (changed.keys(), found)


def test_a_folder_inside_a_wheel_is_named(tmp_path):
    inside = wheel(tmp_path / "inside.whl", LIBRARY + b"/home of/somebody/file.h")
    assert check_reproducible.folders_inside(inside, ["/home of/somebody"]) == ["_C.abi3.so: /home of/somebody"]
    assert check_reproducible.folders_inside(inside, ["/home of/nobody"]) == []


LISTEN = """
import sys
events = []
sys.addaudithook(lambda event, args: events.append(event) if event.split(".")[0] in ("socket", "urllib", "http") else None)
{body}
print(f"{{len(events)}} events: {{events[:5]}}")
"""
USE = """
import runpy
import rf_kernels, benchmarks, rf_kernels.doctor, reward_forcing, reward_forcing.cli
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
    """Sockets it has where the CUDA runtime is linked in, which talks to tools on the same machine; other machines it cannot find."""
    (tmp_path / "library").write_bytes(LIBRARY)
    listing = subprocess.run(["nm", "-D", tmp_path / "library"], capture_output=True, text=True, check=True)
    symbols = {line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()}
    assert "memcpy" in symbols
    assert not symbols & {"getaddrinfo", "getnameinfo", "gethostbyname", "gethostbyname_r", "res_query"}
