// Which keys a tile of queries sees, and how both are cut into tiles.
//
// Two cases of one rule. Whole sequence: queries come in chunks; those of a chunk that ends at t_end see the
// sink rows [0, min(S, t_end)) and the window [max(S, t_end - W), t_end). Dense prefix: one chunk, S = 0, and
// t_end = W = kv_tokens. A query tile never straddles two chunks. The unit of work is one key tile for one
// query tile.
#pragma once

#include "csrc/math/host_device.h"

namespace rf {

RF_HD int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}
RF_HD int min_of(int a, int b) {
  return a < b ? a : b;
}
RF_HD int max_of(int a, int b) {
  return a > b ? a : b;
}

// Rows [begin, end) of the keys.
struct KeyInterval {
  int begin, end;
  RF_HD int length() const { return end - begin; }
};

// What a query sees: `high` is never empty and is visited first; `low` (the sink rows, when the window does
// not touch them) may be empty. Inside an interval, tiles start at its begin and are visited in descending
// order, so the one tile that is not full comes first.
struct KeyRange {
  KeyInterval high, low;
  RF_HD int units(int tile_n) const {
    return ceil_div(high.length(), tile_n) + ceil_div(low.length(), tile_n);
  }
};

// The rule of key_intervals.h in named members: its indexed pair would put the device's copy into local
// memory.
RF_HD KeyRange key_range(int chunk_end, int num_sink_tokens, int num_window_tokens) {
  const int sink_end = min_of(num_sink_tokens, chunk_end);
  const int window_begin = max_of(sink_end, chunk_end - num_window_tokens);
  if (window_begin <= sink_end) return {{0, chunk_end}, {0, 0}};
  if (window_begin >= chunk_end) return {{0, sink_end}, {0, 0}};
  return {{window_begin, chunk_end}, {0, sink_end}};
}

// `count` neighbouring units of one interval, in the order of visiting: the first key tile starts at `row`,
// each further one tile_n rows below; `valid` rows of the first tile belong to the interval, all rows of the
// others do.
struct KeyRun {
  int row, valid, count;
};

// The part of units [first, first + count) of a query tile that lies in `high` (interval 0) or `low`
// (interval 1).
RF_HD KeyRun key_run(const KeyRange& range, int interval, int first, int count, int tile_n) {
  const int high_units = ceil_div(range.high.length(), tile_n);
  const KeyInterval keys = interval == 0 ? range.high : range.low;
  const int base = interval == 0 ? 0 : high_units, units = ceil_div(keys.length(), tile_n);
  const int from = max_of(first - base, 0), to = min_of(first + count - base, units);
  const int row = keys.begin + (units - 1 - from) * tile_n;
  return {row, min_of(tile_n, keys.end - row), max_of(to - from, 0)};
}

// All query tiles of a call. Tiles are numbered chunk by chunk from the last chunk to the first (their cost
// never increases on the way: what a chunk sees only grows with its end), inside a chunk (batch, head) by
// (batch, head), inside that row by row: neighbours share their keys.
struct TileMap {
  static constexpr int kMaxChunks = 128;
  int batch_heads;  // batch * query heads
  int kv_tokens;
  int num_sink_tokens, num_window_tokens;
  int chunks;
  int chunk_end[kMaxChunks];  // in query rows, ascending

  RF_HD static TileMap dense(int batch_heads, int q_tokens, int kv_tokens) {
    TileMap map{};
    map.batch_heads = batch_heads;
    map.kv_tokens = kv_tokens;
    map.num_window_tokens = kv_tokens;
    map.chunks = 1;
    map.chunk_end[0] = q_tokens;
    return map;
  }

  RF_HD int chunk_begin(int chunk) const { return chunk == 0 ? 0 : chunk_end[chunk - 1]; }
  RF_HD int row_tiles(int chunk, int tile_m) const {
    return ceil_div(chunk_end[chunk] - chunk_begin(chunk), tile_m);
  }
  RF_HD int chunk_tiles(int chunk, int tile_m) const { return batch_heads * row_tiles(chunk, tile_m); }
  // The last chunk ends with the keys: in dense mode there is no other.
  RF_HD KeyRange keys(int chunk) const {
    return key_range(chunk == chunks - 1 ? kv_tokens : chunk_end[chunk], num_sink_tokens, num_window_tokens);
  }
  RF_HD int tiles(int tile_m) const {
    int n = 0;
    for (int c = 0; c < chunks; ++c) n += chunk_tiles(c, tile_m);
    return n;
  }
};

struct TilePlace {
  int chunk, batch_head, row, row_end;  // query rows [row, min(row + tile_m, row_end))
};
RF_HD TilePlace locate(const TileMap& map, int tile, int tile_m) {
  int chunk = map.chunks - 1;
  for (int n = map.chunk_tiles(chunk, tile_m); tile >= n; n = map.chunk_tiles(chunk, tile_m)) {
    tile -= n;
    --chunk;
  }
  const int row_tiles = map.row_tiles(chunk, tile_m), batch_head = tile / row_tiles;
  return {chunk, batch_head, map.chunk_begin(chunk) + (tile - batch_head * row_tiles) * tile_m,
          map.chunk_end[chunk]};
}

}  // namespace rf
