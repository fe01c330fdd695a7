// Schedules by shape and number of CTAs: planning one takes a call between 1 us and, at 128 chunks, half a
// millisecond.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "csrc/math/tile_schedule.h"

namespace rf::sink_window_attention {

// Any thread may ask; a schedule lives on with whoever holds it. When full it forgets all: a process that has
// more shapes than that plans anew, and the memory stays bounded.
class ScheduleCache {
 public:
  static constexpr size_t kMaxEntries = 256;  // about 2 KB each

  std::shared_ptr<const TileSchedule> get(const TileMap& map, int tile_m, int tile_n,
                                          const ScheduleOptions& options) {
    std::vector<int32_t> key{tile_m,
                             tile_n,
                             options.ctas,
                             options.min_fragment,
                             options.max_fragments,
                             options.deterministic,
                             map.batch_heads,
                             map.kv_tokens,
                             map.num_sink_tokens,
                             map.num_window_tokens};
    key.insert(key.end(), map.chunk_end, map.chunk_end + map.chunks);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (const auto found = schedules_.find(key); found != schedules_.end()) return found->second;
    }
    auto schedule = std::make_shared<const TileSchedule>(plan_schedule(map, tile_m, tile_n, options));
    const std::lock_guard<std::mutex> lock(mutex_);
    if (schedules_.size() >= kMaxEntries) schedules_.clear();
    return schedules_.try_emplace(std::move(key), std::move(schedule)).first->second;
  }

  size_t size() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return schedules_.size();
  }

 private:
  mutable std::mutex mutex_;
  std::map<std::vector<int32_t>, std::shared_ptr<const TileSchedule>> schedules_;
};

}  // namespace rf::sink_window_attention
