// Which units of work a CTA does: pure integer arithmetic, shared by kernel, host planner and tests.
//
// A persistent grid of CTAs works through all query tiles. Whole waves come first and are dealt whole (CTA r
// takes tiles r, r + ranges, ...): the CTAs of a wave sweep the same keys in step, so the L2 serves them from
// one DRAM read. The units of the tiles that are left are cut into one contiguous range per CTA, such that
// all CTAs end with the same number of units. The cuts are a table in the kernel's parameters: the device
// neither divides nor knows the rule.
#pragma once

#include <cstdint>

#include "csrc/math/tile_range.h"

namespace rf {

// A position in the work: `unit` key tiles of query tile `tile` lie before it. Canonical: unit < units of the
// tile.
struct Cut {
  int tile, unit;
  RF_HD bool before(const Cut& other) const {
    return tile < other.tile || (tile == other.tile && unit < other.unit);
  }
};

struct TileSchedule {
  static constexpr int kMaxRanges = 160;  // more CTAs than any sm_90 has SMs
  int ranges;                             // CTAs
  int whole_tiles;                        // tiles [0, whole_tiles) are dealt whole
  Cut cut[kMaxRanges + 1];                // range r does [cut[r], cut[r + 1]) of the tiles that are left

  // Whether any tile is shared by ranges: they then need memory to hand partial results over.
  bool cuts_tiles() const {
    for (int r = 1; r < ranges; ++r)
      if (cut[r].unit != 0) return true;
    return false;
  }
};

// Units [first, min(limit, units of the tile)) of a tile. The range that holds unit 0 owns the tile: it
// merges and writes it.
struct Segment {
  int tile, first, limit;
  RF_HD bool owner() const { return first == 0; }
};

// A range's segments in the order of execution: its whole tiles, then its part of the rest. There, a fragment
// owed to another range can only be the first and a fragment that waits for others only the last: every CTA
// signals before it waits.
struct SegmentWalk {
  int range;
  Cut at;  // all there is to remember: a kernel keeps it in registers over its main loop

  RF_HD SegmentWalk(const TileSchedule& s, int r) : range(r), at(r < s.whole_tiles ? Cut{r, 0} : s.cut[r]) {}

  // False when the range is done.
  RF_HD bool current(const TileSchedule& s, Segment& segment) const {
    constexpr int kToTheEnd = 1 << 30;
    const Cut end = s.cut[range + 1];
    const bool whole = at.tile < s.whole_tiles;
    segment = {at.tile, at.unit, !whole && at.tile == end.tile ? end.unit : kToTheEnd};
    return whole || at.before(end);
  }
  RF_HD void advance(const TileSchedule& s) {
    if (at.tile >= s.whole_tiles) {
      at = {at.tile + 1, 0};
    } else {
      at.tile += s.ranges;
      if (at.tile >= s.whole_tiles) at = s.cut[range];
    }
  }
};

// Ranges range + 1, ... contribute to the tile that `range` owns while this holds; empty ranges in between
// contribute nothing.
RF_HD bool contributes(const TileSchedule& s, int range, int tile) {
  return range < s.ranges && s.cut[range].tile == tile;
}
RF_HD bool has_work(const TileSchedule& s, int range) {
  return s.cut[range].before(s.cut[range + 1]);
}

struct ScheduleOptions {
  int ctas;               // SMs, at most kMaxRanges
  int min_fragment = 2;   // units: a shorter piece of a tile costs more in merging than it balances
  int max_fragments = 8;  // about so many CTAs share a tile at most: its owner merges one after the other
  bool deterministic =
      false;  // no tile is cut: the bits of a result depend on its keys alone, not on the grid
};

namespace detail {
struct Planner {
  const TileMap& map;
  int tile_m, tile_n;

  int units_of_chunk(int chunk) const { return map.keys(chunk).units(tile_n); }

