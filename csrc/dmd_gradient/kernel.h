// The body of dmd_gradient for V neighbouring elements of one sample: what a CUDA thread does per 16-byte
// vector and the CPU per chunk. Same source, same order of operations, tails included.
#pragma once

#include "csrc/dmd_gradient/config.h"
#include "csrc/math/guidance.h"
#include "csrc/math/vec.h"

// Keeps a loop a loop in device code.
#if defined(__CUDACC__)
#define RF_ROLLED _Pragma("unroll 1")
#else
#define RF_ROLLED
#endif

namespace rf::dmd_gradient {

// A power of two of values, as a tree.
template <int N, typename S, typename A>
RF_HD S tree_sum_as(const A* v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    return tree_sum_as<N / 2, S>(v) + tree_sum_as<N / 2, S>(v + N / 2);
  }
}

// n of V elements; those beyond are 0. `vectorised`: where n = V, aligned 16-byte pieces may be read.
template <int V, typename S, typename A>
RF_HD void load(const void* base, int64_t at, int n, bool vectorised, A* out) {
  const S* p = static_cast<const S*>(base) + at;
#if defined(__CUDA_ARCH__)
  if (vectorised && n == V) {
    const Vec<S, V> packed = load_vec<V>(p);
    RF_UNROLL
    for (int k = 0; k < V; ++k) out[k] = static_cast<A>(to_acc(packed.v[k]));
    return;
  }
#else
  if (n == V) {  // no alignment to care for, and a copy less
    if (vectorised) check_access(p, V * sizeof(S));
    for (int k = 0; k < V; ++k) out[k] = static_cast<A>(to_acc(p[k]));
    return;
  }
#endif
  RF_UNROLL
  for (int k = 0; k < V; ++k) out[k] = k < n ? static_cast<A>(to_acc(p[k])) : A(0);
}

template <int V, typename S, typename A>
RF_HD void store(void* base, int64_t at, int n, bool vectorised, const A* in) {
  S* p = static_cast<S*>(base) + at;
#if defined(__CUDA_ARCH__)
  if (vectorised && n == V) {
    Vec<S, V> packed;
    RF_UNROLL
    for (int k = 0; k < V; ++k) packed.v[k] = from_acc<S>(in[k]);
    // Through the intrinsic: in reach of the scalar branch below, nvcc splits a plain 16-byte store into
    // words.
    RF_UNROLL
    for (int i = 0; i < static_cast<int>(sizeof(packed)) / 16; ++i) {
      uint4 raw;
      memcpy(&raw, reinterpret_cast<const char*>(&packed) + 16 * i, 16);
      __stwb(reinterpret_cast<uint4*>(p) + i, raw);
    }
    return;
  }
#else
  if (n == V) {
    if (vectorised) check_access(p, V * sizeof(S));
    for (int k = 0; k < V; ++k) p[k] = from_acc<S>(in[k]);
    return;
  }
#endif
  RF_UNROLL
  for (int k = 0; k < V; ++k)
    if (k < n) p[k] = from_acc<S>(in[k]);
}

// Offset of element i of sample b, and how many elements from i on lie in the same run of the fastest
// dimension. Loops stay rolled: the divisions are long code, and most tensors have one or two dimensions
// left.
RF_HD int64_t broadcast_offset(const Broadcast& t, int64_t b, int64_t i, int64_t& run) {
  int64_t offset = b * t.batch_stride;
  run = INT64_MAX;
  RF_ROLLED
  for (int d = t.dims - 1; d >= 0; --d) {
    const int64_t size = t.size[d];
    int64_t above, at;
    if ((i | size) <= 0xFFFFFFFFll) {  // 32-bit division is several times faster
      above = static_cast<uint32_t>(i) / static_cast<uint32_t>(size);
      at = static_cast<uint32_t>(i) - static_cast<uint32_t>(above) * static_cast<uint32_t>(size);
    } else {
      above = i / size;
      at = i - above * size;
    }
    if (d == t.dims - 1) run = size - at;
    offset += at * t.stride[d];
    i = above;
  }
  return offset;
}

RF_HD int as_value(uint8_t v) {
  return v != 0;
}
RF_HD float as_value(float v) {
  return v;
}
RF_HD double as_value(double v) {
  return v;
}

// Elements i .. i + n of a broadcast tensor, run by run; those beyond n are 0.
template <int V, typename S, typename A>
RF_HD void load_broadcast(const Broadcast& t, int64_t b, int64_t i, int n, A* out) {
  const int64_t stride = t.dims > 0 ? t.stride[t.dims - 1] : 0;
  RF_UNROLL
  for (int k = 0; k < V; ++k) out[k] = A(0);
  int64_t run;
  RF_ROLLED
  for (int begin = 0; begin < n; begin += static_cast<int>(run)) {
    const S* p = static_cast<const S*>(t.data) + broadcast_offset(t, b, i + begin, run);
    const int end = run < n - begin ? begin + static_cast<int>(run) : n;
    run = end - begin;
    if (t.vectorised && run == V) {
      const Vec<S, V> packed = load_vec<V>(p);
      RF_UNROLL
      for (int k = 0; k < V; ++k) out[k] = as_value(packed.v[k]);
    } else if (stride == 0) {
      const A v = as_value(*p);
      RF_UNROLL
      for (int k = 0; k < V; ++k) out[k] = k >= begin && k < end ? v : out[k];
    } else {
      RF_UNROLL
      for (int k = 0; k < V; ++k)
        if (k >= begin && k < end) out[k] = as_value(p[(k - begin) * stride]);
    }
  }
}

