"""The house rules that a machine can check: who imports whom, file sizes, one name per op in the same homes,
documents that name files which exist, and no word in the repository of the machine it was written on."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPS = ("rope_append", "ema_evict", "sink_window_attention", "dmd_gradient")


TESTS = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}


def tracked(*patterns, under=""):
    """Files of the repository (as git knows them, or as they lie there when this is no checkout)."""
    listing = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True
    )
    if listing.returncode == 0:
        files = [ROOT / line for line in listing.stdout.splitlines()]
    else:
        files = [p for p in ROOT.rglob("*") if not {".venv", "build", "out"} & set(p.relative_to(ROOT).parts)]
    files = [p for p in files if p.is_file() and p.is_relative_to(ROOT / under)]
    return sorted(p for p in files if not patterns or any(p.match(x) for x in patterns))


def imported_modules(path):
    """Absolute names of the modules that a Python file imports, wherever in the file."""
    package = path.relative_to(ROOT).with_suffix("").parts
    package = package[1:] if package[0] == "python" else package
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def inside(name, *packages):
    return any(name == p or name.startswith(p + ".") for p in packages)


#: Folder -> what nothing in it may import. benchmarks/ and tests/ use the library; it knows nothing of them.
FORBIDDEN = {
    "rf_kernels": ("reward_forcing", "benchmarks", "helpers", "chip"),
    "rf_kernels/reference": (
        *(
            f"rf_kernels.{name}"
            for name in ("_backend", "ops", "cache", "positions", "testing", "profiling", "doctor")
        ),
        *("numpy", "triton"),
    ),
    "rf_kernels/ops": ("rf_kernels.cache", "rf_kernels.reference", "rf_kernels.testing"),
    "rf_kernels/cache": ("rf_kernels.reference", "rf_kernels.testing", "rf_kernels.doctor"),
    "python": (
        "benchmarks",
        "helpers",
        "chip",
        "rf_kernels.reference",
        "rf_kernels.testing",
        "rf_kernels._backend",
    ),
    "benchmarks": ("helpers", "rf_kernels._selftest"),
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_who_imports_whom(folder):
    """By an import, or by the name of a module in a string that something else imports or runs."""
    wrong, modules = [], [f.split(".")[0] for f in FORBIDDEN[folder] if f in ("reward_forcing", "benchmarks")]
    for path in tracked("*.py", under=folder):
        where = path.relative_to(ROOT)
        wrong += [f"{where}: {name}" for name in imported_modules(path) if inside(name, *FORBIDDEN[folder])]
        strings = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
        names = [x for x in strings if isinstance(x, str) and re.fullmatch(r"\w+(\.\w+)*", x)]
        wrong += [
            f"{where}: the string {name!r}"
            for name in names
            if inside(name, *modules) and name != "reward_forcing"
        ]
    assert not wrong, "\n".join(wrong)


def test_the_gpu_suite_names_no_module_of_the_model_layer():
    text = "".join(path.read_text() for path in tracked("*.py", under="benchmarks/gpu_suite"))
    assert not re.findall(r"""["']reward_forcing\.\w""", text)


def test_no_test_imports_another():
    wrong = []
    for path in tracked("*.py", under="tests"):
        names = [part for name in imported_modules(path) for part in name.split(".")]
        wrong += [f"{path.relative_to(ROOT)}: {n}" for n in names if n in TESTS]
    assert not wrong, "\n".join(wrong)


