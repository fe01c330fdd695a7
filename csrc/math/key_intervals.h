// Which keys a chunk of queries sees in whole-sequence attention: the sink and the chunk's own window.
#pragma once

#include <cstdint>

#include "csrc/math/host_device.h"

namespace rf {

// Up to two intervals [begin, end) of key tokens, ascending and apart; `count` says how many.
struct KeyIntervals {
  int64_t begin[2] = {0, 0};
  int64_t end[2] = {0, 0};
  int count = 0;
};

RF_HD void push_interval(KeyIntervals& keys, int64_t begin, int64_t end) {
  if (begin >= end) return;
  if (keys.count > 0 && keys.end[keys.count - 1] == begin) {
    keys.end[keys.count - 1] = end;  // they touch: one pass over both
  } else {
    keys.begin[keys.count] = begin;
    keys.end[keys.count] = end;
    ++keys.count;
  }
}

// The chunk that ends at token t_end sees [0, min(S, t_end)) and [max(S, t_end - W), t_end).
RF_HD KeyIntervals key_intervals(int64_t t_end, int64_t num_sink_tokens, int64_t num_window_tokens) {
  const int64_t sink_end = num_sink_tokens < t_end ? num_sink_tokens : t_end;
  const int64_t window = num_window_tokens < t_end ? num_window_tokens : t_end;
  const int64_t window_begin = num_sink_tokens > t_end - window ? num_sink_tokens : t_end - window;
  KeyIntervals keys;
  push_interval(keys, 0, sink_end);
  push_interval(keys, window_begin, t_end);
  return keys;
}

}  // namespace rf
