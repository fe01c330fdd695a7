"""Faults planted in the real kernel: one small edit each, and the case that must show it.

`python faults.py ROOT OUT` writes the edited headers to OUT/<name>/csrc/... and prints the names (CMake
compiles them, see CMakeLists.txt). An edit whose text is not found exactly once is an error: the list cannot
silently go stale.
"""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "tuning"))
import source_edits

MAINLOOP = "csrc/sink_window_attention/sm90/mainloop.h"
EPILOGUE = "csrc/sink_window_attention/sm90/epilogue.h"
KERNEL = "csrc/sink_window_attention/sm90/kernel.h"
TRAITS = "csrc/sink_window_attention/sm90/traits.h"
CONFIG = "csrc/sink_window_attention/sm90/config.h"
RANGE = "csrc/math/tile_range.h"
SCHEDULE = "csrc/math/tile_schedule.h"
SOFTMAX = "csrc/math/online_softmax.h"
OPERAND = "csrc/arch/operand.h"
MODEL_VEC = "tests/chip/model/csrc/arch/vec.h"


class Fault(NamedTuple):
    name: str
    file: str
    edits: tuple  # (before, after) pairs
    case: str = "split"


def fault(name, file, before, after, case="split"):
    return Fault(name, file, ((before, after),), case)


