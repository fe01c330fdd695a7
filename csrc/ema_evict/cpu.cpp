// CPU backend: a row is computed by one thread from start to end, so the bits do not depend on how many there
// are. In vectors of eight where the layout of a head allows it, else by the body of the CUDA kernel
// (kernel.h), one lane a row.
#include <algorithm>
#include <atomic>
#include <vector>

#include "csrc/common/torch_stable.h"
#include "csrc/ema_evict/kernel.h"
#include "csrc/ema_evict/launch.h"
#include "csrc/math/simd.h"

namespace rf::ema_evict {
namespace {

// f(row) for every row, spread over the threads.
template <typename F>
void for_each_row(const Params& p, const F& f) {
  const int64_t elements = int64_t{p.heads} * p.head_dim;
  const int64_t grain = std::max<int64_t>(1, 16384 / elements);
  torch::stable::parallel_for(0, p.batch * p.sink_frames * p.frame_tokens, grain,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t row = begin; row < end; ++row) f(row);
                              });
}

struct OneLane {
  int lane = 0, lanes = 1;
  bool all(bool mine) const { return mine; }
  void count(int64_t* counter, int n) const {
    std::atomic_ref<int64_t>(*counter).fetch_add(n, std::memory_order_relaxed);
  }
};

template <typename T, EmaState kState, int N>
void rows(const Params& p) {
  const Units units(p, N);
  for_each_row(p, [&](int64_t row) {
    const int64_t t = row % p.frame_tokens, j = row / p.frame_tokens % p.sink_frames;
    const int64_t b = row / p.frame_tokens / p.sink_frames;
    for (int first = 0; first == 0 || first < p.sources; first += kGroup)
      evict_row<T, kState, N>(p, units, b, j, t, first, OneLane{});
  });
}

#if defined(RF_SIMD)
using simd::F8;
using simd::kWidth;

// The turns of one source, or of a slot, for eight dims: those of pairs (2i, 2i + 1) inside of them, or of
// eight pairs across two vectors. `same`: all ones where the angle is zero.
struct Turn {
  alignas(32) float a[kWidth], b[kWidth], same[kWidth];
};

// Every turn of a call: [plans, S, E + 1, vectors with pairs].
struct Turns {
  int vectors;
  bool inside;
  std::vector<Turn> all;

  explicit Turns(const Params& p) : inside(p.step == 2) {
    vectors = ((inside ? 2 : 1) * p.temporal_pairs + kWidth - 1) / kWidth;
    const int64_t plans = p.turns_stride_b == 0 ? 1 : p.batch;
    const int64_t tables = p.sink_frames * (p.sources + 1);
    all.resize(static_cast<size_t>(plans * tables * vectors));
    for (int64_t i = 0; i < plans * tables; ++i) {
      const float* table = static_cast<const float*>(p.turns) + i / tables * p.turns_stride_b +
                           i % tables * p.temporal_pairs * 2;
      for (int v = 0; v < vectors; ++v) fill(all[i * vectors + v], table, v, p.temporal_pairs);
    }
  }
  // A NaN without lower bits (simd::round_number).
  static float quiet(float v) { return v == v ? v : bits_to_float(0x7FC00000u); }
  void fill(Turn& turn, const float* table, int v, int pairs) const {
    for (int e = 0; e < kWidth; ++e) {
      const int pair = inside ? v * kWidth / 2 + e / 2 : v * kWidth + e;
      const float cosine = pair < pairs ? quiet(table[2 * pair]) : 1.f;
      const float sine = pair < pairs ? quiet(table[2 * pair + 1]) : 0.f;
      // Inside, an even dim becomes x * cosine + y * -sine and an odd one x * sine + y * cosine.
      turn.a[e] = inside && e % 2 == 1 ? sine : cosine;
      turn.b[e] = inside && e % 2 == 1 ? cosine : inside ? -sine : sine;
      turn.same[e] = bits_to_float(cosine == 1.f && sine == 0.f ? 0xFFFFFFFFu : 0u);
    }
  }
  const Turn* of(const Params& p, int64_t b, int64_t j, int64_t source) const {
    const int64_t plan = p.turns_stride_b == 0 ? 0 : b;
    return all.data() + ((plan * p.sink_frames + j) * (p.sources + 1) + source) * vectors;
  }
};

