// The backends that op.cpp chooses from.
#pragma once

#include "csrc/common/cuda_status.h"
#include "csrc/ema_evict/config.h"
#include "csrc/ema_evict/params.h"

namespace rf::ema_evict {

// Returns which path served, a literal. The bits do not depend on the number of threads.
const char* run_cpu(const Params& p);

// One launch on `stream` for up to kGroup sources a sink frame.
CudaStatus run_cuda(const Params& p, const Config& config, void* stream);

}  // namespace rf::ema_evict
