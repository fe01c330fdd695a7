// Rotary embedding and the RMSNorm in front of it: which pair turns by which angle, and the arithmetic of one
// pair. Shared by the CPU backend and the CUDA kernel of rope_append.
//
// A head of D dims has P pairs, numbered axis after axis; dims from 2P on are not rotated. Token t has one
// coordinate per axis (mixed radix over the axes' lengths, axis 0 slowest). Pair i of axis a at coordinate c
// turns by the (cos, sin) in row  offset_a + c * pairs_a + i  of the angle table.
#pragma once

#include <cmath>

#include "csrc/math/dtype.h"
#include "csrc/math/fast_divide.h"
#include "csrc/math/rounding.h"

namespace rf {

// Where pair p lies in the head. kAdjacent: dims (2p, 2p + 1). kHalf: dims (p, p + P). kAxisHalf: axis a owns
// 2 * pairs_a consecutive dims, and its pair i is (i, i + pairs_a) in there.
enum class RopeLayout : int32_t { kAdjacent = 0, kHalf = 1, kAxisHalf = 2 };

// What one RMSNorm statistic spans: all heads of a token, one head, or there is no norm.
enum class NormScope : int32_t { kNone = 0, kModel = 1, kHead = 2 };

constexpr int32_t kMaxRopeAxes = 8;

struct RopeAxis {
  FastDivide length;  // coordinates of this axis
  int32_t pairs;      // rotated pairs, 0 or more
  int64_t offset;     // first row of this axis in the angle table
};

struct RopeAxes {
  RopeLayout layout;
  int32_t count;  // 0: nothing is rotated
  int32_t pairs;  // P, the sum over the axes
  RopeAxis axis[kMaxRopeAxes];
};

struct PairDims {
  int32_t x, y;
};

// Row of the angle table that turns pair `pair` (< P) of token `token`.
RF_HD int64_t angle_row(const RopeAxes& axes, int32_t token, int32_t pair) {
  int32_t begin = axes.pairs;
  // From the fastest axis to the slowest: dividing the lengths off needs no array of coordinates, which on
  // the GPU would be indexed at run time and so live in local memory.
  for (int32_t a = axes.count - 1; a > 0; --a) {
    const int32_t above = axes.axis[a].length.quotient(token);
    const int32_t pairs = axes.axis[a].pairs;
    begin -= pairs;
    if (pair >= begin)
      return axes.axis[a].offset + static_cast<int64_t>(axes.axis[a].length.remainder(token, above)) * pairs +
             (pair - begin);
    token = above;
  }
  return axes.axis[0].offset + static_cast<int64_t>(token) * axes.axis[0].pairs + pair;
}

// Dims of the head that pair `pair` (< P) consists of.
RF_HD PairDims pair_dims(const RopeAxes& axes, int32_t pair) {
  if (axes.layout == RopeLayout::kAdjacent) return {2 * pair, 2 * pair + 1};
  if (axes.layout == RopeLayout::kHalf) return {pair, pair + axes.pairs};
  int32_t a = 0, begin = 0;
  while (pair >= begin + axes.axis[a].pairs) begin += axes.axis[a++].pairs;
  return {begin + pair, begin + pair + axes.axis[a].pairs};
}

// (x, y) turned by the angle with cosine c and sine s. Three roundings each, on the CPU and on the GPU: no
// fma.
template <typename A>
RF_HD A rotated_x(A x, A y, A c, A s) {
  return mul_rn(x, c) - mul_rn(y, s);
}
template <typename A>
RF_HD A rotated_y(A x, A y, A c, A s) {
  return mul_rn(x, s) + mul_rn(y, c);
}

// 1 / sqrt(mean of squares + eps) in correctly rounded steps (no rsqrt: its error depends on the machine).
RF_HD float rms_scale(float sum_of_squares, int64_t count, double eps) {
  return 1.0f / sqrtf(sum_of_squares / static_cast<float>(count) + static_cast<float>(eps));
}
RF_HD double rms_scale(double sum_of_squares, int64_t count, double eps) {
  return 1.0 / sqrt(sum_of_squares / static_cast<double>(count) + eps);
}

// Order as published: first the normalised value, then the learned weight (both products in the accumulator).
template <typename A>
RF_HD A normalised(A x, A scale, A weight) {
  return mul_rn(mul_rn(x, scale), weight);
}

}  // namespace rf
