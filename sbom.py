"""The software bill of materials of a wheel, CycloneDX 1.6: what went into `_C.abi3.so` and what built it.

`setup.py` writes it to `<name>.dist-info/sboms/` (PEP 770) from build.json, the facts that CMake gathered and that the binary itself
reports (`rf_kernels.build_info()`). Equal builds give equal documents: the serial number is derived from the content, the time stamp is
SOURCE_DATE_EPOCH. What a package needs at run time is in its METADATA, not here.
"""

import datetime
import json
import uuid

# name -> (type, licence as SPDX expression, package URL without version, scope). "required": part of it is in the binary;
# "excluded": built it, and left nothing behind.
PARTS = {
    "torch": ("library", "BSD-3-Clause", "pkg:pypi/torch", "required"),
    "cutlass": ("library", "BSD-3-Clause", "pkg:github/nvidia/cutlass", "required"),
    "cuda-cudart": ("library", "LicenseRef-NVIDIA-CUDA-Toolkit-EULA", "pkg:generic/cuda-cudart", "required"),
    "cpython": ("library", "PSF-2.0", "pkg:generic/cpython", "required"),
    "gcc": ("application", "GPL-3.0-or-later WITH GCC-exception-3.1", "pkg:generic/gcc", "required"),
    "clang": ("application", "Apache-2.0 WITH LLVM-exception", "pkg:generic/clang", "required"),
    "cuda-nvcc": ("application", "LicenseRef-NVIDIA-CUDA-Toolkit-EULA", "pkg:generic/cuda-nvcc", "required"),
    "cmake": ("application", "BSD-3-Clause", "pkg:generic/cmake", "excluded"),
    "ninja": ("application", "Apache-2.0", "pkg:generic/ninja", "excluded"),
    "setuptools": ("application", "MIT", "pkg:pypi/setuptools", "excluded"),
}
WHY = {
    "torch": "headers of the stable ABI; the library is linked at run time",
    "cutlass": "headers of the sm_90a kernels",
    "cuda-cudart": "linked statically",
    "cpython": "headers, limited API of Python 3.10",
    "gcc": "compiler; templates of its C++ library, which is linked at run time",
    "clang": "compiler; templates of its C++ library, which is linked at run time",
    "cuda-nvcc": "compiler of the CUDA kernels; headers of the toolkit",
}


def versions(build: dict, python: str, setuptools: str) -> dict:
    """Part -> version, of what was in use: a build without CUDA has no CUDA parts."""
    compiler, _, version = build["compiler"].partition(" ")
    found = {
        "torch": build["torch_headers"],
        "cutlass": build["cutlass"],
        "cuda-cudart": build["cuda_runtime"],
        "cpython": python,
        {"GNU": "gcc", "Clang": "clang"}.get(compiler, compiler.lower()): version,
        "cuda-nvcc": build["nvcc"],
        "cmake": build["cmake"],
        "ninja": build["ninja"],
        "setuptools": setuptools,
    }
    return {part: version for part, version in found.items() if version != "none"}


def component(name: str, version: str) -> dict:
    kind, licence, purl, scope = PARTS.get(name, ("application", None, f"pkg:generic/{name}", "required"))
    entry = {"type": kind, "bom-ref": name, "name": name, "version": version, "scope": scope}
    if name in WHY:
        entry["description"] = WHY[name]
    if licence:
        entry["licenses"] = [{"expression": licence}]
    return entry | {"purl": f"{purl}@{version}"}


def document(build: dict, library_sha256: str, python: str, setuptools: str, epoch: int | None) -> dict:
    """The document as a dictionary. `build` is build.json, `epoch` SOURCE_DATE_EPOCH (None: no time stamp)."""
    parts = [component(name, version) for name, version in versions(build, python, setuptools).items()]
    facts = ("commit", "cpu_arch", "cuda_archs", "hopper", "torch_target", "cxx_flags", "cuda_flags")
    product = {
        "type": "library",
        "bom-ref": "rf_kernels",
        "name": "rf_kernels",
        "version": build["version"],
        "licenses": [{"expression": "Apache-2.0"}],
        "purl": f"pkg:pypi/rf-kernels@{build['version']}",
        "properties": [{"name": f"rf_kernels:{fact}", "value": build[fact]} for fact in facts],
        "components": [
            {
                "type": "file",
                "bom-ref": "_C.abi3.so",
                "name": "rf_kernels/_C.abi3.so",
                "hashes": [{"alg": "SHA-256", "content": library_sha256}],
            }
        ],
    }
    metadata = {"lifecycles": [{"phase": "build"}], "component": product}
    if epoch is not None:
        metadata["timestamp"] = datetime.datetime.fromtimestamp(epoch, datetime.timezone.utc).strftime(
            "%Y-%m-%dT%H:%M:%SZ"
        )
    content = {
        "metadata": metadata,
        "components": parts,
        "dependencies": [
            {"ref": "rf_kernels", "dependsOn": ["_C.abi3.so"]},
            {"ref": "_C.abi3.so", "dependsOn": [p["bom-ref"] for p in parts if p["scope"] == "required"]},
        ],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))
    head = {"bomFormat": "CycloneDX", "specVersion": "1.6", "serialNumber": f"urn:uuid:{serial}", "version": 1}
    return head | content
