"""The catalogue of planted faults: what a fault is, and how its files are read. The faults themselves are in tests/mutants/faults.

A catalogue file is text in the manner of a patch, so that a fault can be read beside the source it spoils:

    file csrc/math/dtype.h

    bf16-ties | rounding | a tie goes up, not to even
    - u + 0x7FFFu + ((u >> 16) & 1u)
    + u + 0x8000u

``-`` lines are the text to be replaced, which occurs once in the file (several lines: as they lie there, indentation included);
``+`` lines replace it (none: it is deleted); a ``?`` line says why the fault changes nothing that can be observed. Kinds are KINDS.
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent / "faults"

KINDS = {
    "index": "which element, row, head, axis or argument",
    "slots": "slots and frames of the ring, of plans and schedules",
    "mask": "which elements, keys or tokens count",
    "scale": "factors, divisors, weights",
    "EMA": "the moving average and its state",
    "rounding": "where and how a value is rounded; the width of an intermediate",
    "tail": "the end of a reduction or a loop over vectors, tiles, chunks",
    "sign": "signs and directions",
    "off by one": "bounds",
    "formula": "another formula than the documented one",
    "step": "a step left out, or in the wrong order",
    "check": "wrong arguments accepted, or right ones refused",
}

#: What CI plants: ten faults of ten kinds and files, whose builds are short.
SAMPLE = (
    "zero-divisor-drops", "published-sum-wide", "squares-tail", "loss-half", "key-gradient-last", "neighbours-in-one-slot",
    "window-one-short", "state-taken-again", "absorber-next", "sid-sign",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One fault: ``old``, which occurs once in ``file``, becomes ``new``."""

    id: str
    file: str
    kind: str
    breaks: str
    old: str
    new: str
    equivalent: str = ""

    @property
    def compiled(self) -> bool:
        return not self.file.endswith(".py")

    def planted_in(self, text: str) -> str:
        if text.count(self.old) != 1:
            raise ValueError(f"{self.id}: its text occurs {text.count(self.old)} times in {self.file}, not once")
        return text.replace(self.old, self.new)


def read(path: Path) -> list[Fault]:
    """The faults of one catalogue file."""
    faults, file, head = [], None, None
    lines: dict[str, list[str]] = {}

    def close():
        if head is not None:
            old, new, why = ("\n".join(lines.get(sign, ())) for sign in "-+?")
            faults.append(Fault(head[0], file, head[1], head[2], old, new, why))

    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line[:1] in "-+?" and line:
            if head is None or (len(line) > 1 and line[1] != " "):
                raise ValueError(f"{path.name}:{number}: {line!r}")
            lines.setdefault(line[0], []).append(line[2:])
        elif line.startswith("file "):
            close()
            file, head = line.removeprefix("file ").strip(), None
        elif line.strip() and not line.startswith("#"):
            close()
            parts = [part.strip() for part in line.split("|", 2)]
            if len(parts) != 3 or file is None:
                raise ValueError(f"{path.name}:{number}: {line!r}")
            head, lines = parts, {}
    close()
    return faults


def load() -> list[Fault]:
    """The whole catalogue, file after file."""
    return [fault for path in sorted(FOLDER.glob("*.txt")) for fault in read(path)]
