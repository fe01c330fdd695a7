// From a tensor's dtype and device to code, and the record of what was chosen.
#pragma once

#include <string>

#include "csrc/common/aten.h"
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

bool on_rocm();

// Why this library's own CUDA kernels do not run on a device, a literal; nullptr where they do.
const char* own_kernels_problem(int32_t device_index);

// Whether Triton serves a checked call: because RF_BACKEND or rf_kernels.backend() asks for it, or because
// nothing else can (`problem`: why; nullptr where something can). Records it; throws where it is asked for
// and cannot serve.
bool triton_serves(const char* op, const Tensor& like, const char* problem);

// Triton's kernels are started from Python: ops named triton_<op> that take a checked call and its outputs.
template <typename... Args>
void call_triton(const char* op, const Args&... args) {
  call_aten(concat("rf_kernels::triton_", op).c_str(), "", 0, args...);
}

// Runs a checked call: cpu() or cuda(stream), where its tensors are, which return why they took the path that
// they took, a literal; or triton().
template <typename Cpu, typename Cuda, typename Triton>
void run_where_tensors_are(const char* op, const Tensor& like, Cpu cpu, [[maybe_unused]] Cuda cuda,
                           Triton triton) {
  if (is_meta(like)) return;
  const char* problem = like.is_cuda() ? own_kernels_problem(like.get_device_index()) : nullptr;
  if (triton_serves(op, like, problem)) return triton();
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
