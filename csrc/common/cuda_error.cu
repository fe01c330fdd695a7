// The text of a CUDA error code; the only file outside the ops that needs the CUDA runtime.
#include <cuda_runtime.h>

namespace rf {
const char* cuda_error_text(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
}  // namespace rf
