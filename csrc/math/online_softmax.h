// Online softmax of one query row, in base 2: scores are q.k, weights are exp2(score * scale - reference),
// scale = softmax_scale * log2(e).
//
// The reference is a maximum that the row once had, after scaling: the rounding of score * scale is then in
// every weight of the row alike and cancels in the normalisation, and rescaling factors are exact
// differences. It stays where it is while the true maximum is at most kSoftmaxSlack above it: weights then
// reach 2^8, which 16-bit floats hold as exactly as weights up to 1, and what has been accumulated need not
// be multiplied. A row whose scores are all -inf has the reference -inf; its weights are taken relative to 0
// and its sum stays 0.
#pragma once

#include <limits>

#include "csrc/math/host_device.h"
#include "csrc/math/special.h"

namespace rf {

constexpr float kSoftmaxSlack = 8.f;  // in base 2

struct SoftmaxRow {
  float reference, sum;
};

RF_HD SoftmaxRow softmax_empty() {
  return {-std::numeric_limits<float>::infinity(), 0.f};
}

// What weights are relative to.
RF_HD float softmax_base(float reference) {
  return reference == -std::numeric_limits<float>::infinity() ? 0.f : reference;
}

// Whether a score calls for another reference: always when there is none yet, and when the comparison is with
// NaN.
RF_HD bool softmax_exceeds(const SoftmaxRow& row, float score, float scale) {
  return !(score * scale - row.reference <= kSoftmaxSlack);
}

// Takes in the largest score of new keys; returns the factor for what has been accumulated so far (0 for a
// first tile, 1 when the reference stays). It depends on this row alone.
RF_HD float softmax_raise(SoftmaxRow& row, float largest_score, float scale) {
  if (!softmax_exceeds(row, largest_score, scale)) return 1.f;
  const float reference = max2(row.reference, largest_score * scale);
  const float factor = exp2_approx(row.reference - softmax_base(reference));
  row.reference = reference;
  row.sum *= factor;
  return factor;
}

RF_HD float softmax_weight(float score, float scale, float base) {
  return exp2_approx(score * scale - base);
}
RF_HD float softmax_weight_polynomial(float score, float scale, float base) {
  return exp2_polynomial(score * scale - base);
}

// Joins two disjoint sets of keys: accumulated values of `row` are to be multiplied by .own, those of `other`
// by .other.
struct MergeFactors {
  float own, other;
};
RF_HD MergeFactors softmax_merge(SoftmaxRow& row, const SoftmaxRow& other) {
  const float reference = max2(row.reference, other.reference), base = softmax_base(reference);
  const MergeFactors f{exp2_approx(row.reference - base), exp2_approx(other.reference - base)};
  row = {reference, row.sum * f.own + other.sum * f.other};
  return f;
}

// Natural logarithm of sum_j exp(softmax_scale * q.k_j).
RF_HD float softmax_lse(const SoftmaxRow& row) {
  constexpr float kLn2 = 0.693147180559945f;
  return kLn2 * (row.reference + log2_approx(row.sum));
}

}  // namespace rf