// turn_pair (math/ema.h) of eight dims.
template <Unit kUnit>
inline void turn(const Turn& t, F8 (&x)[2]) {
  const F8 a = _mm256_load_ps(t.a), b = _mm256_load_ps(t.b), same = _mm256_load_ps(t.same);
  if constexpr (kUnit == Unit::kInside) {
    const F8 turned =
        _mm256_fmadd_ps(_mm256_moveldup_ps(x[0]), a, _mm256_mul_ps(_mm256_movehdup_ps(x[0]), b));
    x[0] = _mm256_blendv_ps(turned, x[0], same);
  } else if constexpr (kUnit == Unit::kAcross) {
    const F8 tx = _mm256_fmsub_ps(x[0], a, _mm256_mul_ps(x[1], b));
    const F8 ty = _mm256_fmadd_ps(x[0], b, _mm256_mul_ps(x[1], a));
    x[0] = _mm256_blendv_ps(tx, x[0], same);
    x[1] = _mm256_blendv_ps(ty, x[1], same);
  }
}

// ema_join (math/ema.h).
inline F8 join(F8 hi, F8 lo) {
  return _mm256_blendv_ps(_mm256_add_ps(hi, lo), hi, _mm256_cmp_ps(lo, _mm256_setzero_ps(), _CMP_EQ_OQ));
}

template <typename T, EmaState kState>
inline F8 fuse(const EmaWeights<float>& w, F8 state, F8 x) {
  const F8 keep = _mm256_set1_ps(w.keep), tail = _mm256_set1_ps(w.keep_tail), take = _mm256_set1_ps(w.take);
  if constexpr (kState == EmaState::kPublished) {
    const F8 kept = simd::round_number<T>(_mm256_mul_ps(keep, state));
    const F8 taken = simd::round_number<T>(_mm256_mul_ps(take, x));
    return simd::round_number<T>(_mm256_add_ps(kept, taken));
  } else {
    const F8 sum = _mm256_fmadd_ps(keep, state, _mm256_fmadd_ps(tail, state, _mm256_mul_ps(take, x)));
    if constexpr (kState == EmaState::kFloat32) return sum;
    // As in math/ema.h: a difference of zero is +0, and to subtract that leaves every number as it is.
    const F8 hi = simd::round_number<T>(sum);
    return _mm256_sub_ps(hi, simd::round_number<T>(_mm256_sub_ps(hi, sum)));
  }
}

// One head of keys or values of a row, and the sources that are fused into it.
template <typename T>
struct Head {
  T *slot, *hi, *lo;
  float* f32;
  bool separate, init;
  EmaWeights<float> weights;
  int count;
  const T* const* sources;   // of this head
  const Turn* const* turns;  // of each source
  const Turn* slot_turn;
};

template <typename T, EmaState kState, Unit kUnit>
inline void fuse_dims(const Head<T>& h, const int (&dim)[2], int v) {
  constexpr int kVecs = kUnit == Unit::kAcross ? 2 : 1;
  F8 s[2];
  for (int q = 0; q < kVecs; ++q) {
    if (kState == EmaState::kFloat32 && !h.init) {
      s[q] = simd::load(h.f32 + dim[q]);
    } else {
      s[q] = simd::load((h.init || !h.separate ? h.slot : h.hi) + dim[q]);
      if (kState == EmaState::kCompensated && !h.init) s[q] = join(s[q], simd::load(h.lo + dim[q]));
    }
  }
  for (int i = 0; i < h.count; ++i) {
    F8 x[2];
    for (int q = 0; q < kVecs; ++q) x[q] = simd::load(h.sources[i] + dim[q]);
    if constexpr (kUnit != Unit::kPlain) turn<kUnit>(h.turns[i][v], x);
    for (int q = 0; q < kVecs; ++q) s[q] = fuse<T, kState>(h.weights, s[q], x[q]);
  }
  F8 out[2] = {s[0], s[kVecs - 1]};
  if (h.init || h.count != 0) {
    for (int q = 0; q < kVecs; ++q) {
      if constexpr (kState == EmaState::kFloat32) {
        simd::store_exact(h.f32 + dim[q], s[q]);
      } else {
        out[q] = simd::round<T>(s[q]);
        if (h.separate) simd::store_exact(h.hi + dim[q], out[q]);
        if constexpr (kState == EmaState::kCompensated)  // s is hi + lo of dtype T: so is the difference
          simd::store_exact(h.lo + dim[q], simd::canonical<T>(_mm256_sub_ps(s[q], out[q])));
      }
    }
  }
  if (!h.separate && h.count == 0) return;
  const bool turned = kUnit != Unit::kPlain && h.separate;
  if constexpr (kUnit != Unit::kPlain) {
    if (turned) {
      for (int q = 0; q < kVecs; ++q) out[q] = s[q];
      turn<kUnit>(h.slot_turn[v], out);
    }
  }
  const bool rounded = kState != EmaState::kFloat32 && !turned && (h.init || h.count != 0);
  for (int q = 0; q < kVecs; ++q)
    simd::store_exact(h.slot + dim[q], rounded ? out[q] : simd::round<T>(out[q]));
}

template <typename T, EmaState kState>
void fuse_plain(const Head<T>& h, int begin, int end) {
  for (int d = begin; d < end; d += kWidth) fuse_dims<T, kState, Unit::kPlain>(h, {d, 0}, 0);
}

// The rows of a call, by a thread.
template <typename T, EmaState kState>
struct Rows {
  const Params& p;
  const Turns& turns;
  std::vector<int> fused;  // places of the sources that are fused, in the entry
  std::vector<const T*> sources;
  std::vector<const Turn*> source_turns;

  const T* token(const void* cache, int64_t b, int64_t frame, int64_t t, bool key) const {
    const int64_t stride_b = key ? p.k_stride_b : p.v_stride_b, stride_t = key ? p.k_stride_t : p.v_stride_t;
    return static_cast<const T*>(cache) + b * stride_b + (frame * p.frame_tokens + t) * stride_t;
  }

  bool finite(const T* token, int64_t stride_h) const {
    if (stride_h == p.head_dim) return simd::all_finite(token, int64_t{p.heads} * p.head_dim);
    for (int h = 0; h < p.heads; ++h)
      if (!simd::all_finite(token + h * stride_h, p.head_dim)) return false;
    return true;
  }

  void keys(Head<T>& head) const {
    const int D = p.head_dim, span = turns.vectors * kWidth;
    if (turns.vectors == 0) return fuse_plain<T, kState>(head, 0, D);
    if (turns.inside) {
      fuse_plain<T, kState>(head, 0, p.x0);
      for (int v = 0; v < turns.vectors; ++v)
        fuse_dims<T, kState, Unit::kInside>(head, {p.x0 + v * kWidth, 0}, v);
      return fuse_plain<T, kState>(head, p.x0 + span, D);
    }
    fuse_plain<T, kState>(head, 0, p.x0);
    for (int v = 0; v < turns.vectors; ++v)
      fuse_dims<T, kState, Unit::kAcross>(head, {p.x0 + v * kWidth, p.y0 + v * kWidth}, v);
    fuse_plain<T, kState>(head, p.x0 + span, p.y0);
    fuse_plain<T, kState>(head, p.y0 + span, D);
  }

