"""What the SBOM of a wheel must be: CycloneDX 1.6 in its structure, and what the binary says of itself in its versions."""

import hashlib
import importlib.metadata
import json
import re
import sys
from pathlib import Path

# Of the specification (https://cyclonedx.org/docs/1.6/json/): the keys in use here, since no others are allowed than it names.
KEYS = {
    "document": {"bomFormat", "specVersion", "serialNumber", "version", "metadata", "components", "dependencies"},
    "metadata": {"timestamp", "lifecycles", "component"},
    "component": {"type", "bom-ref", "name", "version", "description", "scope", "hashes", "licenses", "purl", "properties",
                  "components"},
}  # fmt: skip
TYPES = {"application", "library", "file"}
SCOPES = {"required", "optional", "excluded"}


def check(document: dict, info: dict, library: bytes) -> None:
    """Raises AssertionError where the document is not of the standard's form, or not of this binary (`info`: its build_info())."""
    assert document["bomFormat"] == "CycloneDX" and document["specVersion"] == "1.6" and document["version"] == 1
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", document["serialNumber"])
    assert document.keys() <= KEYS["document"] and document["metadata"].keys() <= KEYS["metadata"]
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", document["metadata"].get("timestamp", "2000-01-01T00:00:00Z")
    )
    product = document["metadata"]["component"]
    everything = [product, *product["components"], *document["components"]]
    for part in everything:
        assert part.keys() <= KEYS["component"] and part["type"] in TYPES and part.get("scope", "required") in SCOPES, (
            part
        )
        assert all(choice["expression"] for choice in part.get("licenses", ())), part
    references = [part["bom-ref"] for part in everything]
    assert len(references) == len(set(references))
    assert {r for d in document["dependencies"] for r in (d["ref"], *d["dependsOn"])} <= set(references)

    assert product["version"] == info["version"]
    properties = {p["name"]: p["value"] for p in product["properties"]}
    for fact in ("commit", "cpu_arch", "cuda_archs", "hopper", "torch_target"):
        assert properties[f"rf_kernels:{fact}"] == info[fact], fact
    (binary,) = product["components"]
    assert binary["hashes"] == [{"alg": "SHA-256", "content": hashlib.sha256(library).hexdigest()}]
    found = {part["name"]: part["version"] for part in document["components"]}
    said = {"torch": "torch_headers", "cutlass": "cutlass", "cuda-cudart": "cuda_runtime", "cuda-nvcc": "nvcc"}
    for part, fact in said.items():
        assert found.get(part, "none") == info[fact], (part, found.get(part), info[fact])
    compiler, version = info["compiler"].split(" ", 1)
    assert found[{"GNU": "gcc", "Clang": "clang"}.get(compiler, compiler.lower())] == version
    assert all(re.match(r"\d+\.\d+", found[tool]) for tool in ("cpython", "cmake", "ninja", "setuptools"))
    assert all(part["purl"].endswith(f"@{part['version']}") for part in document["components"])


def check_installed() -> Path:
    """The SBOM of the rf_kernels that this interpreter imports, checked."""
    import rf_kernels
    from rf_kernels import doctor

    distribution = importlib.metadata.distribution("rf_kernels")
    (file,) = [f for f in distribution.files if f.parent.name == "sboms"]
    path = Path(file.locate())
    assert path.parent.parent.name.endswith(".dist-info") and doctor.extension()["sbom"] == str(path)
    library = Path(rf_kernels.__file__).parent / "_C.abi3.so"
    check(json.loads(path.read_text()), rf_kernels.build_info(), library.read_bytes())
    return path


if __name__ == "__main__":
    print(f"{check_installed()}: as the binary says, in {sys.prefix}")
