"""Sources with some places changed, in a folder of their own that an include path names first.

Shared by what plants faults in a kernel (tests/chip/faults.py) and what tries other choices (variants.py). A
text that is not found exactly once is an error: a list of edits cannot silently go stale.
"""

import re
from collections.abc import Mapping
from pathlib import Path


def any_line_breaks(text: str) -> str:
    """A pattern for `text` however the formatter breaks its lines."""
    return r"\s+".join(re.escape(word).replace(r"\(", r"\(\s*") for word in text.split())


def edited(root: Path, file: str, edits, name: str) -> str:
    """The text of a file under `root` after the (before, after) pairs."""
    text = (root / file).read_text()
    for before, after in edits:
        found = re.findall(any_line_breaks(before), text)
        if len(found) != 1:
            raise SystemExit(f"{name}: {before!r} occurs {len(found)} times in {file}, expected once")
        text = text.replace(found[0], after)
    return text


def write(root: Path, folder: Path, edits: Mapping[str, tuple], name: str) -> None:
    """The edited files, at `folder`/<path>; what is the same already is not touched, so it is not compiled
    again."""
    for file, pairs in edits.items():
        text, target = edited(root, file, pairs, name), folder / file
        if not target.exists() or target.read_text() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