  void row(int64_t row) {
    const int64_t t = row % p.frame_tokens, j = row / p.frame_tokens % p.sink_frames;
    const int64_t b = row / p.frame_tokens / p.sink_frames;
    const int32_t* entry = p.schedule + b * p.schedule_stride_b + j * (2 + p.sources);
    fused.clear();
    for (int i = 0; i < entry[1]; ++i) {
      const int64_t source = entry[2 + i];
      if (!p.skip_nonfinite ||
          (finite(token(p.k_cache, b, source, t, true), p.k_stride_h) &&
           (!p.has_values() || finite(token(p.v_cache, b, source, t, false), p.v_stride_h))))
        fused.push_back(i);
    }
    const int skipped = entry[1] - static_cast<int>(fused.size());
    if (skipped != 0 && p.skipped != nullptr) OneLane{}.count(p.skipped, skipped);
    source_turns.clear();
    for (const int i : fused) source_turns.push_back(turns.of(p, b, j, i));
    sources.resize(fused.size());

    Head<T> head{};
    head.init = entry[0] != 0;
    head.weights = ema_weights<float>(p.alpha[j * p.alpha_stride_frame + t * p.alpha_stride_token]);
    head.count = static_cast<int>(fused.size());
    head.sources = sources.data();
    head.turns = source_turns.data();
    head.slot_turn = turns.of(p, b, j, p.sources);
    for (const bool key : {true, false}) {
      if (!key && !p.has_values()) break;
      head.separate = key && p.k_state != nullptr;
      if (!head.separate && !head.init && fused.empty()) continue;
      const void* cache = key ? p.k_cache : p.v_cache;
      T* slot = const_cast<T*>(token(cache, b, j, t, key));
      for (int h = 0; h < p.heads; ++h) {
        const int64_t stride_h = key ? p.k_stride_h : p.v_stride_h;
        const int64_t at = (row * p.heads + h) * p.head_dim;  // in the states
        head.slot = slot + h * stride_h;
        if constexpr (kState == EmaState::kFloat32) {
          head.f32 = static_cast<float*>(key ? p.k_state : p.v_state) + at;
        } else {
          head.hi = head.separate ? static_cast<T*>(p.k_state) + at : nullptr;
          if constexpr (kState == EmaState::kCompensated)
            head.lo = static_cast<T*>(key ? p.k_state_lo : p.v_state) + at;
        }
        for (size_t i = 0; i < fused.size(); ++i)
          sources[i] = token(cache, b, entry[2 + fused[i]], t, key) + h * stride_h;
        if (key)
          keys(head);
        else
          fuse_plain<T, kState>(head, 0, p.head_dim);
      }
    }
  }
};

template <typename T, EmaState kState>
const char* run_simd(const Params& p) {
  const Turns turns(p);
  const int64_t elements = int64_t{p.heads} * p.head_dim;
  const int64_t grain = std::max<int64_t>(1, 16384 / elements);
  torch::stable::parallel_for(0, p.batch * p.sink_frames * p.frame_tokens, grain,
                              [&](int64_t begin, int64_t end) {
                                Rows<T, kState> rows{p, turns, {}, {}, {}};
                                for (int64_t row = begin; row < end; ++row) rows.row(row);
                              });
  return "AVX2";
}
#endif

template <typename T, EmaState kState>
const char* run(const Params& p) {
  if (layout_fits<8>(p)) {
#if defined(RF_SIMD)
    if constexpr (sizeof(T) <= 4) return run_simd<T, kState>(p);
#endif
    rows<T, kState, 8>(p);
    return "vectors of 8";
  }
  rows<T, kState, 1>(p);
  return "scalar: head_dim or the place of its temporal pairs is no multiple of 8";
}

}  // namespace

const char* run_cpu(const Params& p) {
  return with_state(p, [&]<typename T, EmaState kState>() { return run<T, kState>(p); });
}

}  // namespace rf::ema_evict