  // Units that each range gets when tiles [0, whole) are dealt whole; returns their sum.
  int64_t deal(int whole, int ranges, int64_t* dealt) const {
    for (int r = 0; r < ranges; ++r) dealt[r] = 0;
    int64_t sum = 0;
    for (int chunk = map.chunks - 1, begin = 0; chunk >= 0 && begin < whole; --chunk) {
      const int end = min_of(begin + map.chunk_tiles(chunk, tile_m), whole), units = units_of_chunk(chunk);
      for (int r = 0; r < ranges; ++r) {  // tiles t of [begin, end) with t % ranges == r
        const int below_end = (end - r + ranges - 1) / ranges,
                  below_begin = begin > r ? (begin - r + ranges - 1) / ranges : 0;
        const int64_t mine = end > r ? int64_t{below_end - below_begin} * units : 0;
        dealt[r] += mine;
        sum += mine;
      }
      begin = end;
    }
    return sum;
  }

  // Cut after `units` more units from `from`.
  Cut advance(Cut from, int64_t units, int tiles) const {
    while (from.tile < tiles) {
      const int in_tile = units_of_chunk(locate(map, from.tile, tile_m).chunk);
      if (from.unit + units < in_tile) return {from.tile, static_cast<int>(from.unit + units)};
      units -= in_tile - from.unit;
      from = {from.tile + 1, 0};
    }
    return {tiles, 0};
  }

  // No fragment shorter than min_fragment: a cut that close to a tile's edge moves to the edge.
  Cut snap(Cut c, int min_fragment, int tiles) const {
    if (c.tile >= tiles || c.unit == 0) return c;
    if (c.unit < min_fragment) return {c.tile, 0};
    if (units_of_chunk(locate(map, c.tile, tile_m).chunk) - c.unit < min_fragment) return {c.tile + 1, 0};
    return c;
  }
};
}  // namespace detail

inline TileSchedule plan_schedule(const TileMap& map, int tile_m, int tile_n,
                                  const ScheduleOptions& options) {
  const detail::Planner planner{map, tile_m, tile_n};
  const int tiles = map.tiles(tile_m);
  int64_t dealt[TileSchedule::kMaxRanges];

  int64_t total = 0;
  for (int c = 0; c < map.chunks; ++c)
    total += int64_t{map.chunk_tiles(c, tile_m)} * planner.units_of_chunk(c);
  const int64_t tile_units = planner.units_of_chunk(map.chunks - 1);  // of the costliest tile
  const int64_t min_share =
      max_of(options.min_fragment, ceil_div(static_cast<int>(tile_units), options.max_fragments));
  const int64_t useful = options.deterministic ? tiles : total / min_share;
  int ranges = min_of(options.ctas, TileSchedule::kMaxRanges);
  if (ranges > tiles && ranges > useful) ranges = max_of(tiles, static_cast<int>(useful));

  // Dealt whole, the longest range takes `longest` units; level, all would take total / ranges. One unit
  // saved is less than merging costs. A last wave that is nearly full is better left in step as well: cutting
  // it would put every CTA at another place of the sequence, for a twentieth of the time at most.
  planner.deal(tiles, ranges, dealt);
  int64_t longest = 0;
  for (int r = 0; r < ranges; ++r) longest = dealt[r] > longest ? dealt[r] : longest;
  const int full_waves = tiles / ranges;
  const int64_t left = total - planner.deal(full_waves * ranges, ranges, dealt);
  const bool nearly_full = left * 10 >= tile_units * ranges * 9 && total * 20 >= longest * ranges * 19;
  int whole = tiles;
  if (!options.deterministic && !nearly_full && total < (longest - 1) * ranges) {
    // As many whole waves as leave enough units to level all ranges, in pieces that are not too small.
    const auto target = [&](int r) { return total / ranges + (r < total % ranges ? 1 : 0); };
    for (int waves = full_waves;; --waves) {
      whole = waves * ranges;
      bool level = total - planner.deal(whole, ranges, dealt) >= min_share * ranges || waves == 0;
      for (int r = 0; r < ranges; ++r) level = level && dealt[r] <= target(r);
      if (level) break;
    }
    TileSchedule s{ranges, whole, {}};
    Cut at{whole, 0};
    for (int r = 0; r <= ranges; ++r) {
      s.cut[r] = planner.snap(at, options.min_fragment, tiles);
      if (r < ranges) at = planner.advance(at, target(r) - dealt[r], tiles);
    }
    return s;
  }
  TileSchedule s{ranges, whole, {}};
  for (int r = 0; r <= ranges; ++r) s.cut[r] = {tiles, 0};
  return s;
}

}  // namespace rf
