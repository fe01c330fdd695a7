"""Bars of a run: how many times faster than each peer, a picture per group of cases."""

from pathlib import Path


def plot(report: dict, directory: Path) -> list[Path]:
    """Write ``<op>.png`` for every op of a report (see ``__main__.py``) into ``directory``; the paths."""
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
        drawn = axes.barh(labels, ratios, color=["tab:green" if ratio >= 1 else "tab:red" for ratio in ratios])
        axes.bar_label(drawn, [f"{ratio:.2f}x" for ratio in ratios], padding=3, fontsize=7)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.tick_params(axis="y", labelsize=7)
        axes.set_xscale("log")
        axes.set_xlabel("times faster than the peer (ratio of medians, same run)")
        facts = report["environment"]
        axes.set_title(f"{op} on {facts['gpu'] or facts['cpu']}, torch {facts['torch']}, {facts['date']}", fontsize=9)
        paths.append(directory / f"{op}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths
