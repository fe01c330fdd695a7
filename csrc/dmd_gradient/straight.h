// The usual call of dmd_gradient: x0 predictions of the dtype of x, the real one guided, one weight a sample,
// no mask, the normaliser on. What a thread does with its vectors then has no questions: all loads of a turn
// are under way before the first is used. Sums have the order of kernel.h, hence the same bits.
#pragma once

#include "csrc/dmd_gradient/kernel.h"

namespace rf::dmd_gradient {

// Vectors of a turn, and how many tiles they are: a thread has one vector of a tile in half precision, two in
// float32.
constexpr int kTurnVectors = 2;
template <typename T>
constexpr int kWidth = vector_width(sizeof(T), sizeof(T));
template <typename T>
constexpr int kTileVectors = kTile / (kThreads * kWidth<T>);

inline bool usual(const Params& p) {
  return p.vectorised && p.dtype == p.prediction_dtype && p.dtype != Dtype::kFloat64 && p.normalize &&
         p.nan_rule != NanRule::kPublished && p.fake_uncond == nullptr && p.real_uncond != nullptr &&
         p.x_t == nullptr && p.mask.data == nullptr && (p.weight.data == nullptr || p.weight.dims == 0) &&
         p.batch * p.tiles > 0 && p.batch * p.tiles <= INT32_MAX;
}

RF_HD float sample_weight(const Params& p, int64_t b) {
  return p.weight.data == nullptr ? 1.0f
                                  : static_cast<const float*>(p.weight.data)[b * p.weight.batch_stride];
}

// The larger magnitude; a NaN where either is: one instruction on the GPU.
RF_HD float larger_magnitude(float peak, float v) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(peak), "f"(fabsf(v)));
  return out;
#else
  return magnitude_bits(v) > magnitude_bits(peak) ? absolute(v) : peak;
#endif
}

// A sample's weight as it counts in the peak: only where it is not finite.
RF_HD float weight_peak(float weight) {
  return is_finite(weight) ? 0.0f : absolute(weight);
}

// v / divisor for a finite v and one positive finite divisor, to the bit: four instructions, none a branch.
// The inverse has 100 bits, in two parts >= 0 so that a zero keeps its sign. What is rounded to double is
// then v / divisor times 1 + 2^-100: exact where the quotient is a tie between two (subnormal) floats, and
// nowhere else is a quotient of floats so near to a tie (2^-49 relative) that a double would fall on its
// wrong side.
class Divider {
 public:
  Divider() = default;
  RF_HD explicit Divider(float divisor) : divisor_(divisor), high_(1.0 / static_cast<double>(divisor)) {
    const double wide = divisor;
    if (fma(-high_, wide, 1.0) < 0) high_ = from_magnitude_bits(magnitude_bits(high_) - 1);
    low_ = fma(-high_, wide, 1.0) * high_;
  }
  RF_HD float operator()(float v) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
    return v / divisor_;  // two double units an SM: the same bits faster
#else
    const double wide = v;
    return static_cast<float>(fma(wide, high_, wide * low_));
#endif
  }

 private:
  float divisor_;
  double high_, low_;
};

// What a thread has read for pass 1 or for the differences of pass 2.
template <typename T>
struct Read {
  Vec<T, kWidth<T>> x, fake, real, uncond;
};

template <typename T>
RF_HD void difference_of(const Read<T>& in, float guidance, float (&difference)[kWidth<T>],
                         float (&real)[kWidth<T>]) {
  float uncond[kWidth<T>];
  vec_to_acc(in.real, real);
  vec_to_acc(in.uncond, uncond);
  vec_to_acc(in.fake, difference);
  RF_UNROLL
  for (int k = 0; k < kWidth<T>; ++k) {
    real[k] = guided(real[k], uncond[k], guidance);
    difference[k] = difference[k] - real[k];
  }
}

// Pass 1 of one vector: adds its distances to `sum`.
template <typename T>
RF_HD void measure_vector(const Read<T>& in, float guidance, float (&difference)[kWidth<T>], double& sum,
                          float& peak) {
  float real[kWidth<T>], x[kWidth<T>];
  difference_of<T>(in, guidance, difference, real);
  vec_to_acc(in.x, x);
  RF_UNROLL
  for (int k = 0; k < kWidth<T>; ++k) {
    x[k] = absolute(x[k] - real[k]);
    peak = larger_magnitude(peak, difference[k]);
  }
  sum += tree_sum_as<kWidth<T>, double>(x);
}

// Pass 2 of one vector: returns its gradient, adds to the sums of w d^2 and |d|. `scaled`: weight x scale.
template <typename T>
RF_HD Vec<T, kWidth<T>> finish_vector(const float (&difference)[kWidth<T>], const Divider& divided,
                                      float weight, float scaled, float& loss, float& norm) {
  float gradient[kWidth<T>], loss_term[kWidth<T>], norm_term[kWidth<T>];
  RF_UNROLL
  for (int k = 0; k < kWidth<T>; ++k) {
    const float d = divided(difference[k]);
    norm_term[k] = absolute(d);
    gradient[k] = scaled * d;
    loss_term[k] = (weight * d) * d;
  }
  loss += tree_sum_as<kWidth<T>, float>(loss_term);
  norm += tree_sum_as<kWidth<T>, float>(norm_term);
  return vec_from_acc<T>(gradient);
}

}  // namespace rf::dmd_gradient
