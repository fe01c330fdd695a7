// What only the CUDA runtime can say: the text of an error code, and whether the runtime runs here at all.
// The one file outside the ops that needs it.
#include <cuda_runtime.h>

#include <string>

namespace rf {

const char* cuda_error_text(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

const char* cuda_problem() {
  static const std::string problem = [] {
    int devices = 0, driver = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    if (error == cudaSuccess) return std::string();
    cudaDriverGetVersion(&driver);
    cudaGetLastError();  // leaves no error behind for the caller's next check
    const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    const std::string has = driver == 0 ? "no driver" : "a driver of CUDA " + version(driver);
    return "the CUDA runtime of this build (" + version(CUDART_VERSION) +
           ") does not run here: " + cudaGetErrorString(error) + "; found " + has +
           " (install a newer driver, or build with an nvcc of the driver's major version)";
  }();
  return problem.empty() ? nullptr : problem.c_str();
}

}  // namespace rf
