// Attention over two disjoint sets of keys from the results over each: out_i with its log-sum-exp lse_i.
//
//   lse = log(exp(lse_0) + exp(lse_1))        out = exp(lse_0 - lse) out_0 + exp(lse_1 - lse) out_1
#pragma once

#include <cmath>
#include <limits>

#include "csrc/math/host_device.h"

namespace rf {

template <typename A>
struct LseMerge {
  A weight0, weight1, lse;
};

RF_HD float exp_acc(float x) {
  return ::expf(x);
}
RF_HD double exp_acc(double x) {
  return ::exp(x);
}
RF_HD float log_acc(float x) {
  return ::logf(x);
}
RF_HD double log_acc(double x) {
  return ::log(x);
}

// The larger LSE is taken out first, so nothing overflows; a NaN on either side is a NaN in all three. An LSE
// of -inf is a set without weight: no key, or none whose logit is above -inf.
template <typename A>
RF_HD LseMerge<A> lse_merge(A lse0, A lse1) {
  constexpr A kEmpty = -std::numeric_limits<A>::infinity();
  if (lse0 == kEmpty && lse1 == kEmpty) return {A(0), A(0), kEmpty};
  const A top = lse0 > lse1 ? lse0 : lse1;
  const A e0 = exp_acc(lse0 - top);
  const A e1 = exp_acc(lse1 - top);
  const A sum = e0 + e1;
  return {e0 / sum, e1 / sum, top + log_acc(sum)};
}

}  // namespace rf
