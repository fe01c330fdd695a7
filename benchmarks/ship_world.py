"""Put a finished training of the embedded world into the repository: the checkpoint of each stage, its log
(means of ten steps) and one picture of the curves.

    python -m benchmarks.ship_world out/world python/reward_forcing/assets
"""

import json
import shutil
import sys
from pathlib import Path

from benchmarks import plots

STAGES = {"teacher": "teacher", "causal": "generator", "ode": "generator", "distill": "generator"}
LARGEST = 8 * 1024**2  # bytes of all checkpoints together
EVERY = 10


def means(lines: list[dict], every: int = EVERY) -> list[dict]:
    """One line for so many: the means of their numbers, the last one's step."""
    groups = [lines[i : i + every] for i in range(0, len(lines), every)]
    return [
        {
            k: group[-1][k] if k == "step" else round(sum(line[k] for line in group) / len(group), 4)
            for k in group[-1]
        }
        for group in groups
    ]


def panels(logs: dict[str, list[dict]]) -> list[dict]:
    found = []
    for stage, lines in logs.items():
        steps = [line["step"] for line in lines]
        names = [key for key in lines[0] if key.endswith("_loss")]
        series = {name: (steps, [line[name] for line in lines]) for name in names}
        found.append({"series": series, "xlabel": f"{stage}: optimizer step", "ylabel": "loss", "log": True})
    return found


def ship(runs: Path, target: Path) -> list[Path]:
    sources = {stage: runs / stage / f"{name}.safetensors" for stage, name in STAGES.items()}
    total = sum(path.stat().st_size for path in sources.values())
    if total > LARGEST:
        raise SystemExit(f"the checkpoints take {total} bytes, more than {LARGEST}")
    target.mkdir(parents=True, exist_ok=True)
    logs, written = {}, []
    for stage, source in sources.items():
        written.append(Path(shutil.copyfile(source, target / f"{stage}.safetensors")))
        lines = [json.loads(line) for line in (runs / stage / "log.jsonl").open()]
        logs[stage] = means(lines)
        written.append(target / f"{stage}.jsonl")
        written[-1].write_text("".join(json.dumps(line) + "\n" for line in logs[stage]))
    written.append(target / "curves.png")
    plots.lines(panels(logs), written[-1])
    return written


if __name__ == "__main__":
    for path in ship(Path(sys.argv[1]), Path(sys.argv[2])):
        print(path)
