// One row of ema_evict: token t of sink frame j of sample b, keys and values, all heads. The same body runs
// as a thread block on the GPU (launch.cu) and, where a head's layout is odd, as a loop on the CPU (cpu.cpp);
// `Lanes` says which lane this is, of how many, and how the lanes agree on whether a token is finite.
#pragma once

#include "csrc/ema_evict/config.h"
#include "csrc/math/dtype.h"
#include "csrc/math/ema.h"
#include "csrc/math/vec.h"

namespace rf::ema_evict {

// Keys or values of one row.
template <typename T>
struct Stream {
  T* frame0;                   // this token in frame slot 0
  int64_t stride_f, stride_h;  // from frame slot to frame slot, from head to head
  bool separate;               // the slot is written from the state (keys); else it is the state (values)
  T* hi;                       // [H, D] state: hi of a pair, or the whole of it in the cache's dtype
  T* lo;                       // [H, D]
  float* f32;                  // [H, D]
};

// Up to kGroup sources of a row: one bit each says whether the token is fused. More go group after group; the
// state between two groups is what the state's storage holds anyway, so the split changes no bit.
template <typename T>
struct Group {
  EmaWeights<acc_t<T>> weights;
  int64_t frame;          // the sink frame, j
  const int32_t* source;  // frame slots of the group
  const acc_t<T>* turns;  // of the group's first source: [size, nt, 2]
  const acc_t<T>* slot_turn;
  int size;
  uint32_t fuse;
  bool init, last;  // state <- slot comes first; slot <- state comes last
};

enum class Unit { kIdle, kPlain, kInside, kAcross };

// Where a unit lies: one vector, or (kAcross) two.
struct Place {
  Unit kind;
  bool key;
  int first_pair;
  int head, dim[2];

  RF_HD Place(const Params& p, const Units& u, int i) : kind(Unit::kPlain), key(true), first_pair(0) {
    dim[1] = 0;
    if (i < u.paired) {
      head = u.paired_a_head.quotient(i);
      const int v = u.paired_a_head.remainder(i, head);
      kind = u.inside ? Unit::kInside : Unit::kAcross;
      first_pair = u.inside ? v * (u.vector / 2) : v * u.vector;
      const int offset = v * u.vector * (u.inside ? 1 : p.step);
      dim[0] = p.x0 + offset;
      dim[1] = p.y0 + offset;
      return;
    }
    if (i >= u.padded + u.plain - u.filled) {
      i -= u.padded + u.plain - u.filled;
      head = u.vectors_a_head.quotient(i);
      dim[0] = u.vectors_a_head.remainder(i, head) * u.vector;
      key = false;
      if (head >= p.heads) kind = Unit::kIdle;
      return;
    }
    if (i < u.padded) {
      // In a warp with pairs: turned like them, by no angle.
      kind = i < u.paired + u.filled ? Unit::kInside : Unit::kIdle;
      first_pair = p.temporal_pairs;
      i -= u.paired;
    } else {
      i -= u.padded - u.filled;
    }
    head = u.plain_a_head.quotient(i);
    dim[0] = u.plain_dim(p, u.plain_a_head.remainder(i, head));
  }
};

// What a lane reads of a unit before anything is decided: the state and one source.
template <typename T, int N>
struct Data {
  Vec<T, N> hi[2], lo[2], x[2];
  Vec<float, N> f32[2];
};

// A unit of a row: at `at`, of one stream.
template <typename T, EmaState kState, int N>
struct UnitOf {
  using A = acc_t<T>;
  const Params& p;
  const Group<T>& group;
  const Place& at;
  T* frame0;
  T* hi;
  T* lo;
  float* f32;
  int64_t stride_f;
  bool separate;

  RF_HD UnitOf(const Params& p, const Group<T>& group, const Stream<T>& k, const Stream<T>& v,
               const Place& at)
      : p(p), group(group), at(at) {
    const bool key = at.key;
    const int64_t state = static_cast<int64_t>(at.head) * p.head_dim;
    frame0 = (key ? k.frame0 : v.frame0) + at.head * (key ? k.stride_h : v.stride_h);
    hi = (key ? k.hi : v.hi) + state;
    lo = (key ? k.lo : v.lo) + state;
    f32 = (key ? k.f32 : v.f32) + state;
    stride_f = key ? k.stride_f : v.stride_f;
    separate = key && k.separate;
  }
  RF_HD T* slot(int q) const { return frame0 + group.frame * stride_f + at.dim[q]; }
  // Nothing comes into a slot that is the state: it is not even read.
  RF_HD bool untouched(bool fuses) const {
    return at.kind == Unit::kIdle || (!separate && !group.init && !fuses);
  }

