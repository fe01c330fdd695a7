// What a launcher returns to op.cpp, without a CUDA header.
#pragma once

namespace rf {

// A cudaError_t, or the CUresult of a call to the driver itself, and the call that it came from: a string
// literal.
struct CudaStatus {
  int code = 0;
  const char* call = "";
  int driver = 0;
  bool ok() const { return code == 0 && driver == 0; }
};

}  // namespace rf
