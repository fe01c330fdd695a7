// The body of dmd_gradient's CUDA threads as host code, at their vector widths, over the tiles of launch.cu.
// The sums across threads are launch.cu's own and not here: divisor and scale are given. Built and called by
// tests/ops/test_dmd_gradient_kernel.py.
#include <utility>

#include "csrc/dmd_gradient/straight.h"

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

// The usual call: every vector through both passes, its differences kept in between.
template <typename T>
int run_straight(const Params& p, const float* divisors, float scale, Seen* seen) {
  constexpr int V = kWidth<T>;
  const float guidance = static_cast<float>(p.real_guidance);
  for (int64_t b = 0; b < p.batch; ++b) {
    const Divider divided(divisors[b]);
    const float weight = sample_weight(p, b);
    float peak = weight_peak(weight);
    for (int64_t i = 0; i < p.sample_size; i += V) {
      const auto read = [&](const void* base) {
        return load_vec<V>(static_cast<const T*>(base) + b * p.sample_size + i);
      };
      float difference[V], loss = 0, norm = 0;
      measure_vector<T>({read(p.x), read(p.fake), read(p.real), read(p.real_uncond)}, guidance, difference,
                        seen[b].distance, peak);
      store_global(static_cast<T*>(p.gradient) + b * p.sample_size + i,
                   finish_vector<T>(difference, divided, weight, weight * scale, loss, norm));
      seen[b].loss += loss;
      seen[b].norm += norm;
    }
    seen[b].peak = magnitude_bits(peak);
  }
  return V;
}

}  // namespace
}  // namespace rf::dmd_gradient

// data: x, fake, real, real_uncond, weight [B], gradient, divisors [B], results [B] of Seen. sizes: dtype, B,
// M. values: guidance of real, 1 / N. Returns the elements of one access.
extern "C" int dmd_gradient_straight(const int64_t* sizes, void* const* data, const double* values) {
  using namespace rf::dmd_gradient;
  Params p;
  p.batch = sizes[1];
  p.sample_size = sizes[2];
  p.x = data[0];
  p.fake = data[1];
  p.real = data[2];
  p.real_uncond = data[3];
  p.weight.data = data[4];
  p.weight.batch_stride = 1;
  p.gradient = data[5];
  p.real_guidance = values[0];
  const float* divisors = static_cast<const float*>(data[6]);
  const float scale = static_cast<float>(values[1]);
  Seen* seen = static_cast<Seen*>(data[7]);
  return sizes[0] == 0   ? run_straight<rf::bf16>(p, divisors, scale, seen)
         : sizes[0] == 1 ? run_straight<rf::f16>(p, divisors, scale, seen)
                         : run_straight<float>(p, divisors, scale, seen);
}

extern "C" void dmd_gradient_divide(int64_t n, const float* v, float divisor, float* out) {
  const rf::dmd_gradient::Divider divided(divisor);
  for (int64_t i = 0; i < n; ++i) out[i] = divided(v[i]);
}

// Whether a call takes the straight path that departs from the usual one in option `departure`; 0: in none.
extern "C" bool dmd_gradient_usual(int departure) {
  using namespace rf::dmd_gradient;
  const float one = 1;
  Params p;
  p.real_uncond = p.weight.data = &one;
  p.batch = p.tiles = 1;
  p.vectorised = true;
  switch (departure) {
    case 1:
      p.vectorised = false;
      break;
    case 2:
      p.dtype = rf::Dtype::kBFloat16;
      break;
    case 3:
      p.dtype = p.prediction_dtype = rf::Dtype::kFloat64;
      break;
    case 4:
      p.normalize = false;
      break;
    case 5:
      p.nan_rule = NanRule::kPublished;
      break;
    case 6:
      p.fake_uncond = &one;
      break;
    case 7:
      p.real_uncond = nullptr;
      break;
    case 8:
      p.x_t = &one;
      break;
    case 9:
      p.mask.data = &one;
      break;
    case 10:
      p.weight.dims = 1;
      break;
    case 11:
      p.batch = 0;
      break;
    case 12:
      p.batch = int64_t{1} << 31;
      break;
  }
  return usual(p);
}

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
