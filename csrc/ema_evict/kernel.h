// One row of ema_evict: token t of sink frame j of sample b, keys and values, all heads. The same body runs
// as a thread block on the GPU (launch.cu) and as a loop on the CPU (cpu.cpp); `Lanes` says which lane this
// is, of how many, and how the lanes agree on whether a token is finite.
#pragma once

#include "csrc/ema_evict/config.h"
#include "csrc/math/dtype.h"
#include "csrc/math/ema.h"
#include "csrc/math/vec.h"

namespace rf::ema_evict {

// ---- Units: how a head's D dims are cut into work for one lane. A rotated pair never leaves its unit, so
// the lanes exchange nothing.
enum class Unit {
  kPlain,   // one vector without temporal pairs
  kInside,  // one vector, pairs (2i, 2i + 1) inside it
  kAcross,  // two vectors, pairs (x + i, y + i)
};

// The units of a head's keys: first those with temporal pairs, then the plain ones, which fill the gaps.
template <int N>
struct KeyUnits {
  bool two_spans;     // x and y lie in spans of their own (step 1), or interleaved in one (step 2)
  int paired, count;  // units with pairs; all units
  int span0, span1, vectors_a_span;  // where the paired units lie, in vectors

  RF_HD explicit KeyUnits(const Params& p) {
    two_spans = p.step == 1;
    vectors_a_span = ((two_spans ? 1 : 2) * p.temporal_pairs + N - 1) / N;
    paired = N == 1 ? p.temporal_pairs : vectors_a_span;
    count = paired + p.head_dim / N - (two_spans ? 2 : 1) * vectors_a_span;
    span0 = p.x0 / N;
    span1 = p.y0 / N;
  }
  // First dim of the i-th plain unit.
  RF_HD int plain_dim(int i) const {
    if (i >= span0) i += vectors_a_span;
    if (two_spans && i >= span1) i += vectors_a_span;
    return i * N;
  }
};

// A lane's way through (head, unit), without a division a step.
struct Cursor {
  int head, unit, units_a_head, head_step, unit_step;

  RF_HD Cursor(int lane, int lanes, int units_a_head)
      : head(lane / units_a_head),
        unit(lane % units_a_head),
        units_a_head(units_a_head),
        head_step(lanes / units_a_head),
        unit_step(lanes % units_a_head) {}
  RF_HD void next() {
    head += head_step;
    unit += unit_step;
    if (unit >= units_a_head) {
      unit -= units_a_head;
      ++head;
    }
  }
};

// ---- Rows

// Keys or values of one row.
template <typename T>
struct Stream {
  T* frame0;                   // this token in frame slot 0
  int64_t stride_f, stride_h;  // from frame slot to frame slot, from head to head
  bool separate;               // the slot is written from the state (keys); else it is the state (values)
  T* hi;                       // [H, D] state: hi of a pair, or the whole of it in the cache's dtype
  T* lo;                       // [H, D]
  float* f32;                  // [H, D]
  const acc_t<T>* turns;       // [E + 1, nt, 2]
};

// Up to kGroup sources of a row: one bit each says whether the token is fused. More go group after group; the
// state between two groups is what the state's storage holds anyway, so the split changes no bit.
template <typename T>
struct Group {
  EmaWeights<acc_t<T>> weights;
  int64_t frame;          // the sink frame, j
  const int32_t* source;  // frame slots of the group
  int first, size;        // place of the group among the row's sources
  uint32_t fuse;
  bool init, last;  // state <- slot comes first; slot <- state comes last
};

// Whether this lane's share of a source token (all heads of K and V) is finite.
template <typename T, int N, typename Lanes>
RF_HD bool finite_share(const Params& p, const Stream<T>& k, const Stream<T>& v, int64_t source,
                        const Lanes& lanes) {
  const T* k_token = k.frame0 + source * k.stride_f;
  const T* v_token = v.frame0 + source * v.stride_f;
  int nonfinite = 0;  // an integer sum, so that the host's compiler sees a vector reduction
  RF_NO_UNROLL
  for (Cursor at(lanes.lane, lanes.lanes, p.head_dim / N); at.head < p.heads; at.next()) {
    const Vec<T, N> a = load_vec<N>(k_token + at.head * k.stride_h + at.unit * N);
    const Vec<T, N> b = load_vec<N>(v_token + at.head * v.stride_h + at.unit * N);
    RF_UNROLL
    for (int e = 0; e < N; ++e)
      nonfinite += (is_finite(to_acc(a.v[e])) ? 0 : 1) + (is_finite(to_acc(b.v[e])) ? 0 : 1);
  }
  return nonfinite == 0;
}

// The pairs of one unit, turned; those past the temporal ones stay as they are.
template <int N, Unit kUnit, typename A, int kVecs>
RF_HD void turn_unit(const A* table, int first_pair, int temporal_pairs, A (&a)[kVecs][N]) {
  if constexpr (kUnit != Unit::kPlain) {
    constexpr int kPairs = kUnit == Unit::kInside ? N / 2 : N;
    A cosine[kPairs], sine[kPairs];
    RF_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      const int pair = first_pair + i;
      const bool temporal = pair < temporal_pairs;
      cosine[i] = temporal ? table[2 * pair] : A(1);
      sine[i] = temporal ? table[2 * pair + 1] : A(0);
    }
    RF_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      if constexpr (kUnit == Unit::kInside)
        turn_pair(cosine[i], sine[i], a[0][2 * i], a[0][2 * i + 1]);
      else
        turn_pair(cosine[i], sine[i], a[0][i], a[1][i]);
    }
  }
}

