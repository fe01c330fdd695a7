"""The report of a stream: report.json with every figure, and report.html, one self-contained page with
plots."""

import base64
import html
import io
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

_OURS, _THEIRS, _FLOOR = "#1f6feb", "#b0b7c3", "#5ab56e"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em;
  color: #1c2330; }
h1 { font-size: 1.6em; }
h2 { margin-top: 2em; border-bottom: 1px solid #d8dee8; padding-bottom: .2em; font-size: 1.2em; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { padding: .3em .9em; border-bottom: 1px solid #e4e8ef; text-align: left; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
.facts td:first-child { color: #5b6675; } .note { color: #5b6675; }
"""


def _image(figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _table(header: list[str], rows: list[list], numeric_from: int = 1) -> str:
    def cell(tag, index, value):
        return f"<{tag}{' class=n' if index >= numeric_from else ''}>{html.escape(str(value))}</{tag}>"

    head = "".join(cell("th", i, name) for i, name in enumerate(header))
    body = "".join("<tr>" + "".join(cell("td", i, v) for i, v in enumerate(row)) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _time_plot(chunks) -> str:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2))
    index = [c["index"] for c in chunks]
    left.plot(index, [c["seconds"] for c in chunks], color=_OURS, label="rf_kernels")
    if "published_seconds" in chunks[0]:
        left.plot(index, [c["published_seconds"] for c in chunks], color=_THEIRS, label="published path")
    left.set(xlabel="chunk", ylabel="seconds per chunk", ylim=(0, None))
    left.legend(frameon=False)
    memory = [c["memory_bytes"] / 2**20 for c in chunks]
    right.plot(index, memory, color=_OURS)
    right.set(xlabel="chunk", ylabel="memory of the process, MiB", ylim=(0, 1.2 * max(memory)))
    return _image(figure)


def _agreement_plot(chunks) -> str:
    figure, axis = plt.subplots(figsize=(11, 2.6))
    axis.semilogy(
        [c["index"] for c in chunks], [max(c["relative_l2"], 1e-18) for c in chunks], "o-", ms=3, color=_OURS
    )
    axis.set(xlabel="chunk", ylabel="relative L2")
    return _image(figure)


def _bytes_plot(counts) -> str:
    names, colours = ("published", "ours", "floor"), (_THEIRS, _OURS, _FLOOR)
    figure, axis = plt.subplots(figsize=(8, 1.8))
    axis.barh(names, [counts[n] / 2**20 for n in names], color=colours)
    axis.invert_yaxis()
    axis.set(xlabel="MiB per chunk")
    return _image(figure)


def _html(figures: dict, preview: Path | None) -> str:
    environment, job, chunks = figures["environment"], figures["job"], figures["chunks"]
    parts = [f"<!doctype html><meta charset=utf-8><title>rf_kernels stream</title><style>{_STYLE}</style>"]
    frames = sum(c["frames"] for c in chunks)
    parts.append(f"<h1>{len(chunks)} chunks, {frames} latent frames streamed</h1>")
    facts = {
        "checkpoint": job["checkpoint"],
        "latent": f"{job['height']} x {job['width']}",
        "dtype": job["dtype"],
        "device": job["device"],
    }
    facts |= {k: environment[k] for k in ("gpu", "cpu", "threads", "torch", "version", "commit", "date")}
    stream = job["stream"]
    facts["stream"] = (
        f"chunks of {stream['chunk_frames']} frames, {stream['sink_frames']} sink frames"
        f" ({stream['sink_policy']}, alpha {stream['alpha']}), {stream['local_attn_size']} frames attended,"
        f" steps {list(stream['denoising_step_list'])}"
    )
    parts.append(
        '<table class="facts">'
        + "".join(f"<tr><td>{k}<td>{html.escape(str(v))}" for k, v in facts.items())
        + "</table>"
    )
    if preview is not None:
        picture = base64.b64encode(preview.read_bytes()).decode()
        parts.append(f'<h2>Preview</h2><img alt="preview" src="data:image/png;base64,{picture}">')
    if "agreement" in figures:
        agreement = figures["agreement"]
        parts.append(
            "<h2>Agreement with the published path</h2><p>The published path ran beside the stream, on the"
            " same weights, noise and text. Largest relative L2 of a chunk's latents:"
            f" <b>{agreement['largest_relative_l2']:.2e}</b>. Both paths feed their own output back, so"
            " rounding differences may add up along the stream.</p>" + _agreement_plot(chunks)
        )
    time, memory = figures["time_per_chunk"], figures["memory"]
    parts.append(
        "<h2>Time and memory over the stream</h2><p>Last third over first third of the steady part: time"
        f" <b>{time['ratio']:.2f}</b>, memory <b>{memory['ratio']:.3f}</b>. The cache itself:"
        f" {figures['cache_bytes'] / 2**20:.2f} MiB, allocated once.</p>" + _time_plot(chunks)
    )
    if "agreement" in figures:
        ratio = figures["agreement"]["published_over_ours_seconds"]
        parts.append(
            f"<p>A chunk of the published path takes <b>{ratio:.2f}</b> times as long (median, side by"
            " side).</p>"
        )
    total = sum(figures["phases"].values())
    rows = [
        [n, f"{s / len(chunks) * 1e3:.2f} ms", f"{100 * s / total:.1f} %"]
        for n, s in figures["phases"].items()
    ]
    parts.append("<h2>Time of each phase</h2>" + _table(["phase", "per chunk", "share"], rows))
    rows = []
    for op in figures["ops"]:
        (ours, timing), (peer, other) = list(op["timings"].items())[:2]
        ratio = op["times_faster_than"][peer]
        rows.append(
            [op["op"], f"{timing['p50'] * 1e6:.0f} us", f"{other['p50'] * 1e6:.0f} us", f"{ratio:.2f}x", peer]
        )
    parts.append(
        "<h2>Each op beside the published path</h2><p class=note>Medians, interleaved in one run, at the"
        " shapes of this stream.</p>"
        + _table(["op", "rf_kernels", "peer", "faster", "what the peer is"], rows)
    )
    counts = figures["bytes_per_chunk"]
    parts.append(
        "<h2>Bytes moved by the cache path per chunk</h2><p class=note>Counts, not measurements; projections"
        f" and attention left out. Published over ours: {counts['published / ours']:.1f}; ours over the"
        f" floor: {counts['ours / floor']:.3f}.</p>" + _bytes_plot(counts)
    )
    return "\n".join(parts)


def write_report(figures: dict, folder: Path, preview: Path | None = None) -> list[Path]:
    """Write ``report.json`` and ``report.html`` into ``folder``."""
    paths = [folder / "report.json", folder / "report.html"]
    paths[0].write_text(json.dumps(figures, indent=2) + "\n")
    paths[1].write_text(_html(figures, preview))
    return paths
