"""Stream a video's latents from a checkpoint beside the published path; leaves latents, previews and a report
in a folder.

    python -m benchmarks.demo --out out

Without options it streams 42 chunks of the small model that the golden vectors were made with.
"""

import argparse
import math
import sys
from contextlib import ExitStack
from pathlib import Path

from safetensors.torch import load_file
from tqdm import tqdm

import rf_kernels as rf
from reward_forcing.cli import Parser, add_stream_options, fail, refused, stream_job
from reward_forcing.folder import LATENTS, StreamFolder
from reward_forcing.run import begin

from .preview import write_preview
from .report import write_report
from .run import run

_GOLDEN = Path(__file__).resolve().parents[2] / "tests/golden/model_weights.safetensors"


def parse(arguments=None) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.demo", description=__doc__, allow_abbrev=False)
    small = {"frames": 126, "height": 16, "width": 24, "heads": 2, "dtype": "float32", "device": "cpu"}
    add_stream_options(parser, checkpoint=_GOLDEN, **small)
    parser.add_argument(
        "--measure-seconds", type=float, default=1.0, help="time spent on each op beside its peer"
    )
    parser.add_argument(
        "--no-compare", action="store_true", help="do not run the published path beside the stream"
    )
    return parser.parse_args(arguments)


def summary(figures: dict) -> None:
    if "agreement" in figures:
        agreement = figures["agreement"]
        worst = f"{agreement['largest_relative_l2']:.2e} over {len(figures['chunks'])} chunks"
        print(f"agreement with the published path: relative L2 at most {worst}")
        print(
            f"a chunk of the published path takes {agreement['published_over_ours_seconds']:.2f} times as"
            " long"
        )
    print(
        f"time per chunk, last third over first third: {figures['time_per_chunk']['ratio']:.2f}; "
        f"memory: {figures['memory']['ratio']:.3f}; bytes of the cache path, published over ours: "
        f"{figures['bytes_per_chunk']['published / ours']:.1f}"
    )


def main(arguments=None) -> int:
    options = parse(arguments)
    with ExitStack() as stack:
        try:
            # The published path cannot be resumed: a demo starts over, and replaces what an earlier one left.
            folder = stack.enter_context(StreamFolder(options.out, overwrite=True))
            prepared, cache = begin(stream_job(options), folder)
        except rf.ArgumentError as error:
            fail(refused(error))
        job = prepared.job
        total = math.ceil(job.frames / job.stream.chunk_frames)
        figures = run(
            prepared,
            cache,
            folder,
            # the published path has no other sink
            compare=not options.no_compare and job.stream.sink_policy == "ema",
            measure_seconds=options.measure_seconds,
            progress=lambda chunks: tqdm(chunks, desc="streaming", unit="chunk", total=total),
        )
        previews = write_preview(load_file(folder.part / LATENTS)["latents"], folder.part)
        reports = write_report(figures, folder.part, previews[1])
        written = folder.finish([path.name for path in (*previews, *reports)])
    summary(figures)
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
