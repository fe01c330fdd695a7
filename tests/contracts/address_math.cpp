// The address arithmetic that CPU and CUDA kernels share, beyond 2^31 and 2^32 elements, and the types it is
// done in. Built by tests/contracts/test_int64.py with -fsanitize=undefined: an overflow of an int traps.
#include <cstdio>
#include <initializer_list>
#include <type_traits>

#include "csrc/dmd_gradient/kernel.h"
#include "csrc/ema_evict/params.h"
#include "csrc/math/key_intervals.h"
#include "csrc/math/rope.h"
#include "csrc/rope_append/params.h"

using namespace rf;

static_assert(std::is_same_v<decltype(angle_row(RopeAxes{}, 0, 0)), int64_t>);
static_assert(std::is_same_v<decltype(rope_append::cache_token(rope_append::Params{}, 0, 0)), int64_t>);
static_assert(std::is_same_v<decltype(rope_append::HeadRows::batch_stride), int64_t>);
static_assert(std::is_same_v<decltype(rope_append::HeadRows::token_stride), int64_t>);
static_assert(std::is_same_v<decltype(rope_append::HeadRows::head_stride), int64_t>);
static_assert(std::is_same_v<decltype(rope_append::MutableHeadRows::token_stride), int64_t>);
static_assert(std::is_same_v<decltype(RopeAxis::offset), int64_t>);
static_assert(std::is_same_v<decltype(ema_evict::Params::k_stride_t), int64_t>);
static_assert(std::is_same_v<decltype(ema_evict::Params::frame_tokens), int64_t>);
static_assert(std::is_same_v<decltype(KeyIntervals::begin), int64_t[2]>);

static int failures = 0;

static void expect(const char* what, int64_t found, int64_t expected) {
  if (found == expected) return;
  std::printf("%s: %lld instead of %lld\n", what, static_cast<long long>(found),
              static_cast<long long>(expected));
  ++failures;
}

int main() {
  for (const int64_t edge : {(int64_t{1} << 31) - 1, (int64_t{1} << 31) + 1, (int64_t{1} << 32) + 1}) {
    // Rows of an angle table: the last of an axis that ends at the edge.
    RopeAxes axes{RopeLayout::kAdjacent, 2, 3, {}};
    axes.axis[0] = {1000, 2, edge - 2000};
    axes.axis[1] = {7, 1, 0};
    expect("angle_row", angle_row(axes, 999 * 7 + 6, 1), edge - 1);
    axes.pairs = 1001;
    axes.axis[0] = {2147483, 1000, 1};
    expect("angle_row, product", angle_row(axes, 2147482 * 7, 999), 1 + int64_t{2147482} * 1000 + 999);

    // A cache so long that a slot's first token lies beyond the edge.
    rope_append::Params p{};
    const int32_t slots[] = {0, static_cast<int32_t>(edge / 1560)};
    p.slots = slots;
    p.slots_stride = 1;
    p.frame_tokens = 1560;
    p.cache_tokens = (slots[1] + int64_t{1}) * 1560;
    expect("cache_token", rope_append::cache_token(p, 0, 1560 + 1559), slots[1] * int64_t{1560} + 1559);
    p.cache_tokens -= 1;
    expect("cache_token outside", rope_append::cache_token(p, 0, 1560), -1);

    // Whole sequences: sink and window on either side of the edge.
    const KeyIntervals keys = key_intervals(edge, 5, edge - 6);
    expect("intervals", keys.count, 2);
    expect("window begins", keys.begin[1], 6);
    expect("window ends", keys.end[1], edge);
    expect("huge window", key_intervals(edge, INT64_MAX, INT64_MAX).end[0], edge);

    // A weight per frame and channel of a sample: the element at the edge, of frame 1, and how many follow it
    // in its run.
    dmd_gradient::Broadcast weight;
    weight.dims = 2;
    weight.batch_stride = edge;
    weight.size[0] = 3, weight.stride[0] = 5;
    weight.size[1] = edge, weight.stride[1] = 1;
    int64_t run = 0;
    expect("broadcast", dmd_gradient::broadcast_offset(weight, 2, 2 * edge - 3, run),
           2 * edge + 5 + edge - 3);
    expect("broadcast run", run, 3);
  }
  return failures;
}