  RF_HD void load_source(int i, Data<T, N>& d) const {
    if (at.kind == Unit::kIdle) return;
    const T* source = frame0 + group.source[i] * stride_f;
    d.x[0] = load_vec<N>(source + at.dim[0]);
    if (at.kind == Unit::kAcross) d.x[1] = load_vec<N>(source + at.dim[1]);
  }
  RF_HD void load_state(int q, Data<T, N>& d) const {
    if (kState == EmaState::kFloat32 && !group.init) {
      d.f32[q] = load_vec<N>(f32 + at.dim[q]);
      return;
    }
    d.hi[q] = load_vec<N>(group.init || !separate ? slot(q) : hi + at.dim[q]);
    if (kState == EmaState::kCompensated && !group.init) d.lo[q] = load_vec<N>(lo + at.dim[q]);
  }
  RF_HD void load_state(Data<T, N>& d) const {
    load_state(0, d);
    if (at.kind == Unit::kAcross) load_state(1, d);
  }
  RF_HD bool finite(const Data<T, N>& d) const {
    if (at.kind == Unit::kIdle) return true;
    if (at.kind == Unit::kAcross && !all_finite(d.x[1])) return false;
    return all_finite(d.x[0]);
  }

  // Pairs past the temporal ones stay as they are.
  template <Unit kUnit, int kTurned>
  RF_HD void turn(const A* table, A (&a)[kTurned][N]) const {
    if constexpr (kUnit == Unit::kPlain) return;
    constexpr int kPairs = kUnit == Unit::kInside ? N / 2 : N;
    A cosine[kPairs], sine[kPairs];
    RF_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      const int pair = at.first_pair + i;
      const bool temporal = pair < p.temporal_pairs;
      cosine[i] = temporal ? table[2 * pair] : A(1);
      sine[i] = temporal ? table[2 * pair + 1] : A(0);
    }
    RF_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      if constexpr (kUnit == Unit::kInside)
        turn_pair(cosine[i], sine[i], a[0][2 * i], a[0][2 * i + 1]);
      else
        turn_pair(cosine[i], sine[i], a[0][i], a[kTurned - 1][i]);
    }
  }

  RF_HD void state_of(const Data<T, N>& d, int q, A (&s)[N]) const {
    if (kState == EmaState::kFloat32 && !group.init) {
      RF_UNROLL
      for (int e = 0; e < N; ++e) s[e] = d.f32[q].v[e];
      return;
    }
    vec_to_acc(d.hi[q], s);
    if (kState == EmaState::kCompensated && !group.init) {
      A tail[N];
      vec_to_acc(d.lo[q], tail);
      RF_UNROLL
      for (int e = 0; e < N; ++e) s[e] = ema_join(s[e], tail[e]);
    }
  }

  // All of the state but a slot that is itself the state.
  RF_HD void store_state(int q, const A (&s)[N]) const {
    if constexpr (kState == EmaState::kFloat32) {
      Vec<float, N> out;
      RF_UNROLL
      for (int e = 0; e < N; ++e) out.v[e] = s[e];
      store_global(f32 + at.dim[q], out);
    } else {
      const Vec<T, N> high = vec_from_acc<T>(s);
      if (separate) store_global(hi + at.dim[q], high);
      if constexpr (kState == EmaState::kCompensated) {
        A rounded[N], tail[N];
        vec_to_acc(high, rounded);
        RF_UNROLL
        for (int e = 0; e < N; ++e) tail[e] = ema_tail(s[e], rounded[e]);
        store_global(lo + at.dim[q], vec_from_acc<T>(tail));
      }
    }
  }

  template <Unit kUnit>
  RF_HD void finish_as(Data<T, N>& d) const {
    constexpr int kUsed = kUnit == Unit::kAcross ? 2 : 1;
    A s[kUsed][N];
    RF_UNROLL
    for (int q = 0; q < kUsed; ++q) state_of(d, q, s[q]);
    RF_NO_UNROLL
    for (int i = 0; i < group.size; ++i) {
      if ((group.fuse >> i & 1u) == 0) continue;
      load_source(i, d);
      A x[kUsed][N];
      RF_UNROLL
      for (int q = 0; q < kUsed; ++q) vec_to_acc(d.x[q], x[q]);
      turn<kUnit>(group.turns + int64_t{2} * i * p.temporal_pairs, x);
      RF_UNROLL
      for (int q = 0; q < kUsed; ++q) ema_fuse<T, kState>(group.weights, s[q], x[q]);
    }
    if (group.init || group.fuse != 0) {
      RF_UNROLL
      for (int q = 0; q < kUsed; ++q) store_state(q, s[q]);
    }
    if (separate ? !group.last : group.fuse == 0) return;
    if (separate) turn<kUnit>(group.slot_turn, s);
    RF_UNROLL
    for (int q = 0; q < kUsed; ++q) store_global(slot(q), vec_from_acc<T>(s[q]));
  }
  RF_HD void finish(Data<T, N>& d) const {
    if (untouched(group.fuse != 0)) return;
    if (N > 1 && at.kind == Unit::kInside) return finish_as<(N > 1 ? Unit::kInside : Unit::kPlain)>(d);
    if (at.kind == Unit::kAcross) return finish_as<Unit::kAcross>(d);
    finish_as<Unit::kPlain>(d);
  }
};

