// What a launcher returns to op.cpp, without a CUDA header.
#pragma once

namespace rf {

// A cudaError_t, and the call that it came from: a string literal.
struct CudaStatus {
  int code = 0;
  const char* call = "";
  bool ok() const { return code == 0; }
};

}  // namespace rf
