// The backends that op.cpp chooses from.
#pragma once

#include "csrc/common/cuda_status.h"
#include "csrc/rope_append/config.h"
#include "csrc/rope_append/params.h"

namespace rf::rope_append {

// Both serve rope (k.heads = 0) and rope_append. The CPU's bits do not depend on the number of threads; it
// returns which path served, a literal.
const char* run_cpu(const Params& p);

// One launch on `stream`.
CudaStatus run_cuda(const Params& p, const Config& config, void* stream);

}  // namespace rf::rope_append
