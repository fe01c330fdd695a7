"""Pictures of a report: the roofline, bars per shape, and curves."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

ATTENTION = "sink_window_attention"
MEMORY_BOUND = ("rope_append", "ema_evict", "dmd_gradient")


COLOURS = ("#1f6feb", "#d4572b", "#5ab56e", "#8a5cd0", "#b0b7c3", "#c99700")


def lines(panels: Iterable[Mapping[str, Any]], to: Path | BinaryIO, *, columns: int = 2) -> None:
    """Small charts side by side, written as PNG.

    A panel has ``series`` (name -> (x, y)), ``xlabel``, ``ylabel``, and may have ``log`` (y axis) and
    ``from_zero``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(panels)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(11, 2.7 * rows), squeeze=False, layout="constrained")
    for at, axis in enumerate(axes.flat):
        if at >= len(panels):
            axis.axis("off")
            continue
        panel = panels[at]
        for colour, (name, (x, y)) in zip(COLOURS, panel["series"].items(), strict=False):
            axis.plot(x, y, color=colour, label=name, linewidth=1.3)
        axis.set(xlabel=panel["xlabel"], ylabel=panel["ylabel"])
        if panel.get("log"):
            axis.set_yscale("log")
        if panel.get("from_zero"):
            axis.set_ylim(0, None)
        if len(panel["series"]) > 1:
            axis.legend(frameon=False, fontsize=7)
    figure.savefig(to, dpi=100, format="png")
    plt.close(figure)


def bars(values: Mapping[str, float], unit: str, to: Path | BinaryIO) -> None:
    """One bar a name, written as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.4 * len(values)), layout="constrained")
    axis.barh(list(values), list(values.values()), color=COLOURS[: len(values)])
    axis.invert_yaxis()
    axis.set(xlabel=unit)
    figure.savefig(to, dpi=100, format="png")
    plt.close(figure)


def timed(report: dict) -> list[dict]:
    return [result for result in report["results"] if "timings" in result]


def title(report: dict, text: str) -> str:
    facts = report["environment"]
    where = facts.get("gpu") or facts.get("cpu")
    note = "" if report["mode"] == "gpu" else f" ({report['mode']}: these numbers mean nothing)"
    return f"{text}\n{where}, torch {facts.get('torch')}, {facts.get('date')}{note}"


def rate(result: dict, name: str, quantity: str) -> float:
    """FLOP/s or bytes/s of a candidate: the job's own count over its median time."""
    return (result[quantity] or 0) / result["timings"][name]["p50"]


