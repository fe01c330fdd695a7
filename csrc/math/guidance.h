// The arithmetic of the distribution-matching gradient (DMD, arXiv 2311.18828, eq. 7 and 8): guided
// estimates, the normaliser of a sample and the NaN rule. One body for both machines.
//
//   v    = c + g (c - u)                       guided prediction; g = s (Self-Forcing) or s - 1 (DMD2)
//   x0   = v, or x_t - sigma v for flow
//   d    = rule((fake - real) / (mean|x - real| + eps))
#pragma once

#include <cmath>

#include "csrc/math/dtype.h"

namespace rf {

// The published form of the guided estimate: equal to c bit for bit where c = u.
template <typename A>
RF_HD A guided(A cond, A uncond, A guidance) {
  return cond + guidance * (cond - uncond);
}

RF_HD float absolute(float v) {
  return fabsf(v);
}
RF_HD double absolute(double v) {
  return fabs(v);
}

// |v| as an integer that orders like the number, with infinity and NaN above every finite value: a maximum
// over it finds both, in any order of evaluation, to the same bit.
RF_HD int32_t magnitude_bits(float v) {
  return static_cast<int32_t>(float_to_bits(v) & 0x7FFFFFFFu);
}
RF_HD int64_t magnitude_bits(double v) {
  int64_t u;
  memcpy(&u, &v, sizeof(u));
  return u & 0x7FFFFFFFFFFFFFFFll;
}
RF_HD float from_magnitude_bits(int32_t bits) {
  return bits_to_float(static_cast<uint32_t>(bits));
}
RF_HD double from_magnitude_bits(int64_t bits) {
  double v;
  memcpy(&v, &bits, sizeof(v));
  return v;
}
template <typename A>
struct magnitude {
  using type = int32_t;
};
template <>
struct magnitude<double> {
  using type = int64_t;
};
template <typename A>
using magnitude_t = typename magnitude<A>::type;

// Largest finite number of a storage type: what nan_to_num puts in place of infinity.
template <typename T>
RF_HD acc_t<T> largest_finite();
template <>
RF_HD float largest_finite<bf16>() {
  return bits_to_float(0x7F7F0000u);
}
template <>
RF_HD float largest_finite<f16>() {
  return 65504.0f;
}
template <>
RF_HD float largest_finite<float>() {
  return bits_to_float(0x7F7FFFFFu);
}
template <>
RF_HD double largest_finite<double>() {
  return from_magnitude_bits(static_cast<int64_t>(0x7FEFFFFFFFFFFFFFll));
}

// nan_to_num: NaN -> 0, what is beyond +-limit -> +-limit. Comparisons with NaN are false, so a NaN passes
// the clamp and is caught by the last line.
template <typename A>
RF_HD A nan_to_num(A v, A limit) {
  v = v > limit ? limit : v;
  v = v < -limit ? -limit : v;
  return v == v ? v : A(0);
}

// What pass 1 learns about a sample. `silent`: every d of the sample is 0.
template <typename A>
struct Normalizer {
  A divisor;
  bool silent;
  bool dropped;
};

// distance_sum = sum |x - real| over the sample; peak = largest magnitude_bits(fake - real).
//
// published: the divisor as it is; a division by zero overflows and nan_to_num meets it element by element.
// else: the sample is dropped if any d would not be a finite number of the predictions' dtype. Division by a
// positive number keeps order, also after rounding, so the largest difference decides exactly. A divisor of 0
// (x = real in every element, eps = floor = 0: nothing to normalise by) gives d = 0 and is not a drop.
template <typename A>
RF_HD Normalizer<A> make_normalizer(double distance_sum, int64_t elements, bool normalize, double eps,
                                    double floor, magnitude_t<A> peak, bool published, A limit) {
  Normalizer<A> n{A(1), false, false};
  if (normalize) {
    const double mean = (elements > 0 ? distance_sum / static_cast<double>(elements) : 0.0) + eps;
    n.divisor = static_cast<A>(mean < floor ? floor : mean);  // a NaN stays one
  }
  if (published) return n;
  const A largest = from_magnitude_bits(peak);
  const bool zero = n.divisor == A(0);
  n.dropped = !is_finite(n.divisor) || !is_finite(largest) || (!zero && !(largest / n.divisor <= limit));
  n.silent = zero || n.dropped;
  return n;
}

}  // namespace rf
