// The backends that op.cpp chooses from.
#pragma once

#include "csrc/common/cuda_status.h"
#include "csrc/dmd_gradient/params.h"

namespace rf::dmd_gradient {

// Returns which path served, a literal. The bits do not depend on the number of threads.
const char* run_cpu(const Params& p);

// One cooperative launch on `stream`, or two launches where the differences do not fit in shared memory.
CudaStatus run_cuda(const Params& p, void* stream);

}  // namespace rf::dmd_gradient
