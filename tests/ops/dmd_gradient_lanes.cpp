// The body of dmd_gradient's CUDA threads as host code, at their vector widths, over the tiles of launch.cu.
// The sums across threads are launch.cu's own and not here: divisor and scale are given. Built and called by
// tests/ops/test_dmd_gradient_kernel.py.
#include <utility>

#include "csrc/dmd_gradient/kernel.h"

namespace rf::dmd_gradient {
namespace {

struct Seen {
  double distance, loss, norm;
  int64_t peak, selected;
};

template <typename T, typename P>
int run(Params p, const void* divisors, double scale, Seen* seen) {
  using A = acc_t<T>;
  constexpr int V = vector_width(sizeof(T), sizeof(P));
  p.vectorised = p.sample_size % V == 0;
  for (const void* data :
       {p.x, p.fake, p.real, p.fake_uncond, p.real_uncond, p.x_t, static_cast<const void*>(p.gradient)})
    p.vectorised = p.vectorised && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  p.weight.vectorised = p.mask.vectorised = p.vectorised;
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t begin = 0; begin < p.sample_size; begin += kTile)
      for (int64_t i = begin; i < p.sample_size && i < begin + kTile; i += V) {
        const int64_t left = (p.sample_size < begin + kTile ? p.sample_size : begin + kTile) - i;
        const int n = left < V ? static_cast<int>(left) : V;
        A difference[V], distance[V], loss[V], norm[V];
        estimate<T, P, V>(p, b, i, n, true, difference, distance);
        const int64_t peak = peak_of<V>(p, b, i, n, difference);
        seen[b].peak = peak > seen[b].peak ? peak : seen[b].peak;
        seen[b].selected += count_selected<V>(p, b, i, n);
        finish<T, P, V>(p, b, i, n, static_cast<const A*>(divisors)[b], static_cast<A>(scale), difference,
                        loss, norm);
        for (int k = 0; k < V; ++k) {
          seen[b].distance += distance[k];
          seen[b].loss += loss[k];
          seen[b].norm += norm[k];
        }
      }
  return p.vectorised ? V : 1;
}

}  // namespace
}  // namespace rf::dmd_gradient

// data: x, fake, real, fake_uncond, real_uncond, x_t, sigma [B, F], weight [B, M], mask [B, M], gradient,
// divisors [B], results [B] of Seen. sizes: dtype, predictions in float32, B, M, F. values: guidance of fake
// and of real, 1 / N. Returns the elements of one access.
extern "C" int dmd_gradient_lanes(const int64_t* sizes, void* const* data, const double* values) {
  using namespace rf::dmd_gradient;
  Params p;
  p.batch = sizes[2];
  p.sample_size = sizes[3];
  p.x = data[0];
  p.fake = data[1];
  p.real = data[2];
  p.fake_uncond = data[3];
  p.real_uncond = data[4];
  p.x_t = data[5];
  p.sigma = {.data = data[6],
             .batch_stride = sizes[4],
             .dims = 2,
             .size = {sizes[4], p.sample_size / sizes[4]},
             .stride = {1, 0}};
  p.weight = {
      .data = data[7], .batch_stride = p.sample_size, .dims = 1, .size = {p.sample_size}, .stride = {1}};
  p.mask = p.weight;
  p.mask.data = data[8];
  p.gradient = data[9];
  p.fake_guidance = values[0];
  p.real_guidance = values[1];
  Seen* seen = static_cast<Seen*>(data[11]);
  const bool wide = sizes[1] != 0;
  switch (sizes[0]) {
    case 0:
      return wide ? run<rf::bf16, float>(p, data[10], values[2], seen)
                  : run<rf::bf16, rf::bf16>(p, data[10], values[2], seen);
    case 1:
      return wide ? run<rf::f16, float>(p, data[10], values[2], seen)
                  : run<rf::f16, rf::f16>(p, data[10], values[2], seen);
    case 2:
      return run<float, float>(p, data[10], values[2], seen);
    default:
      return wide ? run<double, float>(p, data[10], values[2], seen)
                  : run<double, double>(p, data[10], values[2], seen);
  }
}

// Bytes that vector accesses have moved since the last question.
extern "C" int64_t dmd_gradient_moved_bytes() {
  return std::exchange(rf::moved_bytes, 0);
}
