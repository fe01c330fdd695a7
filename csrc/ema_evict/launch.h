// Launchers of the CUDA backend (launch.cu, no torch header there). Each returns a cudaError_t as int.
#pragma once

#include "csrc/ema_evict/params.h"
#include "csrc/math/ema.h"

// `vectors`: 16-byte accesses, for layouts and addresses that allow them (vectors_fit in op.cpp).
extern "C" int rf_ema_evict_bf16(const rf::EmaEvictParams*, rf::EmaState, bool vectors, void* stream);
extern "C" int rf_ema_evict_f16(const rf::EmaEvictParams*, rf::EmaState, bool vectors, void* stream);
extern "C" int rf_ema_evict_f32(const rf::EmaEvictParams*, bool vectors, void* stream);
extern "C" int rf_ema_evict_f64(const rf::EmaEvictParams*, bool vectors, void* stream);
