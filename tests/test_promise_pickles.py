"""No path of the packages unpickles what it reads, or runs it as code, but one call of ``torch.load`` with ``weights_only=True``: shown
on the syntax trees of rf_kernels and reward_forcing, names resolved through imports, their aliases and plain assignments."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rf_kernels", "python/reward_forcing")

#: Modules, and parts of modules, that read or register what a pickle may build: nothing of them may be named.
FORBIDDEN = {
    "marshal", "shelve", "copyreg", "dill", "cloudpickle", "joblib", "jsonpickle", "yaml", "ruamel", "pandas", "multiprocessing",
    "runpy", "pickle", "_pickle", "cPickle", "zodbpickle",
    "torch.load", "torch.package", "torch.hub", "torch.serialization", "torch.jit.load", "torch.export.load", "torch.multiprocessing",
    "torch._weights_only_unpickler", "torch.storage._load_from_bytes",
    "numpy.load", "numpy.lib", "numpy.fromfile", "numpy.memmap",
    "eval", "exec", "compile", "__import__", "builtins", "globals",
}  # fmt: skip
#: Of those, what reads nothing.
HARMLESS = {"pickle", "pickle.UnpicklingError", "pickle.PicklingError", "pickle.PickleError"}
#: Methods and attributes, whatever they belong to.
UNPICKLERS = {"Unpickler", "read_pickle", "unsafe_load", "persistent_load", "find_class", "add_safe_globals", "safe_globals",
              "load_module", "exec_module",
              "broadcast_object_list", "all_gather_object", "scatter_object_list", "recv_object_list"}  # fmt: skip
#: What a class defines so that a pickle of it can run code.
HOOKS = {"__reduce__", "__reduce_ex__", "__setstate__", "__getstate__", "__getnewargs__", "__getnewargs_ex__"}


def inside(name: str, names: set[str]) -> bool:
    """``name`` is one of ``names`` or lies below one."""
    parts = name.split(".")
    return any(".".join(parts[:n]) in names for n in range(1, len(parts) + 1))


def refused(name: str) -> bool:
    return inside(name, FORBIDDEN) and name not in HARMLESS


class Reader(ast.NodeVisitor):
    """Collects (line, what) of everything in a source that could run code of a file."""

    def __init__(self, tree: ast.AST):
        self.found: list[tuple[int, str]] = []
        self.meaning: dict[str, str] = {}  # a local name -> the dotted name it stands for
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.meaning |= {alias.asname: alias.name} if alias.asname else {}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                self.meaning |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for _ in range(3):  # names of names
            for node in ast.walk(tree):
                if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and (name := self.dotted(node.value)):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    for target in targets:
                        if isinstance(target, ast.Name) and (inside(name, FORBIDDEN) or name in ("torch", "numpy")):
                            self.meaning[target.id] = name
        self.visit(tree)

    def dotted(self, node) -> str | None:
        """The full name that an expression spells: aliases, ``getattr`` and ``import_module`` of constants resolved."""
        if isinstance(node, ast.Name):
            return self.meaning.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            base = self.dotted(node.value)
            return f"{base}.{node.attr}" if base else None
        if isinstance(node, ast.Call):
            constants = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if isinstance(node.func, ast.Name) and node.func.id == "getattr" and constants:
                base = self.dotted(node.args[0])
                return f"{base}.{constants[0]}" if base else None
            if self.dotted(node.func) == "importlib.import_module" and constants:
                return constants[0]
        return None

    def report(self, node, what: str) -> None:
        self.found.append((node.lineno, what))

    def visit_Import(self, node):
        for alias in node.names:
            if refused(alias.name):
                self.report(node, f"import of {alias.name}")

    def visit_ImportFrom(self, node):
        for alias in node.names:
            if not node.level and (
                refused(f"{node.module}.{alias.name}") or alias.name == "*" and node.module in ("torch", "numpy")
            ):
                self.report(node, f"import of {node.module}.{alias.name}")  # fmt: skip

    def visit_FunctionDef(self, node):
        if node.name in HOOKS:
            self.report(node, f"definition of {node.name}")
        self.generic_visit(node)

    def visit_Constant(self, node):
        if node.value in HOOKS:
            self.report(node, f"the name {node.value}")

    def visit_Name(self, node):
        if isinstance(node.ctx, ast.Load) and refused(name := self.dotted(node)):
            self.report(node, name)

    def visit_Attribute(self, node):
        name = self.dotted(node)
        if name and refused(name):
            self.report(node, name)
        elif node.attr in UNPICKLERS | HOOKS:
            self.report(node, node.attr)
        else:
            self.generic_visit(node)

    def visit_Call(self, node):
        name, keywords = self.dotted(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if keywords.get("allow_pickle", "False") != "False" or None in keywords and name and name.startswith("numpy."):
            self.report(node, "allow_pickle")
        if name == "torch.load" and keywords.get("weights_only") == "True" and "pickle_module" not in keywords:
            self.report(node, "torch.load(weights_only=True)")
            for child in (*node.args, *(k.value for k in node.keywords)):
                self.visit(child)
            return
        whole = self.dotted(node)  # of getattr and import_module
        if whole and refused(whole):
            self.report(node, whole)
        elif name == "importlib.import_module" and not whole:
            self.report(node, "import of a computed name")
        elif name == "getattr" and whole is None and self.dotted(node.args[0]) in ("torch", "numpy", "pickle"):
            self.report(node, "a computed name of a module")
        self.generic_visit(node)


def pickle_paths(source: str) -> list[tuple[int, str]]:
    return Reader(ast.parse(source)).found


def test_one_reader_of_pickles_and_it_reads_weights_only():
    found = []
    for package in PACKAGES:
        files = sorted((ROOT / package).rglob("*.py"))
        assert len(files) > 15
        found += [(path.name, what) for path in files for _, what in pickle_paths(path.read_text())]
    assert sorted(found) == [
        ("attention.py", "import of a computed name"),  # peers of the GPU benchmarks, by a tuple of names beside it
        # A cache and a layer's view of it, so that copies keep what shares memory together: they read nothing.
        *[
            ("cache.py", f"definition of {hook}")
            for hook in ("__getstate__", "__getstate__", "__setstate__", "__setstate__")
        ],
        ("checkpoint.py", "torch.load(weights_only=True)"),
    ]


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load(f)",
        "import torch; torch.load(f, weights_only=False)",
        "import torch; torch.load(f, weights_only=safe)",
        "import torch; torch.load(f, **options)",
        "import torch; torch.load(f, weights_only=True, pickle_module=dill)",
        "import torch as t; t.load(f)",
        "from torch import load as read; read(f)",
        "from torch import *; load(f)",
        "import torch; read = torch.load; read(f)",
        "import torch; t = torch; t.load(f)",
        "import torch; getattr(torch, 'load')(f)",
        "import torch; getattr(torch, name)(f)",
        "import torch; map(torch.load, files)",
        "import torch; torch.serialization.load(f)",
        "from torch.serialization import add_safe_globals",
        "from torch import serialization as s; s.load(f)",
        "import torch; torch.jit.load(f)",
        "from torch.package import PackageImporter",
        "import torch.package as p; p.PackageImporter(f)",
        "import torch; torch.hub.load_state_dict_from_url(u)",
        "import pickle; pickle.load(f)",
        "import pickle as p; p.loads(b)",
        "from pickle import loads",
        "from pickle import Unpickler as U; U(f).load()",
        "import pickle; class_ = pickle.Unpickler",
        "import _pickle; _pickle.loads(b)",
        "import marshal",
        "import shelve",
        "import joblib",
        "import copyreg",
        "import importlib; importlib.import_module('pickle').loads(b)",
        "import importlib; importlib.import_module(name)",
        "__import__('pickle').loads(b)",
        "import numpy as np; np.load(f)",
        "import numpy as np; np.load(f, allow_pickle=True)",
        "from numpy import load as read; read(f)",
        "from numpy.lib.format import read_array",
        "reader(f, allow_pickle=flag)",
        "frame.read_pickle(f)",
        "eval(text)",
        "exec(text)",
        "import builtins; builtins.eval(text)",
        "class A:\n    def __reduce__(self): return run, ()",
        "A.__setstate__ = run",
        "setattr(A, '__reduce_ex__', run)",
    ],
)
def test_a_planted_path_is_found(source):
    assert [what for _, what in pickle_paths(source) if what != "torch.load(weights_only=True)"], source


@pytest.mark.parametrize(
    "source",
    [
        "import json; json.loads(text); json.load(f)",
        "import pickle\ntry: pass\nexcept pickle.UnpicklingError: pass",
        "cache.load(path); model.eval(); torch.compile(f); re.compile(p)",
        "from safetensors.torch import load_file; load_file(p)",
        "from .checkpoint import load; load(p)",
    ],
)
def test_what_reads_no_pickle_is_not_found(source):
    assert not pickle_paths(source)
