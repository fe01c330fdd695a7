// Online softmax of one query row, in base 2: scores are q.k, weights are exp2(score * scale - max), scale =
// softmax_scale * log2(e).
//
// `max` is kept after scaling: the rounding of score * scale is then in every weight of the row alike and
// cancels in the normalisation, and rescaling factors are exact differences. A row whose scores are all -inf
// has max = -inf; its weights are taken relative to 0 and its sum stays 0.
#pragma once

#include <limits>

#include "csrc/math/host_device.h"
#include "csrc/math/special.h"

namespace rf {

struct SoftmaxRow {
  float max, sum;
};

RF_HD SoftmaxRow softmax_empty() {
  return {-std::numeric_limits<float>::infinity(), 0.f};
}

RF_HD float softmax_reference(float max) {
  return max == -std::numeric_limits<float>::infinity() ? 0.f : max;
}

// Takes in the largest score of new keys; returns the factor for what has been accumulated so far (0 for a
// first tile).
RF_HD float softmax_raise_max(SoftmaxRow& row, float largest_score, float scale) {
  const float max = max2(row.max, largest_score * scale);
  const float factor = exp2_approx(row.max - softmax_reference(max));
  row.max = max;
  row.sum *= factor;
  return factor;
}

RF_HD float softmax_weight(float score, float scale, float reference) {
  return exp2_approx(score * scale - reference);
}

// Joins two disjoint sets of keys: accumulated values of `row` are to be multiplied by .own, those of `other`
// by .other.
struct MergeFactors {
  float own, other;
};
RF_HD MergeFactors softmax_merge(SoftmaxRow& row, const SoftmaxRow& other) {
  const float max = max2(row.max, other.max), reference = softmax_reference(max);
  const MergeFactors f{exp2_approx(row.max - reference), exp2_approx(other.max - reference)};
  row = {max, row.sum * f.own + other.sum * f.other};
  return f;
}

// Natural logarithm of sum_j exp(softmax_scale * q.k_j).
RF_HD float softmax_lse(const SoftmaxRow& row) {
  constexpr float kLn2 = 0.693147180559945f;
  return kLn2 * (row.max + log2_approx(row.sum));
}

}  // namespace rf
