// Arguments of dmd_gradient as plain data: what op.cpp fills in and both backends read.
#pragma once

#include <cstdint>

#include "csrc/math/dtype.h"

namespace rf::dmd_gradient {

constexpr int kMaxDims = 8;

// The codes of the schema; kRaise is kSample for a kernel, and an error after it.
enum class NanRule : int32_t { kPublished, kSample, kRaise };
enum class Reduction : int32_t { kMean, kSum, kNone };

// A tensor broadcast to one sample [M], merged to as few dimensions as its strides allow; the last one varies
// fastest. No dimension: one value for the sample.
struct Broadcast {
  const void* data = nullptr;  // null: absent
  int64_t batch_stride = 0;    // elements
  int32_t dims = 0;
  bool vectorised = false;  // any aligned group of vector_width elements is contiguous and aligned in memory
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};
};

struct Params {
  // inputs, contiguous
  const void* x = nullptr;            // [B, M] T
  const void* fake = nullptr;         // [B, M] P
  const void* real = nullptr;         // [B, M] P
  const void* fake_uncond = nullptr;  // [B, M] P, null where the guidance is 0
  const void* real_uncond = nullptr;  // [B, M] P
  const void* x_t = nullptr;          // [B, M] P, flow only
  Broadcast sigma;                    // A, flow only
  Broadcast weight;                   // A
  Broadcast mask;                     // uint8
  // outputs
  void* gradient = nullptr;       // [B, M] T
  void* loss = nullptr;           // [] A
  void* sample_loss = nullptr;    // [B] A
  void* gradient_norm = nullptr;  // [B] A
  void* normalizer = nullptr;     // [B] A
  int64_t* dropped = nullptr;     // []
  void* scale = nullptr;          // [] A: 1 / N ("mean"; 0 where N = 0), else 1
  // workspace, one entry per tile of the batch
  double* distance_sum = nullptr;  // [B * tiles] sum |x - real|
  void* peak = nullptr;            // [B * tiles] magnitude_t<A>: largest |fake - real|
  int64_t* selected = nullptr;     // [B * tiles] selected elements (CUDA: one entry per block)
  void* loss_sum = nullptr;        // [B * tiles] A: sum w m d^2
  void* norm_sum = nullptr;        // [B * tiles] A: sum |d|
  int32_t* drop = nullptr;         // [B], CUDA: 1 where the sample is dropped
  uint32_t* ticket = nullptr;      // CUDA: blocks that have finished

  int64_t batch = 0;        // B
  int64_t sample_size = 0;  // M
  int64_t tiles = 0;        // per sample: ceil(M / kTile)
  double fake_guidance = 0, real_guidance = 0;
  double eps = 0, floor = 0;  // divisor = max(mean|x - real| + eps, floor)
  bool normalize = true;
  bool mean = true;            // the loss (and, if scale_gradient, the gradient) is divided by N
  bool scale_gradient = true;  // false: the gradient is stored as w m d
  bool vectorised = false;     // 16-byte accesses are aligned for every sample
  NanRule nan_rule = NanRule::kSample;
  Dtype dtype = Dtype::kFloat32;             // T
  Dtype prediction_dtype = Dtype::kFloat32;  // P
};

// f.operator()<T, P>() for the types of a call: predictions in the dtype of x or in float32.
template <typename F>
auto with_types(const Params& p, F&& f) {
  return with_dtype(p.dtype, [&]<typename T>() {
    if constexpr (sizeof(T) != 4)
      if (p.prediction_dtype == Dtype::kFloat32) return f.template operator()<T, float>();
    return f.template operator()<T, T>();
  });
}

}  // namespace rf::dmd_gradient