template <typename T, EmaState kState, int N>
RF_HD void load_state(const Stream<T>& stream, const T* slot, int64_t at, bool init, acc_t<T> (&s)[N]) {
  if (kState == EmaState::kFloat32 && !init) {
    const Vec<float, N> f = load_vec<N>(stream.f32 + at);
    RF_UNROLL
    for (int e = 0; e < N; ++e) s[e] = f.v[e];
    return;
  }
  const Vec<T, N> hi = load_vec<N>(init || !stream.separate ? slot : stream.hi + at);
  RF_UNROLL
  for (int e = 0; e < N; ++e) s[e] = to_acc(hi.v[e]);
  if (kState == EmaState::kCompensated && !init) {
    const Vec<T, N> lo = load_vec<N>(stream.lo + at);
    RF_UNROLL
    for (int e = 0; e < N; ++e) s[e] = ema_join(hi.v[e], lo.v[e]);
  }
}

// All of the state but a slot that is itself the state.
template <typename T, EmaState kState, int N>
RF_HD void store_state(const Stream<T>& stream, int64_t at, const acc_t<T> (&s)[N]) {
  if constexpr (kState == EmaState::kFloat32) {
    Vec<float, N> f;
    RF_UNROLL
    for (int e = 0; e < N; ++e) f.v[e] = s[e];
    store_vec(stream.f32 + at, f);
  } else {
    Vec<T, N> hi, lo;
    RF_UNROLL
    for (int e = 0; e < N; ++e) ema_split<T>(s[e], hi.v[e], lo.v[e]);
    if (stream.separate) store_vec(stream.hi + at, hi);
    if constexpr (kState == EmaState::kCompensated) store_vec(stream.lo + at, lo);
  }
}

// One unit of one stream: state and slot are each read and written once, whatever the number of sources.
template <typename T, EmaState kState, int N, Unit kUnit>
RF_HD void fuse_unit(const Params& p, const Stream<T>& stream, const Group<T>& group, int head,
                     const int (&dim)[2], int first_pair) {
  using A = acc_t<T>;
  // Nothing comes into a slot that is the state: it is not even read.
  if (!stream.separate && !group.init && group.fuse == 0) return;
  constexpr int kVecs = kUnit == Unit::kAcross ? 2 : 1;
  const int64_t row = static_cast<int64_t>(head) * p.head_dim;
  T* slot = stream.frame0 + group.frame * stream.stride_f + head * stream.stride_h;
  A s[kVecs][N];
  RF_UNROLL
  for (int q = 0; q < kVecs; ++q)
    load_state<T, kState, N>(stream, slot + dim[q], row + dim[q], group.init, s[q]);

  RF_NO_UNROLL
  for (int i = 0; i < group.size; ++i) {
    if ((group.fuse >> i & 1u) == 0) continue;
    const T* source = stream.frame0 + group.source[i] * stream.stride_f + head * stream.stride_h;
    A x[kVecs][N];
    RF_UNROLL
    for (int q = 0; q < kVecs; ++q) {
      const Vec<T, N> in = load_vec<N>(source + dim[q]);
      RF_UNROLL
      for (int e = 0; e < N; ++e) x[q][e] = to_acc(in.v[e]);
    }
    turn_unit<N, kUnit>(stream.turns + int64_t{2} * (group.first + i) * p.temporal_pairs, first_pair,
                        p.temporal_pairs, x);
    RF_UNROLL
    for (int q = 0; q < kVecs; ++q) RF_UNROLL
    for (int e = 0; e < N; ++e) s[q][e] = ema_fuse<T, kState>(group.weights, s[q][e], x[q][e]);
  }

  if (group.init || group.fuse != 0) {
    RF_UNROLL
    for (int q = 0; q < kVecs; ++q) store_state<T, kState, N>(stream, row + dim[q], s[q]);
  }
  if (stream.separate ? !group.last : group.fuse == 0) return;
  if (stream.separate)
    turn_unit<N, kUnit>(stream.turns + int64_t{2} * p.sources * p.temporal_pairs, first_pair,
                        p.temporal_pairs, s);
  RF_UNROLL
  for (int q = 0; q < kVecs; ++q) {
    Vec<T, N> out;
    RF_UNROLL
    for (int e = 0; e < N; ++e) out.v[e] = from_acc<T>(s[q][e]);
    store_vec(slot + dim[q], out);
  }
}

