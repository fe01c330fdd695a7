"""What the attention schedule is worth on a Hopper GPU: a cost model, not a measurement.

    python benchmarks/schedule_model.py        # the shapes of the table in docs/sink_window_attention_sm90.md
    python benchmarks/schedule_model.py --all      # 48 shapes and their geometric means

The schedule is the library's own (csrc/math/tile_schedule.h, as the test module `_chip` exposes it); the
costs are stated below, each with its source, and are to be replaced by measured ones. Compared with one query
tile per CTA in waves (what a general kernel does), and with such a kernel that cuts all keys into a fixed
number of splits and merges them in a second launch.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from chip.build import load

SMS = 132  # H100 and H200, SXM
HEAD_DIM = 128
# a busy SM: the rate of FlashAttention-3 at head dim 128 on long sequences (arXiv 2407.08608)
SM_FLOPS = 661e12 / SMS
LAUNCH = 3e-6  # any kernel: start and end
# first product and softmax of a fragment without overlap, epilogue; fits FlashAttention-3 at 2k and 16k keys
FRAGMENT = 1.5e-6
WRITE_PARTIAL = 1.6e-6  # 66 KB out and a release at gpu scope
MERGE_PARTIAL = 1.8e-6  # acquire, and 66 KB in from the L2
SKEW = 0.01  # every seventh SM is slower by this much
SPLIT_FRAGMENT = 1.0e-6  # writing fp32 partials of a split kernel
SPLIT_COMBINE = 3e-6  # its second launch
HBM = 3.35e12 * 0.85  # bytes/s that an H100 delivers
L2 = 40e6  # bytes of K and V that stay in the L2

# The shapes the schedule is for: (queries, heads, keys). A chunk of three frames and of one, all heads on one
# GPU and on four; a 14B model; a chunk of three frames at 720p.
TABLE = (
    (4680, 12, 14040),
    (1560, 12, 14040),
    (4680, 3, 14040),
    (1560, 3, 14040),
    (4680, 40, 14040),
    (10800, 12, 14040),
)
ALL = tuple(itertools.product((1560, 4680, 10800), (3, 6, 12, 40), (9360, 14040, 23400, 32760)))


def plan(queries, heads, keys, deterministic=False):
    return load().schedule(
        head_dim=HEAD_DIM,
        batch_heads=heads,
        q_tokens=queries,
        kv_tokens=keys,
        ctas=SMS,
        deterministic=deterministic,
    )


def unit_seconds(p):
    """One key tile for one query tile on one SM."""
    return 4 * p["tile_m"] * p["tile_n"] * HEAD_DIM / SM_FLOPS


def dram_stall(p, queries, heads, keys):
    """Extra seconds of the part that is cut: there every CTA is elsewhere in the sequence, and K and V that
    do not stay in the L2 are read again by each. Whole waves sweep K and V in step: one read serves them
    all."""
    units = int(p["units"][0])
    left = len(p["units"]) - p["whole_tiles"]
    heads_in_part = min(heads, left / math.ceil(queries / p["tile_m"]) + 1)
    missing = max(0.0, 1 - L2 / (heads_in_part * keys * HEAD_DIM * 4))
    traffic = left * units * 4 * p["tile_n"] * HEAD_DIM * missing
    return max(0.0, traffic / HBM - left * units * unit_seconds(p) / SMS)


def balanced_seconds(p, queries, heads, keys):
    """The schedule, segment by segment: an owner ends after it has merged what the ranges behind it have
    handed over."""
    unit = unit_seconds(p)
    clock = np.zeros(p["ranges"])
    handed_over = {}  # (range, tile) -> time of the signal
    owners = []
    for r, tile, first, count, complete in p["segments"].tolist():
        clock[r] += count * unit * (1 + SKEW * (r % 7 == 0)) + FRAGMENT
        if first > 0:
            clock[r] += WRITE_PARTIAL
            handed_over[r, tile] = clock[r]
        elif not complete:
            owners.append((r, tile))
    for r, tile in owners:
        for (_, t), signal in sorted(handed_over.items()):
            if t == tile:
                clock[r] = max(clock[r], signal) + MERGE_PARTIAL
    return LAUNCH + float(clock.max()) + dram_stall(p, queries, heads, keys)


def one_tile_per_cta_seconds(p):
    units = int(p["units"][0])
    return LAUNCH + math.ceil(len(p["units"]) / SMS) * (units * unit_seconds(p) * (1 + SKEW) + FRAGMENT)


def split_seconds(p, queries, heads, splits):
    """A general kernel with all keys cut into `splits` and a second launch that combines."""
    units = math.ceil(int(p["units"][0]) / splits)
    part = units * unit_seconds(p) * (1 + SKEW) + FRAGMENT + SPLIT_FRAGMENT
    combine = SPLIT_COMBINE + queries * heads * HEAD_DIM * (4 * splits * 2 + 2) / HBM
    return LAUNCH + math.ceil(len(p["units"]) * splits / SMS) * part + combine


def evaluate(queries, heads, keys):
    """Seconds of each way, and what the schedule gains."""
    p = plan(queries, heads, keys)
    fragments = np.bincount(p["segments"][:, 1])
    whole = one_tile_per_cta_seconds(p)
    splits = {s: split_seconds(p, queries, heads, s) for s in (2, 3, 4)}
    ours = balanced_seconds(p, queries, heads, keys)
    tuned = min(whole, *splits.values())
    return {
        "tiles": len(p["units"]),
        "waves": len(p["units"]) / SMS,
        "whole": whole,
        "splits": splits,
        "balanced": ours,
        "deterministic": balanced_seconds(
            plan(queries, heads, keys, deterministic=True), queries, heads, keys
        ),
        "gain": whole / ours,
        "gain_over_tuned": tuned / ours,
        "merges": int((fragments - 1).sum()),
        "fragments": int(fragments.max()),
        "tflops": 4 * queries * heads * keys * HEAD_DIM / ours / 1e12,
    }


def lines(shapes):
    """A markdown table, microseconds."""
    yield (
        "| Nq x heads | Nkv | tiles, waves | one tile a CTA | 2 / 3 / 4 splits | balanced | gain "
        "| over the best split | merges, most per tile | deterministic |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for queries, heads, keys in shapes:
        x = evaluate(queries, heads, keys)
        splits = " / ".join(f"{t * 1e6:.0f}" for t in x["splits"].values())
        yield (
            f"| {queries} x {heads} | {keys} | {x['tiles']}, {x['waves']:.2f} | {x['whole'] * 1e6:.0f} |"
            f" {splits} | {x['balanced'] * 1e6:.0f} | **{x['gain']:.2f}** | **{x['gain_over_tuned']:.2f}** |"
            f" {x['merges']}, {x['fragments'] - 1} | {x['deterministic'] * 1e6:.0f} |"
        )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="48 shapes and their geometric means")
    shapes = ALL if parser.parse_args(arguments).all else TABLE
    print("\n".join(lines(shapes)))
    gains = np.log([[x["gain"], x["gain_over_tuned"]] for x in (evaluate(*s) for s in shapes)])
    mean = np.exp(gains.mean(0))
    print(f"\ngeometric mean: {mean[0]:.3f} over one tile per CTA, {mean[1]:.3f} over the best split count")


if __name__ == "__main__":
    main()
