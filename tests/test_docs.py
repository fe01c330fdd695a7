"""The documents and what they are made from say the same: the API reference names all that is public."""

import re
from pathlib import Path

import rf_kernels

ROOT = Path(__file__).resolve().parents[1]


def test_every_public_name_is_in_the_api_reference():
    text = "\n".join(path.read_text() for path in (ROOT / "docs/api").glob("*.rst"))
    named = {name.rpartition(".")[2] for name in re.findall(r"^\.\. auto\w+:: (\S+)$", text, re.M)}
    assert not set(rf_kernels.__all__) - named