// Sources first .. first + 31 of row (b, j, t). A source outside the frames after the sink is left out: on
// the GPU, where nobody has looked at the schedule, it would be a read out of bounds or of a slot that
// another row writes.
template <typename T, EmaState kState, int N, typename Lanes>
RF_HD void evict_row(const Params& p, const Units& units, int64_t b, int64_t j, int64_t t, int first,
                     const Lanes& lanes) {
  const int32_t* entry = p.schedule + b * p.schedule_stride_b + j * (2 + p.sources);
  const int count = entry[1] < 0 ? 0 : (entry[1] > p.sources ? p.sources : entry[1]);
  if (first != 0 && first >= count) return;
  const int64_t state = ((b * p.sink_frames + j) * p.frame_tokens + t) * p.heads * p.head_dim;
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

  Group<T> group;
  group.weights = ema_weights<acc_t<T>>(p.alpha[j * p.alpha_stride_frame + t * p.alpha_stride_token]);
  group.frame = j;
  group.source = entry + 2 + first;
  group.size = count - first < kGroup ? count - first : kGroup;
  const acc_t<T>* turns = static_cast<const acc_t<T>*>(p.turns) + b * p.turns_stride_b +
                          j * (p.sources + 1) * p.temporal_pairs * 2;
  group.turns = turns + int64_t{2} * first * p.temporal_pairs;
  group.slot_turn = turns + int64_t{2} * p.sources * p.temporal_pairs;
  group.init = entry[0] != 0 && first == 0;
  group.last = first + group.size == count;
  group.fuse = 0;
  const auto inside = [&](int i) { return group.source[i] >= p.sink_frames && group.source[i] < p.frames; };
  using Body = UnitOf<T, kState, N>;
  int skipped = 0;

  RF_NO_UNROLL
  for (int i = 0; i < group.size; ++i) {
    if (!inside(i)) continue;
    bool finite = true;
    if (p.skip_nonfinite) {
      RF_NO_UNROLL
      for (int u = lanes.lane; u < units.total; u += lanes.lanes) {
        const Place place(p, units, u);
        const Body body(p, group, k, v, place);
        Data<T, N> data;
        body.load_source(i, data);
        finite = finite && body.finite(data);
      }
      finite = lanes.all(finite);
    }
    if (finite)
      group.fuse |= 1u << i;
    else
      ++skipped;
  }
  RF_NO_UNROLL
  for (int u = lanes.lane; u < units.total; u += lanes.lanes) {
    const Place place(p, units, u);
    const Body body(p, group, k, v, place);
    Data<T, N> data;
    if (!body.untouched(group.fuse != 0)) body.load_state(data);
    body.finish(data);
  }
  if (skipped != 0 && p.skipped != nullptr) lanes.count(p.skipped, skipped);
}

}  // namespace rf::ema_evict
