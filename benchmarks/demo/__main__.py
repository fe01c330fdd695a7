"""Stream the trained student of the embedded world, one long rollout per sink, and one stream beside the
published path; leaves a film, latents and a report in a folder.

    python -m benchmarks.demo --out out

With `--checkpoint` it streams that model's latents beside the published path instead.
"""

import argparse
import math
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import rf_kernels as rf
from reward_forcing import evaluate, world
from reward_forcing.cli import Parser, add_stream_options, fail, refused, stream_job
from reward_forcing.folder import LATENTS, StreamFolder
from reward_forcing.run import begin

from .film import PROMPTS, stream_sinks, write_film
from .preview import write_preview
from .report import write_report
from .run import run


def parse(arguments=None) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.demo", description=__doc__, allow_abbrev=False)
    side = world.SIZE // world.PATCH
    # float64 beside the published path: a stream feeds itself back, and 300 frames turn the last bit of
    # float32 into another video
    small = {"frames": 300, "height": side, "width": side, "heads": 4, "dtype": "float64", "device": "cpu"}
    add_stream_options(parser, checkpoint=None, shift=2.0, alpha=0.9, **small)
    parser.add_argument(
        "--sinks", nargs="+", default=list(evaluate.SINKS), help="of the film: policies as for --policy"
    )
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
    if options.sink_policy not in ("ema", "static", "none"):
        fail("--policy: expected ema, static or none, whose bytes are counted here; --sinks takes any")
    with ExitStack() as stack:
        film = options.checkpoint is None
        try:
            if film:
                # The student is tiny: a second thread gains nothing. Where other work runs, two of them wait
                # for one another at every operator; chunks then took a hundred times as long.
                stack.callback(torch.set_num_threads, torch.get_num_threads())
                torch.set_num_threads(1)
                options.checkpoint, _ = evaluate.shipped("distill")
                options.context = (
                    Path(stack.enter_context(tempfile.TemporaryDirectory())) / "text.safetensors"
                )
                save_file({"context": world.embed([world.Prompt.parse(PROMPTS[0])])}, options.context)
            # The published path cannot be resumed: a demo starts over, and replaces what an earlier one left.
            folder = stack.enter_context(StreamFolder(options.out, overwrite=True))
            prepared, cache, _ = begin(stream_job(options), folder)
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
            progress=lambda chunks: tqdm(chunks, desc="streaming", unit="chunk", total=total, disable=None),
        )
        latents = load_file(folder.part / LATENTS)["latents"]
        if film:

            def progress(chunks, sink, count):
                return tqdm(chunks, desc=f"sink {sink}", unit="chunk", total=count, disable=None)

            videos, figures["world"] = stream_sinks(tuple(options.sinks), job.frames, progress=progress)
            files = write_film(videos, folder.part)
            figures["world"]["files"] = [path.name for path in files]
            reports = write_report(figures, folder.part)
        else:
            files = write_preview(latents, folder.part)
            reports = write_report(figures, folder.part, files[1])
        written = folder.finish([path.name for path in (*files, *reports)])
    summary(figures)
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
