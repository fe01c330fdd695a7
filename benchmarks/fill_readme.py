"""Fill the marked sections of README.md and docs/ from the reports in benchmarks/results.

    python -m benchmarks --quick --settle 3 --device cpu --threads 2 --json benchmarks/results/cpu.json
    python benchmarks/accuracy.py && python benchmarks/ema_study.py
    python benchmarks/fill_readme.py   # writes; --check: exit 1 where a section is not what the reports say

CPU figures are ratios: absolute times of a shared machine say nothing.
"""

import argparse
import json
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPS = ("rope_append", "ema_evict", "sink_window_attention", "dmd_gradient")
PEERS = {
    "published": "published path",
    "published_window": "published, all of the window rotated",
    "eager": "best plain PyTorch",
    "sdpa": "SDPA alone",
    "concatenated": "concatenation, SDPA",
    "masked_sdpa": "SDPA with a mask",
    "float64": "eager float64",
}


def load(name: str):
    return json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 110, break_long_words=False, break_on_hyphens=False)


def shell(command: str) -> list[str]:
    return ["```sh", command, "```"]


def where(report: dict) -> str:
    facts = report["environment"]
    machine = f"a CPU ({facts['cpu']}), {facts['threads']} threads"
    return f"{machine}, torch {facts['torch']}, commit {facts['commit']}, {facts['date']}"


def ratios(results: list[dict]) -> list[str]:
    """A row a case, a column a peer."""
    peers = list(dict.fromkeys(peer for r in results for peer in r["times_faster_than"]))
    rows = []
    for r in results:
        found = r["times_faster_than"]
        cells = [f"{found[peer]:.2f}x" if peer in found else "" for peer in peers]
        rows.append([r["shape"], r["dtype"], *cells])
    return table(["case", "dtype", *(PEERS[peer] for peer in peers)], rows)


def speed_of(op: str) -> list[str]:
    report = load("cpu")
    text = (
        f"The table says how many times faster the op is than each peer. Machine: {where(report)}. Command:"
    )
    lines = [*wrapped(text), "", *shell(f"python -m benchmarks --op {op}"), ""]
    return lines + ratios([r for r in report["results"] if r["op"] == op])


def aims() -> list[str]:
    report = load("cpu")
    timings = {result["case"]: result["timings"] for result in report["results"]}
    rows = []
    for verdict in report["aims"]:
        state = {True: "met", False: "missed", None: "not measured"}[verdict["met"]]
        figure = "" if verdict["figure"] is None else f"{verdict['figure']:.2f}"
        spread = max((t["p80"] / t["p20"] for t in timings.get(verdict["case"], {}).values()), default=0.0)
        bound = verdict["bound"].replace("<", "\\<").replace(">", "\\>")
        rows.append([verdict["aim"], figure, bound, state, f"{spread:.1f}" if spread else ""])
    text = "Each ratio is one of medians in float32. The candidates took turns. "
    lines = [*wrapped(text + f"Machine: {where(report)}."), ""]
    lines += table(["job", "ratio", "aim", "", "spread"], rows)
    text = (
        "Spread is the 80th over the 20th percentile of the candidate that was disturbed most. It is near 1"
        " on a quiet machine. [docs/cache.md](docs/cache.md#measured) says what bounds each figure."
    )
    lines += ["", *wrapped(text)]
    means = [
        [f"`{op}`", ", ".join(f"{mean:.2f}x {PEERS[peer]}" for peer, mean in peers.items())]
        for op, peers in report["geometric_means"].items()
    ]
    lines += ["", "The geometric means of that run, over its shapes and dtypes:", ""]
    return lines + table(["op", "times faster than"], means)


def layer() -> list[str]:
    return ratios([r for r in load("cpu")["results"] if r["op"] == "layer"])


def accuracy() -> list[str]:
    rows: dict[tuple, dict] = {}
    for r in load("accuracy"):
        rows.setdefault((r["op"], r["quantity"]), {})[r["dtype"]] = f"{r['ours']:.1e} / {r['eager']:.1e}"
    dtypes = ("float64", "float32", "bfloat16", "float16")
    cells = [
        [f"`{op}`", quantity, *(found.get(d, "") for d in dtypes)] for (op, quantity), found in rows.items()
    ]
    return table(["op", "quantity", *dtypes], cells)


def ema_study() -> list[str]:
    rows = []
    for alpha, found in load("ema_study")["alpha"].items():
        for r in found:
            if r["evictions"] in (1, 10, 100, 1000):
                states = [f"{r['state'][name]:.1e}" for name in ("published", "compensated", "float32")]
                cells = [f"{r['no_update']:.1e}", *states, f"{r['slot']['compensated']:.1e}"]
                rows.append([alpha, str(r["evictions"]), *cells, f"{r['published_never_changed']:.0%}"])
    header = [
        "alpha",
        "evictions",
        "no update",
        "published",
        "compensated",
        "float32",
        "read by attention (compensated)",
    ]
    return table([*header, "published: elements never changed"], rows)


def policies() -> list[str]:
    """What each policy does to the student of the embedded world; nothing before it was evaluated."""
    if not (ROOT / "benchmarks/results/policies.json").is_file():
        return ["Not measured yet."]
    report = load("policies")
    measures = (
        *("drift of the colour", "drift of the background", "drift of the sharpness"),
        *("similarity to the first frame", "optical flow", "alive"),
    )
    apart = {d["row"][1]: d["measures"] for d in report["differences"]}
    rows = []
    for row in report["rows"]:
        if "cache bytes" in row:
            beyond = {m: d["beyond noise"] for m, d in apart.get(row["sink"], {}).items()}
            cells = [(row["measures"][m], "\\*" * beyond.get(m, False)) for m in measures]
            numbers = [
                "-" if c["mean"] is None else f"{c['mean']:.3f} ± {c['ci95'] or 0:.3f}{mark}"
                for c, mark in cells
            ]
            time = row.get("chunk time")
            cost = ["-" if time is None else f"{time:.2f}", f"{row['cache bytes'] / 2**20:.1f} MiB"]
            rows.append([f"`{row['sink']}`", *numbers, *cost])
    settings = report["settings"]
    said = f"{settings['frames']} frames of {settings['prompts']} prompts:"
    return [said, "", *table(["policy", *measures, "time of a chunk", "cache"], rows)]


SECTIONS = {
    "README.md": {"aims": aims},
    "docs/cache.md": {"layer": layer},
    "docs/policies.md": {"policies": policies},
    "docs/numerics.md": {"accuracy": accuracy, "ema_study": ema_study},
    **{f"docs/{op}.md": {"speed": lambda op=op: speed_of(op)} for op in OPS},
}


def filled(text: str, sections: dict) -> str:
    """``text`` with what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` replaced."""
    for name, make in sections.items():
        begin, end = f"<!-- begin {name} (benchmarks/fill_readme.py) -->", f"<!-- end {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"expected one section `{name}`, found {len(pattern.findall(text))}")
        body = "\n".join([begin, "", *make(), "", end])
        text = pattern.sub(lambda _, body=body: body, text)
    return text


def stale() -> list[str]:
    """Documents whose sections are not what the reports say."""
    texts = {name: (ROOT / name).read_text() for name in SECTIONS}
    return [name for name, text in texts.items() if filled(text, SECTIONS[name]) != text]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        names = stale()
        print("\n".join(f"{name}: not what benchmarks/results says" for name in names))
        return int(bool(names))
    for name, sections in SECTIONS.items():
        path = ROOT / name
        path.write_text(filled(path.read_text(), sections))
    return 0


if __name__ == "__main__":
    sys.exit(main())
