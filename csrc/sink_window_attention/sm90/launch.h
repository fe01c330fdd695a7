// The Hopper kernel's launcher as op.cpp sees it.
#pragma once

#include "csrc/common/cuda_status.h"
#include "csrc/sink_window_attention/params.h"

namespace rf::sink_window_attention {

// Refuses, with nothing launched, a call that unsupported_sm90 (config.h) refuses, and one that cuts tiles
// without a workspace.
CudaStatus run_sm90(const SinkWindowAttentionParams& p, void* stream);

// SMs of a device of compute capability 9.0, 0 for any other and where there is no device.
int num_sms_sm90(int device_index);

}  // namespace rf::sink_window_attention
