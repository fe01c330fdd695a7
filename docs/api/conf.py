"""API reference from the docstrings: `make docs` (warnings are errors; no network)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import rf_kernels  # noqa: E402

project = "rf_kernels"
version = release = rf_kernels.__version__
copyright = "the rf_kernels authors"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px", "sidebar_width": "240px"}
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Every name that a docstring refers to must exist; those of other projects are not looked up (no network).
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|collections|contextlib|pathlib)\..*|Module|Tensor"),
    (r"py:class", r"rf_kernels\._backend\.Dispatch"),  # documented under its public name
    (r"py:class", r"rf_kernels\.cache\.stream\.Stream"),  # in a plan's signature alone
]
