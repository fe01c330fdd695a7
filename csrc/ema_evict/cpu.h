// Entry of the CPU backend of ema_evict.
#pragma once

#include "csrc/common/torch_stable.h"
#include "csrc/ema_evict/params.h"
#include "csrc/math/ema.h"

namespace rf::ema_evict {

// Runs a checked call; returns which path served it (a literal, for record_dispatch).
const char* evict_cpu(const EmaEvictParams& p, ScalarType dtype, EmaState state);

}  // namespace rf::ema_evict
