"""Other choices for the Hopper attention kernel, as edits of its sources: what to try on a GPU, one change at
a time.

The kernel itself carries no switches. `build_variants.py` compiles each variant into a library of its own,
the stage `tuning` of benchmarks.gpu_suite times them all in one run, and docs/tuning.md holds what was
expected of each. Those marked `on_model` change code that the functional model runs: `python variants.py ROOT
OUT` writes their sources for tests/chip, where each must compute attention.
"""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import source_edits

MAINLOOP = "csrc/sink_window_attention/sm90/mainloop.h"
KERNEL = "csrc/sink_window_attention/sm90/kernel.h"
CONFIG = "csrc/sink_window_attention/sm90/config.h"
SCHEDULE = "csrc/math/tile_schedule.h"
SOFTMAX = "csrc/math/online_softmax.h"
WGMMA = "csrc/arch/wgmma.h"
TMA = "csrc/arch/tma.h"
TENSOR_MAP = "csrc/arch/tensor_map.h"


class Variant(NamedTuple):
    name: str
    edits: dict  # file -> ((before, after), ...)
    on_model: bool = True


def tile_n(keys: int) -> dict:
    """Another key tile at head dim 128; 176 is the kernel's own."""
    atoms = (
        "RF_WGMMA_ATOMS(bf16, 176, BF16)",
        f"RF_WGMMA_ATOMS(bf16, 176, BF16) RF_WGMMA_ATOMS(bf16, {keys}, BF16)",
    )
    half = "RF_WGMMA_ATOMS(f16, 176, F16)", f"RF_WGMMA_ATOMS(f16, 176, F16) RF_WGMMA_ATOMS(f16, {keys}, F16)"
    config = "{128, 2, 176, 2, 40, 232, 0}", f"{{128, 2, {keys}, 2, 40, 232, 0}}"
    return {CONFIG: (config,)} | ({} if keys == 128 else {WGMMA: (atoms, half)})


VARIANTS = (
    Variant("as_built", {}),
    # ---- main loop
    Variant(
        "no_turns",
        {
            MAINLOOP: ((" take_turn(w);", ""), (" pass_turn(w);", "")),
            KERNEL: (("if (w == 0) Mainloop::pass_turn(Traits::kWarpgroups - 1);", ""),),
        },
    ),
    Variant("no_overlap", {MAINLOOP: (("wgmma_wait<1>();", "wgmma_wait<0>();"),)}),
    Variant("no_order", {MAINLOOP: (("order_before(f.row[0].sum + f.row[1].sum);", ""),)}),
    Variant("rescale_at_once", {SOFTMAX: (("kSoftmaxSlack = 8.f;", "kSoftmaxSlack = 0.f;"),)}),
    Variant("rescale_always", {MAINLOOP: (("const bool exceeds =", "const bool exceeds = true ||"),)}),
    *(
        Variant(
            f"polynomial_{blocks}_of_8",
            {
                CONFIG: (
                    ("2, 40, 232, 0}", f"2, 40, 232, {blocks}}}"),
                    ("2, 32, 160, 0}", f"2, 32, 160, {blocks}}}"),
                )
            },
        )
        for blocks in (1, 2)
    ),
    Variant("tile_n_128", tile_n(128)),
    Variant("tile_n_160", tile_n(160)),
    Variant("tile_n_192", tile_n(192)),
    # ---- caches
    Variant("kv_evict_normal", {TMA: (("CacheHintSm90::EVICT_LAST", "CacheHintSm90::EVICT_NORMAL"),)}, False),
    Variant("q_evict_normal", {TMA: (("CacheHintSm90::EVICT_FIRST", "CacheHintSm90::EVICT_NORMAL"),)}, False),
    Variant(
        "l2_promotion_256",
        {TENSOR_MAP: (("CU_TENSOR_MAP_L2_PROMOTION_L2_128B", "CU_TENSOR_MAP_L2_PROMOTION_L2_256B"),)},
        False,
    ),
    Variant(
        "l2_promotion_none",
        {TENSOR_MAP: (("CU_TENSOR_MAP_L2_PROMOTION_L2_128B", "CU_TENSOR_MAP_L2_PROMOTION_NONE"),)},
        False,
    ),
    # ---- schedule
    Variant(
        "split_everything",
        {SCHEDULE: (("const int full_waves = tiles / ranges;", "const int full_waves = 0;"),)},
    ),
    Variant("fragments_4", {SCHEDULE: (("int max_fragments = 8;", "int max_fragments = 4;"),)}),
    Variant("fragments_16", {SCHEDULE: (("int max_fragments = 8;", "int max_fragments = 16;"),)}),
    Variant("fragment_units_4", {SCHEDULE: (("int min_fragment = 2;", "int min_fragment = 4;"),)}),
)


def write(root: Path, out: Path, variants=VARIANTS) -> None:
    for variant in variants:
        (out / variant.name).mkdir(parents=True, exist_ok=True)
        source_edits.write(root, out / variant.name, variant.edits, f"variant {variant.name}")


if __name__ == "__main__":
    on_model = [v for v in VARIANTS if v.on_model and v.edits]
    write(Path(sys.argv[1]), Path(sys.argv[2]), on_model)
    print(";".join(v.name for v in on_model))