FAULTS = (
    # ---- waits
    fault(
        "no_wait_k",
        MAINLOOP,
        "[&](int i) { mbarrier_wait(&smem.k_full[stage(i)], phase(i)); }",
        "[&](int) {}",
    ),
    fault(
        "no_wait_v",
        MAINLOOP,
        "[&](int i) { mbarrier_wait(&smem.v_full[stage(i)], phase(i)); }",
        "[&](int) {}",
    ),
    fault("no_wait_q", MAINLOOP, "mbarrier_wait(&smem.q_full[w], q_phase);", ""),
    fault("no_wait_kv_empty", MAINLOOP, "mbarrier_wait(empty, phase(it) ^ 1);", ""),
    fault("no_wait_q_empty", MAINLOOP, "mbarrier_wait(&smem.q_empty[w], phase);", "", "queue"),
    fault("scores_read_in_flight", MAINLOOP, "wgmma_wait<1>();", "wgmma_wait<2>();"),
    fault(
        "probs_written_in_flight",
        MAINLOOP,
        "order_before(f.row[0].sum + f.row[1].sum);",
        "to_operand(s, probs);",
    ),
    fault(
        "outputs_read_in_flight",
        MAINLOOP,
        "wgmma_wait<0>(); pin_registers(f.o); pin_registers(s);",
        "pin_registers(f.o); pin_registers(s);",
    ),
    fault("no_wgmma_fence", MAINLOOP, "pin_registers(o);\n    wgmma_fence();", "pin_registers(o);"),
    # ---- releases
    Fault(
        "early_release_k",
        MAINLOOP,
        (
            ("release(&smem.k_empty[stage(it + 1)]);", ""),
            ("wgmma_wait<1>();", "release(&smem.k_empty[stage(it + 1)]); wgmma_wait<1>();"),
        ),
    ),
    Fault(
        "early_release_v",
        MAINLOOP,
        (
            ("pin_registers(s);\n        release(&smem.v_empty[stage(it)]);", "pin_registers(s);"),
            ("order_before(", "release(&smem.v_empty[stage(it)]); order_before("),
        ),
    ),
    Fault(
        "early_release_q",
        MAINLOOP,
        (
            ("if (n == last) release(&smem.q_empty[w]);", ""),
            ("KeyRun next = ", "release(&smem.q_empty[w]); KeyRun next = "),
        ),
        "queue",
    ),
    fault(
        "no_release_v",
        MAINLOOP,
        "pin_registers(s);\n        release(&smem.v_empty[stage(it)]);",
        "pin_registers(s);",
    ),
    fault("no_turn_passed", MAINLOOP, "pass_turn(w);\n        wgmma_wait<1>", "wgmma_wait<1>"),
    # ---- barriers, stages, bytes
    fault("wrong_phase", MAINLOOP, "return (it >> 1) & 1;", "return ((it + 1) >> 1) & 1;"),
    fault(
        "wrong_stage",
        MAINLOOP,
        "int stage(int it) { return it & 1; }",
        "int stage(int it) { return it % 3 & 1; }",
    ),
    fault("q_phase_kept", MAINLOOP, "q_phase ^= 1;", "", "queue"),
    fault(
        "too_few_bytes",
        MAINLOOP,
        "mbarrier_arrive_expect(full, Traits::kKvBytes);",
        "mbarrier_arrive_expect(full, Traits::kKvBytes - 128);",
    ),
    fault(
        "too_many_bytes",
        MAINLOOP,
        "mbarrier_arrive_expect(&smem.q_full[w], Traits::kQBytes);",
        "mbarrier_arrive_expect(&smem.q_full[w], Traits::kQBytes + 128);",
    ),
    fault(
        "too_few_arrivals",
        KERNEL,
        "mbarrier_init(&smem.k_empty[s], Traits::kConsumerWarps);",
        "mbarrier_init(&smem.k_empty[s], Traits::kConsumerWarps - 1);",
        "queue",
    ),
    fault("no_init_fence", KERNEL, "fence_mbarrier_init();", ""),
    fault("registers_not_given", KERNEL, "decrease_registers<Traits::kProducerRegisters>();", ""),
    # ---- operands
    fault("wrong_k_step", MAINLOOP, "Traits::kTileN * 128 + i % 4 * 32", "Traits::kTileN * 128 + i % 4 * 16"),
    fault("wrong_v_step", MAINLOOP, "desc_v.at(i * 16 * 128)", "desc_v.at(i * 8 * 128)"),
    fault(
        "wrong_block_stride",
        MAINLOOP,
        "operand_mn_major(v, Traits::kTileN * 128)",
        "operand_mn_major(v, 64 * 128)",
    ),
    fault(
        "wrong_swizzle",
        OPERAND,
        "(kSwizzleAtomBytes >> 4) | (1u << 30);",
        "(kSwizzleAtomBytes >> 4) | (2u << 30);",
    ),
    fault("wrong_q_rows", MAINLOOP, "work.row + 64 * w", "work.row + 32 * w"),
    fault("wrong_kv_head", TRAITS, "w.head / p.heads_per_kv_head", "w.head % p.heads_per_kv_head", "grouped"),
    # ---- softmax
    fault("no_mask", MAINLOOP, "if (run.valid < Traits::kTileN) mask_columns(s, run.valid, t);", ""),
    fault("mask_off_by_one", MAINLOOP, "valid - (t % 4) * 2;", "valid + 1 - (t % 4) * 2;"),
    fault("no_rescale", MAINLOOP, "if (exceeds) rescale(f.o, softmax);\n      }\n", "}\n", "rising"),
    fault("no_vote", MAINLOOP, "any_in_warp(softmax_exceeds", "(softmax_exceeds", "rising"),
    fault(
        "maximum_of_half_a_row",
        MAINLOOP,
        "largest[r] = max2(largest[r], shuffle_xor(largest[r], 2));",
        "",
        "rising",
    ),
    fault(
        "base_not_raised",
        MAINLOOP,
        "softmax.base[r] = softmax_base(row[r].reference);",
        "if (softmax.factor[r] == 0.f) softmax.base[r] = softmax_base(row[r].reference);",
        "rising",
    ),
    fault(
        "reference_never_raised",
        SOFTMAX,
        "!(score * scale - row.reference <= kSoftmaxSlack)",
        "!(score * scale - row.reference <= 1e30f)",
        "rising",
    ),
    fault("sum_of_half_a_row", MAINLOOP, "f.row[r].sum += shuffle_xor(f.row[r].sum, 2);", ""),
    fault("sum_not_rescaled", SOFTMAX, "row.sum *= factor;", "", "rising"),
    # ---- ranges
    fault("row_off_by_one", RANGE, "(units - 1 - from) * tile_n;", "(units - 1 - from) * tile_n + 1;"),
    fault("tile_off_by_one", RANGE, "keys.begin + (units - 1 - from)", "keys.begin + (units - from)"),
    fault(
        "window_off_by_one",
        RANGE,
        "chunk_end - num_window_tokens);",
        "chunk_end - num_window_tokens + 1);",
        "whole",
    ),
    fault(
        "sink_rows_forgotten",
        RANGE,
        "return {{window_begin, chunk_end}, {0, sink_end}};",
        "return {{window_begin, chunk_end}, {0, 0}};",
        "whole",
    ),
    fault("rows_of_next_chunk", EPILOGUE, "row < work.row_end", "row < p.q_tokens", "whole"),
    fault("rows_beyond_queries", EPILOGUE, "row < work.row_end", "true"),
    fault(
        "keys_beyond_prefix",
        CONFIG,
        "p.v_strides, p.kv_tokens, p.kv_heads",
        "p.v_strides, p.kv_tokens + 8, p.kv_heads",
    ),
    fault(
        "last_contributor_forgotten",
        SCHEDULE,
        "return range < s.ranges && s.cut[range].tile == tile;",
        "return range + 1 < s.ranges && s.cut[range].tile == tile;",
        "many",
    ),
    # ---- rows of their own
    fault(
        "rows_not_cleared", MAINLOOP, "clear_rows(smem.v[stage(it)], run.valid,", "static_cast<void>(", "rows"
    ),
    fault(
        "rows_cleared_from_the_next",
        MAINLOOP,
        "int i = valid * 8 + thread;",
        "int i = valid * 8 + 8 + thread;",
        "rows",
    ),
    fault(
        "rows_half_cleared",
        MAINLOOP,
        "i < Traits::kTileN * 8; i += kThreads)",
        "i < Traits::kTileN * 8; i += 2 * kThreads)",
        "rows",
    ),
    fault("rows_without_fence", MAINLOOP, "fence_proxy_async_shared();", "", "rows"),
    fault("rows_without_barrier", MAINLOOP, "named_barrier_sync(kRowsCleared, kThreads);", "", "rows"),
    fault("rows_of_another_sample", TRAITS, "p.row_kv_tokens + w.batch", "p.row_kv_tokens", "rows"),
    fault(
        "rows_beyond_the_capacity",
        TRAITS,
        "min_of(max_of(tokens, 0), p.map.kv_tokens)",
        "max_of(tokens, 0)",
        "rows",
    ),
    fault("rows_count_from_the_capacity", TRAITS, "w.first + w.count - empty", "w.first + w.count", "rows"),
    fault("rows_phase_of_empty_segments", KERNEL, "if (work.count == 0) q_phase ^= 1;", ";", "rows"),
    fault("rows_empty_segments_load", MAINLOOP, "if (work.count == 0) continue;", ";", "rows"),
    fault("bias_of_the_first_tile", MAINLOOP, "bias -= Traits::kTileN", "bias", "bias"),
    fault("bias_of_another_column", MAINLOOP, "run.row + t % 4 * 2;", "run.row;", "bias"),
    fault(
        "bias_of_another_sample", MAINLOOP, "work.batch * p.kv_bias_stride", "0 * p.kv_bias_stride", "bias"
    ),
    fault(
        "bias_in_other_units", TRAITS, "k.bias_scale = 1.f / p.softmax_scale;", "k.bias_scale = 1.f;", "bias"
    ),
    fault("bias_beyond_the_end", MAINLOOP, "if (8 * i + c < limit) {", "{", "bias"),
    # ---- merge
    fault(
        "signal_without_release",
        MODEL_VEC,
        "chip::flag_store(flag, 1, /*release=*/true)",
        "chip::flag_store(flag, 1, false)",
    ),
    fault(
        "wait_without_acquire",
        MODEL_VEC,
        "chip::flag_wait(flag, /*acquire=*/true)",
        "chip::flag_wait(flag, false)",
    ),
    fault("no_warp_barrier", EPILOGUE, "sync_warp();  // puts", "// puts"),
    fault(
        "merged_once",
        KERNEL,
        "if (has_work(p.schedule, x)) Epilogue::merge(p, x, warp, lane, fragment);",
        "{ Epilogue::merge(p, x, warp, lane, fragment); break; }",
        "many",
    ),
    fault("merged_unscaled", EPILOGUE, "o = o * factor[e >> 1].own +", "o = o +", "many"),
    fault(
        "one_ticket_for_all",
        KERNEL,
        "p.ticket == nullptr ? block_index() :",
        "p.ticket == nullptr ? 0 :",
        "queue3",
    ),
    fault(
        "ranges_in_starting_order",
        KERNEL,
        "p.schedule.ranges - 1 - warp_uniform(",
        "warp_uniform(",
        "one_resident",
    ),
)


def write(root: Path, out: Path) -> None:
    for f in FAULTS:
        source_edits.write(root, out / f.name, {f.file: f.edits}, f"planted fault {f.name}")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
    print(";".join(f.name for f in FAULTS))
