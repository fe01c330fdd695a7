// From a tensor's dtype and device to code, and the record of what was chosen.
#pragma once

#include <string>

#include "csrc/common/check.h"
#include "csrc/math/dtype.h"

#if defined(RF_WITH_CUDA)
#include <torch/csrc/stable/accelerator.h>

#include "csrc/common/launch.h"
#endif

namespace rf {

// Any other dtype is an argument error.
inline Dtype checked_dtype(const char* op, const char* arg, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    default:
      throw_argument_error(op, arg, "dtype float64, float32, bfloat16 or float16",
                           dtype_text(t.scalar_type()));
  }
}

// What served the last call of an op on this thread; read by rf_kernels.last_dispatch(). `op`, `backend` and
// `reason` are string literals: recording costs three pointer stores.
void record_dispatch(const char* op, const char* backend, const char* reason);

// The same where a slower path than the device's own kernel is taken: an error under RF_STRICT=1.
void record_fallback(const char* op, const char* backend, const char* reason);

// Runs a checked call where its tensors are: cpu() or cuda(stream). Both return why they took the path that
// they took, a literal; a build without a CUDA part refuses CUDA tensors.
template <typename Cpu, typename Cuda>
void run_where_tensors_are(const char* op, const Tensor& like, Cpu cpu, [[maybe_unused]] Cuda cuda) {
  if (is_meta(like)) return;
  if (like.is_cpu()) return record_dispatch(op, "cpu", cpu());
#if defined(RF_WITH_CUDA)
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  record_dispatch(op, "cuda", cuda(current_stream(device)));
#else
  throw std::runtime_error(concat("rf_kernels.", op, ": ", kNoCudaPart));
#endif
}

}  // namespace rf
