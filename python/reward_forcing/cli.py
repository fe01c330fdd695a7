"""`reward-forcing`: stream a video's latents from a checkpoint, beside the published path, and report what was found."""

import argparse
import sys
from pathlib import Path

import torch

from .config import StreamConfig

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The weights that the golden vectors were made with: a small random model in the published format.
_DEMO_CHECKPOINT = Path("tests/golden/model_weights.safetensors")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reward-forcing", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("stream", "stream --frames latent frames from a checkpoint"),
        ("demo", "stream 42 chunks of the small model that the golden vectors were made with"),
    ):
        command = commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        demo = name == "demo"
        command.add_argument(
            "--checkpoint",
            type=Path,
            required=not demo,
            default=_DEMO_CHECKPOINT if demo else None,
            help=".safetensors or .pt",
        )
        command.add_argument(
            "--frames", type=int, required=not demo, default=126 if demo else None, help="latent frames"
        )
        command.add_argument("--height", type=int, default=16 if demo else 60, help="latent rows")
        command.add_argument("--width", type=int, default=24 if demo else 104, help="latent columns")
        command.add_argument(
            "--heads", type=int, default=2 if demo else None, help="attention heads, where the tensors do not tell"
        )
        command.add_argument(
            "--context", type=Path, help="safetensors file with text features named `context`; default: random"
        )
        command.add_argument("--out", type=Path, default=Path("out"), help="folder for latents, preview and report")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--dtype", choices=sorted(_DTYPES), default="float32" if demo else "bfloat16")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() and not demo else "cpu")
        command.add_argument("--chunk-frames", type=int, default=3)
        command.add_argument("--sink-frames", type=int, default=3)
        command.add_argument(
            "--window", type=int, default=9, dest="local_attn_size", help="frames attended, the sink included"
        )
        command.add_argument("--sink-policy", choices=("ema", "static", "none"), default="ema")
        command.add_argument("--sink-state", choices=("compensated", "float32", "published"), default="compensated")
        command.add_argument("--alpha", type=float, default=0.999)
        command.add_argument(
            "--steps", type=int, nargs="+", default=[1000, 750, 500, 250], help="nominal denoising steps"
        )
        command.add_argument("--shift", type=float, default=5.0, help="timestep shift")
        command.add_argument("--measure-seconds", type=float, default=1.0, help="time spent on each op beside its peer")
        command.add_argument(
            "--no-compare", action="store_true", help="do not run the published path beside the stream"
        )
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    from safetensors.torch import save_file
    from tqdm import tqdm

    from .demo.job import StreamJob, run
    from .demo.preview import write_preview
    from .demo.report import write_report

    try:
        stream = StreamConfig(
            chunk_frames=arguments.chunk_frames,
            sink_frames=0 if arguments.sink_policy == "none" else arguments.sink_frames,
            local_attn_size=arguments.local_attn_size,
            alpha=arguments.alpha,
            sink_policy=arguments.sink_policy,
            sink_state=arguments.sink_state,
            denoising_step_list=tuple(arguments.steps),
            shift=arguments.shift,
        )
        job = StreamJob(
            checkpoint=arguments.checkpoint, frames=arguments.frames, height=arguments.height, width=arguments.width,
            heads=arguments.heads, context=arguments.context, seed=arguments.seed, dtype=_DTYPES[arguments.dtype],
            device=arguments.device, compare=not arguments.no_compare and arguments.sink_policy == "ema", stream=stream,
            measure_seconds=arguments.measure_seconds,
        )  # fmt: skip
        arguments.out.mkdir(parents=True, exist_ok=True)
        latents, figures = run(job, progress=lambda chunks: tqdm(chunks, desc="streaming", unit="chunk"))
    except (ValueError, FileNotFoundError) as error:
        print(f"reward-forcing: {error}", file=sys.stderr)
        return 2
    save_file({"latents": latents}, str(arguments.out / "latents.safetensors"))
    previews = write_preview(latents, arguments.out)
    reports = write_report(figures, arguments.out, previews[1])
    if "agreement" in figures:
        agreement = figures["agreement"]
        worst = f"{agreement['largest_relative_l2']:.2e} over {len(figures['chunks'])} chunks"
        print(f"agreement with the published path: relative L2 at most {worst}")
        print(f"a chunk of the published path takes {agreement['published_over_ours_seconds']:.2f} times as long")
    print(
        f"time per chunk, last third over first third: {figures['time_per_chunk']['ratio']:.2f}; "
        f"memory: {figures['memory']['ratio']:.3f}; bytes of the cache path, published over ours: "
        f"{figures['bytes_per_chunk']['published / ours']:.1f}"
    )
    for path in (arguments.out / "latents.safetensors", *previews, *reports):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
