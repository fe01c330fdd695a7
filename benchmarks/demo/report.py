"""The report of a stream: report.json with every figure, and report.html, one self-contained page with
plots."""

import base64
import html
import io
import json
from pathlib import Path

from benchmarks import plots

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


def _image(draw, *arguments, **options) -> str:
    """What a function of ``benchmarks.plots`` draws, inside the page."""
    buffer = io.BytesIO()
    draw(*arguments, buffer, **options)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _table(header: list[str], rows: list[list], numeric_from: int = 1) -> str:
    def cell(tag, index, value):
        return f"<{tag}{' class=n' if index >= numeric_from else ''}>{html.escape(str(value))}</{tag}>"

    head = "".join(cell("th", i, name) for i, name in enumerate(header))
    body = "".join("<tr>" + "".join(cell("td", i, v) for i, v in enumerate(row)) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _time_plot(chunks) -> str:
    index = [c["index"] for c in chunks]
    seconds = {"rf_kernels": (index, [c["seconds"] for c in chunks])}
    if "published_seconds" in chunks[0]:
        seconds["published path"] = (index, [c["published_seconds"] for c in chunks])
    memory = {"": (index, [c["memory_bytes"] / 2**20 for c in chunks])}
    axes = {"xlabel": "chunk", "from_zero": True}
    panels = [{"series": seconds, "ylabel": "seconds per chunk", **axes}]
    panels += [{"series": memory, "ylabel": "memory of the process, MiB", **axes}]
    return _image(plots.lines, panels)


def _agreement_plot(chunks) -> str:
    series = {"": ([c["index"] for c in chunks], [max(c["relative_l2"], 1e-18) for c in chunks])}
    return _image(plots.lines, [{"series": series, "xlabel": "chunk", "ylabel": "relative L2", "log": True}])


def _bytes_plot(counts) -> str:
    return _image(plots.bars, {n: counts[n] / 2**20 for n in ("published", "ours", "floor")}, "MiB per chunk")


def _world(world: dict, folder: Path) -> list[str]:
    """The trained student under every sink: the film, the curves, the table."""
    film = base64.b64encode((folder / world["files"][1]).read_bytes()).decode()
    parts = [
        f"<h2>The trained student under {len(world['sinks'])} sinks</h2>"
        f"<p>{world['frames']} latent frames from the same noise and prompts; it was trained on clips of"
        f" {world['trained_frames']}. One column a sink, one row a prompt. <b>{world['files'][0]}</b> is the"
        f' same at full size.</p><img alt="film" src="data:image/gif;base64,{film}">',
        f"<p class=note>Curves and table: means over {len(world['prompts'])} prompts. Rendered clips of the"
        " same prompts are called real. Speed is corrected for flicker. `reward-forcing evaluate` gives these"
        " measures over more prompts, with confidence intervals.</p>",
    ]
    first = next(iter(world["curves"].values()))
    panels = [
        {
            "series": {name: (curve["frame"][key], curve[key]) for name, curve in world["curves"].items()},
            "xlabel": "frame",
            "ylabel": key,
        }
        for key in first["frame"]
    ]
    parts.append(_image(plots.lines, panels))
    keys = list(next(iter(world["measures"].values())))
    rows = [
        [key, *(f"{m[key]['mean']:.3f} ± {m[key]['ci95']:.3f}" for m in world["measures"].values())]
        for key in keys
    ]
    rows.append(
        ["ms per chunk", "", *(f"{1e3 * s['seconds_per_chunk']:.0f}" for s in world["sinks"].values())]
    )
    rows.append(["cache, MiB", "", *(f"{s['cache_bytes'] / 2**20:.2f}" for s in world["sinks"].values())])
    rows.append(
        [
            "memory, last third over first",
            "",
            *(f"{s['memory']['ratio']:.3f}" for s in world["sinks"].values()),
        ]
    )
    parts.append(_table(["", *world["measures"]], rows))
    return parts


def _html(figures: dict, folder: Path, preview: Path | None) -> str:
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
    if "world" in figures:
        parts += _world(figures["world"], folder)
        parts.append("<h1>One stream beside the published path</h1>")
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
    paths[1].write_text(_html(figures, folder, preview))
    return paths