def grouped_bars(
    report: dict, results: list[dict], value, unit: str, text: str, path: Path, line=None
) -> None:
    """A group of bars a shape, a colour a candidate; ours, the first, is black."""
    import matplotlib.pyplot as plt

    ours = {next(iter(result["timings"])) for result in results}
    peers = [name for name in dict.fromkeys(n for r in results for n in r["timings"]) if name not in ours]
    colours = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(peers)} | dict.fromkeys(
        ours, "black"
    )
    labels, height = [], 0.0
    figure, axes = plt.subplots(figsize=(11, 1.5 + 0.2 * sum(len(r["timings"]) + 1 for r in results)))
    for result in results:
        labels.append(
            (
                height + len(result["timings"]) / 2 - 0.5,
                f"{result['op']}\n{result['shape']} {result['dtype']}",
            )
        )
        for name in result["timings"]:
            found = value(result, name)
            axes.barh(height, found, color=colours[name], height=0.9)
            axes.text(found, height, f" {found:.3g}", va="center", fontsize=6)
            height += 1
        height += 1
    if line:
        axes.axvline(line, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks([place for place, _ in labels], [label for _, label in labels], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title(report, text), fontsize=8)
    legend = {"ours": "black"} | {name: colours[name] for name in peers}
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in legend.values()]
    axes.legend(handles, legend, fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def roofline(report: dict, path: Path) -> None:
    """Every op with FLOPs and bytes: intensity by its floor of bytes, and what each candidate reached;
    measured ceilings."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6))
    results = [
        r for r in timed(report) if r["op"] in (ATTENTION, *MEMORY_BOUND) and r["flops"] and r["bytes"]
    ]
    ours = True
    for result in results:
        first, *peers = result["timings"]
        intensity = result["flops"] / result["bytes"]
        for name in peers:
            axes.plot(intensity, rate(result, name, "flops"), "x", color="tab:gray", markersize=4)
        label = "ours" if ours else None
        axes.plot(intensity, rate(result, first, "flops"), "o", color="tab:green", markersize=5, label=label)
        ours = False
    for ceiling in report["ceilings"][:1]:
        bandwidth, peak = ceiling["bytes_per_s"], ceiling["flops_per_s"]
        knee = peak / bandwidth
        axes.plot(
            [knee / 1e4, knee, knee * 100], [bandwidth * knee / 1e4, peak, peak], color="black", linewidth=1
        )
        text = (
            f"measured: copy {bandwidth / 1e12:.2f} TB/s, {ceiling['dtype']} matrix product {peak / 1e12:.0f}"
            " TFLOP/s"
        )
        axes.annotate(text, (knee / 50, peak * 1.1), fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte (floor)", ylabel="FLOP/s")
    axes.set_title(title(report, "roofline (grey: peers)"), fontsize=8)
    if results:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def stream(report: dict, results: list[dict], path: Path) -> None:
    """Whole forwards and chunks, and the time of every chunk of a long stream."""
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(
        len(results) + len(report["series"]), 1, figsize=(9, 2.4 * max(len(results), 1) + 3)
    )
    rows = rows if hasattr(rows, "__len__") else [rows]
    for axes, result in zip(rows, results, strict=False):
        times = {name: timing["p50"] * 1e3 for name, timing in result["timings"].items()}
        axes.bar_label(
            axes.barh(list(times), list(times.values())), [f"{t:.1f}" for t in times.values()], fontsize=7
        )
        axes.set_xlabel("ms (median)", fontsize=7)
        axes.set_title(title(report, f"{result['op']}, {result['shape']}"), fontsize=8)
        axes.tick_params(labelsize=7)
    for axes, series in zip(rows[len(results) :], report["series"], strict=True):
        axes.plot([1e3 * value for value in series["values"]], linewidth=0.8)
        axes.set(xlabel="chunk", ylabel="ms", ylim=(0, None))
        axes.set_title(f"{series['what']}, {series['name']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def draw(report: dict, directory: Path) -> list[str]:
    """All pictures for which there are numbers; their names."""
    import matplotlib

    matplotlib.use("Agg")
    results = timed(report)
    attention = [r for r in results if r["op"] == ATTENTION]
    memory = [r for r in results if r["op"] in MEMORY_BOUND]
    whole = [r for r in results if r["op"] not in (ATTENTION, *MEMORY_BOUND, "layer")]
    copy = report["ceilings"][0]["bytes_per_s"] / 1e9 if report["ceilings"] else None
    drawn = []
    if attention:

        def tflops(result, name):
            return rate(result, name, "flops") / 1e12

        grouped_bars(report, attention, tflops, "TFLOP/s", "attention", directory / "attention.png")
        drawn.append("attention.png")
    if memory:

        def gbytes(result, name):
            return rate(result, name, "bytes") / 1e9

        text, path = "memory-bound ops (dashed: copy)", directory / "memory.png"
        grouped_bars(report, memory, gbytes, "GB/s of the floor of bytes", text, path, line=copy)
        drawn.append("memory.png")
    if attention or memory:
        roofline(report, directory / "roofline.png")
        drawn.append("roofline.png")
    if whole or report["series"]:
        stream(report, whole, directory / "stream.png")
        drawn.append("stream.png")
    return drawn


def speedups(report: dict, directory: Path) -> list[Path]:
    """Write ``<op>.png`` for every op of a report of ``python -m benchmarks`` into ``directory``; the
    paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for op in dict.fromkeys(result["op"] for result in report["results"]):
        results = [r for r in report["results"] if r["op"] == op]
        bars = [
            (f"{r['shape']} {r['dtype']}\nvs {peer}", ratio)
            for r in results
            for peer, ratio in r["times_faster_than"].items()
        ]
        labels, ratios = zip(*reversed(bars), strict=True)
        figure, axes = plt.subplots(figsize=(9, 1 + 0.42 * len(bars)), layout="constrained")
        drawn = axes.barh(
            labels, ratios, color=["tab:green" if ratio >= 1 else "tab:red" for ratio in ratios]
        )
        axes.bar_label(drawn, [f"{ratio:.2f}x" for ratio in ratios], padding=3, fontsize=7)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xscale("log")
        axes.set_xlabel("times faster than the peer (ratio of medians, same run)")
        facts = report["environment"]
        axes.set_title(
            f"{op} on {facts['gpu'] or facts['cpu']}, torch {facts['torch']}, {facts['date']}", fontsize=9
        )
        paths.append(directory / f"{op}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths
