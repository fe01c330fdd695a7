// The Hopper kernel as op.cpp sees it.
#pragma once

#include <optional>

#include "csrc/sink_window_attention/portable.h"

namespace rf::sink_window_attention {

// The arguments of a checked call that Problem has turned into intervals.
struct Sm90Options {
  int64_t num_sink_tokens;
  std::optional<int64_t> num_window_tokens;
  bool whole_sequence, deterministic;
};

// nullptr when forward_sm90 takes the call, else the reason why PyTorch's kernels must.
const char* refused_by_sm90(const Problem& problem, const Sm90Options& options);
Attended forward_sm90(const Problem& problem, const Sm90Options& options);

}  // namespace rf::sink_window_attention