template <typename P, int V, typename A>
RF_HD void load_guided(const void* cond, const void* uncond, double guidance, int64_t at, int n,
                       bool vectorised, A* out) {
  load<V, P>(cond, at, n, vectorised, out);
  if (uncond == nullptr) return;
  A other[V];
  load<V, P>(uncond, at, n, vectorised, other);
  const A g = static_cast<A>(guidance);
  RF_UNROLL
  for (int k = 0; k < V; ++k) out[k] = guided(out[k], other[k], g);
}

// difference = fake - real; distance = |x - real| (0 where it is not asked for). Elements beyond n are 0.
//
// With flow, fake - real = sigma (v_real - v_fake): x_t cancels on paper, so it is left out instead of being
// rounded twice.
template <typename T, typename P, int V, typename A>
RF_HD void estimate(const Params& p, int64_t b, int64_t i, int n, bool with_distance, A* difference,
                    A* distance) {
  const int64_t at = b * p.sample_size + i;
  A fake[V], real[V];
  load_guided<P, V>(p.fake, p.fake_uncond, p.fake_guidance, at, n, p.vectorised, fake);
  load_guided<P, V>(p.real, p.real_uncond, p.real_guidance, at, n, p.vectorised, real);
  if (p.x_t != nullptr) {
    A sigma[V];
    load_broadcast<V, A>(p.sigma, b, i, n, sigma);
    RF_UNROLL
    for (int k = 0; k < V; ++k) difference[k] = sigma[k] * (real[k] - fake[k]);
    if (with_distance) {
      load<V, P>(p.x_t, at, n, p.vectorised, fake);
      RF_UNROLL
      for (int k = 0; k < V; ++k) real[k] = fake[k] - sigma[k] * real[k];
    }
  } else {
    RF_UNROLL
    for (int k = 0; k < V; ++k) difference[k] = fake[k] - real[k];
  }
  if (!with_distance) return;
  load<V, T>(p.x, at, n, p.vectorised, fake);
  RF_UNROLL
  for (int k = 0; k < V; ++k) distance[k] = absolute(fake[k] - real[k]);
}

// Largest magnitude of the differences and, as infinity, of a weight that is not finite: a sample with a NaN
// reward is as lost as one with a NaN prediction.
template <int V, typename A>
RF_HD magnitude_t<A> peak_of(const Params& p, int64_t b, int64_t i, int n, const A* difference) {
  magnitude_t<A> peak = 0;
  RF_UNROLL
  for (int k = 0; k < V; ++k) {
    const magnitude_t<A> m = magnitude_bits(difference[k]);
    peak = m > peak ? m : peak;
  }
  if (p.weight.data != nullptr) {
    A weight[V];
    load_broadcast<V, A>(p.weight, b, i, n, weight);
    RF_UNROLL
    for (int k = 0; k < V; ++k) {
      const magnitude_t<A> m = is_finite(weight[k]) ? 0 : magnitude_bits(weight[k]);
      peak = m > peak ? m : peak;
    }
  }
  return peak;
}

template <int V>
RF_HD int count_selected(const Params& p, int64_t b, int64_t i, int n) {
  int selected[V];
  load_broadcast<V, uint8_t>(p.mask, b, i, n, selected);
  int count = 0;
  RF_UNROLL
  for (int k = 0; k < V; ++k) count += selected[k];
  return count;
}

// From the differences of a sample that is not silent: the gradient, stored, and the terms w m d^2 and |d| of
// the two sums. The coefficient w / N is formed first: under the published rule d may be the largest float.
template <typename T, typename P, int V, typename A>
RF_HD void finish(const Params& p, int64_t b, int64_t i, int n, A divisor, A scale, const A* difference,
                  A* loss_term, A* norm_term) {
  A d[V], gradient[V];
  if (p.nan_rule == NanRule::kPublished) {
    const A limit = static_cast<A>(largest_finite<P>());
    RF_UNROLL
    for (int k = 0; k < V; ++k) {
      d[k] = nan_to_num(difference[k] / divisor, limit);
      norm_term[k] = absolute(d[k]);
    }
  } else {
    RF_UNROLL
    for (int k = 0; k < V; ++k) {
      d[k] = difference[k] / divisor;
      norm_term[k] = absolute(d[k]);
    }
  }
  if (p.weight.data != nullptr) {
    A weight[V];
    load_broadcast<V, A>(p.weight, b, i, n, weight);
    RF_UNROLL
    for (int k = 0; k < V; ++k) {
      gradient[k] = (weight[k] * scale) * d[k];
      loss_term[k] = (weight[k] * d[k]) * d[k];
    }
  } else {
    RF_UNROLL
    for (int k = 0; k < V; ++k) {
      gradient[k] = scale * d[k];
      loss_term[k] = d[k] * d[k];
    }
  }
  if (p.mask.data != nullptr) {
    int selected[V];
    load_broadcast<V, uint8_t>(p.mask, b, i, n, selected);
    RF_UNROLL
    for (int k = 0; k < V; ++k) {
      gradient[k] = selected[k] ? gradient[k] : A(0);
      loss_term[k] = selected[k] ? loss_term[k] : A(0);
    }
  }
  store<V, T>(p.gradient, b * p.sample_size + i, n, p.vectorised, gradient);
}

}  // namespace rf::dmd_gradient
