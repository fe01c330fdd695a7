// A strided [B, T, H, D] tensor of 16-bit elements as the copy engine sees it: what host code, kernels and
// both machines share.
#pragma once

#include <cstdint>

namespace rf::arch {

// A rank-5 view {64, rows, head_dim / 64, heads, batch}: 64 elements are one 128-byte swizzle span, so one
// instruction fills a [head_dim / 64][box_rows][64] tile; a box cannot cross heads, and rows from `rows` on
// arrive as zeros.
struct TileSource {
  const void* data;
  int batch, rows, heads, head_dim;
  int64_t batch_stride, row_stride, head_stride;  // in elements; the last dimension is contiguous
  int box_rows;
  bool fp16;
};

// What TMA demands of the memory; nullptr when it can be used.
inline const char* tile_source_problem(const TileSource& s) {
  if (reinterpret_cast<uintptr_t>(s.data) % 16 != 0) return "TMA needs data that is 16-byte aligned";
  if (s.head_dim % 64 != 0) return "the tiles need a head dimension that is a multiple of 64";
  const int64_t strides[] = {s.row_stride, s.head_stride, s.batch_stride};
  const int sizes[] = {s.rows, s.heads, s.batch};
  for (int i = 0; i < 3; ++i)
    if (sizes[i] > 1 && (strides[i] % 8 != 0 || strides[i] <= 0 || strides[i] >= int64_t{1} << 39))
      return "TMA needs strides that are positive multiples of 8 elements (16 bytes) below 2^39";
  if (s.box_rows > 256) return "TMA takes tiles of at most 256 rows";
  return nullptr;
}

namespace detail {
struct Rank5 {
  uint64_t size[5];
  uint64_t stride_bytes[5];
  uint32_t box[5];
};
inline Rank5 rank5(const TileSource& s) {
  const auto u = [](int64_t x) { return static_cast<uint64_t>(x); };
  // A dimension of size 1 is never stepped over; the encoder wants a positive stride all the same.
  const auto step = [&](int size, int64_t stride) { return size > 1 ? u(stride) * 2 : uint64_t{128}; };
  return {{64, u(s.rows), u(s.head_dim / 64), u(s.heads), u(s.batch)},
          {2, step(s.rows, s.row_stride), 128, step(s.heads, s.head_stride), step(s.batch, s.batch_stride)},
          {64, static_cast<uint32_t>(s.box_rows), static_cast<uint32_t>(s.head_dim / 64), 1, 1}};
}
}  // namespace detail

// Where a tile starts, innermost dimension first.
struct TileCoord {
  int c[5];
};

// What the L2 should do with the lines: K and V are read again by other SMs, Q is read once.
enum class L2Hint { evict_first, evict_last };

}  // namespace rf::arch