def test_cpp_include_rules():
    wrong = []
    for path in tracked("*.h", "*.cpp", "*.cu", under="csrc"):
        relative = path.relative_to(ROOT)
        folder = relative.parts[1]
        for include in re.findall(r'#include ["<]([^">]+)[">]', path.read_text()):
            target = include.split("/")
            op_of_target = target[1] if target[0] == "csrc" and len(target) > 2 and target[1] in OPS else None
            if folder in OPS and op_of_target and op_of_target != folder:
                wrong.append(f"{relative} includes another op: {include}")
            if folder in ("arch", "math", "common") and op_of_target:
                wrong.append(f"{relative} includes an op: {include}")
            if folder in ("arch", "math") and (
                include.startswith("torch/") or include.startswith("csrc/common")
            ):
                wrong.append(f"{relative} knows of torch: {include}")
            if folder == "math" and target[:2] == ["csrc", "arch"]:
                wrong.append(f"{relative} includes the hardware layer: {include}")
            if target[0] == "tests":
                wrong.append(f"{relative} includes a test: {include}")
            if folder == "math" and include == "cuda_runtime.h":
                wrong.append(f"{relative} knows of the CUDA runtime")
            if path.suffix == ".cu" and include.startswith("torch/"):
                wrong.append(f"{relative} is CUDA source and includes torch: {include}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("op", OPS)
def test_one_op_one_name_the_same_homes(op):
    homes = [
        f"csrc/{op}/op.cpp",
        f"csrc/{op}/cpu.cpp",
        f"rf_kernels/ops/{op}.py",
        f"rf_kernels/reference/{op}.py",
        f"tests/ops/test_{op}.py",
        f"benchmarks/{op}.py",
        f"docs/{op}.md",
    ]
    skeleton = ("params.h", "config.h", "op.cpp", "kernel.h", "launch.h", "launch.cu", "cpu.cpp")
    # its kernel of our own has a folder for the one architecture that it runs on
    if op != "sink_window_attention":
        homes += [f"csrc/{op}/{name}" for name in skeleton]
    assert not [home for home in homes if not (ROOT / home).is_file()]
    sources = [path for path in tracked("*.h", "*.cpp", "*.cu", under=f"csrc/{op}")]
    assert not [path.name for path in sources if f"namespace rf::{op}" not in path.read_text()]
    assert re.search(rf'"{op}",\s+"\(', (ROOT / "csrc/ops.cpp").read_text()), "no schema line"


def test_files_read_in_one_sitting():
    sources = tracked("*.py", "*.h", "*.cu", "*.cpp", "*.cuh")
    assert len(sources) > 20
    long = {str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > 650}
    assert not long


def test_lines_of_110_columns():
    """Tables and lines with an address are exempt."""
    texts = tracked("*.py", "*.h", "*.cu", "*.cpp", "*.md")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in texts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 110 and "://" not in line and not (path.suffix == ".md" and line.startswith("|"))
    ]
    assert not wrong, "\n".join(wrong)


def test_documents_name_files_that_exist():
    """Every `path` in a document that looks like one of ours exists."""
    tops = {p.relative_to(ROOT).parts[0] for p in tracked()} - {"README.md"}
    missing = []
    for document in tracked("*.md"):
        if "golden" in document.parts:
            continue
        text = document.read_text()
        names = set(re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:md|toml))`", text))
        names |= {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
        for name in filter(None, names):
            ours = name.split("/")[0] in tops or name.endswith((".md", ".toml")) or "/" not in name
            generated = name.startswith(("out/", "build/", "dist/", ".venv/"))
            if ours and not generated and not ((ROOT / name).exists() or (document.parent / name).exists()):
                missing.append(f"{document.relative_to(ROOT)}: {name}")
    assert not missing, "\n".join(missing)


def test_the_repository_speaks_of_the_product_alone():
    """No machine paths and no package index hosts in tracked text."""
    patterns = [
        r"/(work|root)/",
        r"/home/\w",
        r"--(extra-)?index-url",
        r"--find[-]links",
        r"https?://[^ ]*/simple\b",
    ]
    wrong = []
    for path in tracked():
        if path.suffix in (".safetensors", ".png", ".gif", ".mp4"):
            continue
        text = path.read_text(errors="ignore")
        wrong += [f"{path.relative_to(ROOT)}: {m.group(0)}" for x in patterns for m in re.finditer(x, text)]
    assert not wrong, "\n".join(wrong)


def test_sink_alone_is_no_name():
    """`sink` alone means a softmax logit elsewhere (attn_sink); ours are num_sink_tokens, sink_frames,
    sink_k."""
    wrong = []
    for path in [*tracked("*.py", under="rf_kernels"), *tracked("*.py", under="python")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [node.arg] if isinstance(node, ast.arg) else [node.id] if isinstance(node, ast.Name) else []
            )
            wrong += [
                f"{path.relative_to(ROOT)}:{node.lineno}" for name in names if name in ("sink", "sinks")
            ]
    # The exceptions: the policy that a cache, or its rows, are made with.
    made_with = ("rf_kernels/cache/cache.py:", "rf_kernels/cache/rows.py:")
    wrong = [place for place in wrong if not place.startswith(made_with)]
    assert not wrong, "\n".join(wrong)


def test_one_reader_of_pickles_and_it_reads_weights_only():
    """What ruff's S3 rules, which `make lint` holds the packages to, do not know: PyTorch's own loader."""
    packages = [*tracked("*.py", under="rf_kernels"), *tracked("*.py", under="python")]
    loads = [
        (path.name, [ast.unparse(k) for k in node.keywords])
        for path in packages
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith(("torch.load", "serialization.load"))
    ]
    assert len(loads) == 1 and loads[0][0] == "checkpoint.py" and "weights_only=True" in loads[0][1]


def test_public_names_have_docstrings():
    import rf_kernels

    assert not [name for name in rf_kernels.__all__ if not (getattr(rf_kernels, name).__doc__ or "").strip()]
    assert all(hasattr(rf_kernels, name) for name in OPS)