template <typename T, EmaState kState, int N, typename Lanes>
RF_HD void fuse_keys(const Params& p, const Stream<T>& k, const Group<T>& group, const Lanes& lanes) {
  const KeyUnits<N> units(p);
  RF_NO_UNROLL
  for (Cursor at(lanes.lane, lanes.lanes, units.count); at.head < p.heads; at.next()) {
    if (at.unit >= units.paired) {
      const int dim[2] = {units.plain_dim(at.unit - units.paired), 0};
      fuse_unit<T, kState, N, Unit::kPlain>(p, k, group, at.head, dim, 0);
    } else if (N > 1 && p.step == 2) {
      const int dim[2] = {p.x0 + at.unit * N, 0};
      fuse_unit<T, kState, N, (N > 1 ? Unit::kInside : Unit::kPlain)>(p, k, group, at.head, dim,
                                                                      at.unit * (N / 2));
    } else {
      const int offset = at.unit * N * p.step;
      const int dim[2] = {p.x0 + offset, p.y0 + offset};
      fuse_unit<T, kState, N, Unit::kAcross>(p, k, group, at.head, dim, at.unit * N);
    }
  }
}

template <typename T, EmaState kState, int N, typename Lanes>
RF_HD void fuse_values(const Params& p, const Stream<T>& v, const Group<T>& group, const Lanes& lanes) {
  RF_NO_UNROLL
  for (Cursor at(lanes.lane, lanes.lanes, p.head_dim / N); at.head < p.heads; at.next()) {
    const int dim[2] = {at.unit * N, 0};
    fuse_unit<T, kState, N, Unit::kPlain>(p, v, group, at.head, dim, 0);
  }
}

// Sources first .. first + 31 of a row; row = (b * S + j) * n + t. A source outside the frames after the sink
// is left out: on the GPU, where nobody has looked at the schedule, it would be a read out of bounds or of a
// slot that another row writes.
template <typename T, EmaState kState, int N, typename Lanes>
RF_HD void evict_row(const Params& p, int64_t row, int first, const Lanes& lanes) {
  const int64_t t = row % p.frame_tokens;
  const int64_t j = row / p.frame_tokens % p.sink_frames;
  const int64_t b = row / p.frame_tokens / p.sink_frames;
  const int32_t* entry = p.schedule + b * p.schedule_stride_b + j * (2 + p.sources);
  const int count = entry[1] < 0 ? 0 : (entry[1] > p.sources ? p.sources : entry[1]);
  if (first > 0 && first >= count) return;
  const int64_t state = row * p.heads * p.head_dim;
  const auto stream = [&](void* cache, int64_t stride_b, int64_t stride_t, int64_t stride_h) {
    Stream<T> s{};
    s.frame0 = static_cast<T*>(cache) + b * stride_b + t * stride_t;
    s.stride_f = p.frame_tokens * stride_t;
    s.stride_h = stride_h;
    return s;
  };
  Stream<T> k = stream(p.k_cache, p.k_stride_b, p.k_stride_t, p.k_stride_h);
  Stream<T> v = stream(p.v_cache, p.v_stride_b, p.v_stride_t, p.v_stride_h);
  k.separate = p.k_state != nullptr;
  if (kState == EmaState::kFloat32) {
    k.f32 = static_cast<float*>(p.k_state) + state;
    v.f32 = static_cast<float*>(p.v_state) + state;
  } else {
    if (k.separate) k.hi = static_cast<T*>(p.k_state) + state;
    if (kState == EmaState::kCompensated) {
      k.lo = static_cast<T*>(p.k_state_lo) + state;
      v.lo = static_cast<T*>(p.v_state) + state;
    }
  }
  k.turns = static_cast<const acc_t<T>*>(p.turns) + b * p.turns_stride_b +
            j * (p.sources + 1) * p.temporal_pairs * 2;
  v.turns = k.turns;  // never looked at: values have plain units alone

  Group<T> group;
  group.weights = ema_weights<acc_t<T>>(p.alpha[j * p.alpha_stride_frame + t * p.alpha_stride_token]);
  group.frame = j;
  group.source = entry + 2 + first;
  group.first = first;
  group.size = count - first < kGroup ? count - first : kGroup;
  group.init = entry[0] != 0 && first == 0;
  group.last = first + group.size == count;
  group.fuse = 0;
  int skipped = 0;
  RF_NO_UNROLL
  for (int i = 0; i < group.size; ++i) {
    const int64_t source = group.source[i];
    if (source < p.sink_frames || source >= p.frames) continue;
    if (!p.skip_nonfinite || lanes.all(finite_share<T, N>(p, k, v, source, lanes)))
      group.fuse |= 1u << i;
    else
      ++skipped;
  }
  fuse_keys<T, kState, N>(p, k, group, lanes);
  fuse_values<T, kState, N>(p, v, group, lanes);
  if (skipped != 0 && p.skipped != nullptr) lanes.count(p.skipped, skipped);
}

}  // namespace rf::ema_evict
