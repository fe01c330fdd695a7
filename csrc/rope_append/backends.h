// The backends that op.cpp chooses from.
#pragma once

#include "csrc/rope_append/config.h"
#include "csrc/rope_append/params.h"

namespace rf {

// Serves rope (k.heads = 0) and rope_append. Bits do not depend on the number of threads.
void rope_append_cpu(const RopeAppendParams& p);

}  // namespace rf

// One launch on `stream`; returns a cudaError_t.
extern "C" int rf_rope_append_launch(const rf::RopeAppendParams* params, const rf::RopeAppendConfig* config,
                                     void* stream);
