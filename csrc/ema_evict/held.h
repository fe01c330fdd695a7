// Rows of ema_evict that fit into the registers of a thread block, at most one source each: the usual call.
// A lane has the same vector of the keys and the same of the values in every row, so what depends on its
// place alone (addresses, turns) is found once for kHeldRows neighbouring tokens. All reads of a row are
// under way before the vote on whether its token is finite, and none is repeated. In steps, with the vote
// between the first two, so that tests can run them lane after lane on the host.
#pragma once

#include "csrc/ema_evict/kernel.h"

namespace rf::ema_evict {

// What happens to the rows of a sink frame. A kernel has a straight way through each row that begins with a
// state and gets a source (kUsual), and beside it one with every question.
struct Plan {
  bool fuses, init;
  RF_HD bool usual() const { return fuses && !init; }
};

// The turns of the pairs inside of a vector.
template <typename A, int N>
struct VectorTurn {
  static constexpr int kPairs = N / 2;
  A cosine[kPairs], sine[kPairs];
  int turned[kPairs];  // not 0: the angle is not zero

  // Pairs past the temporal ones are not turned.
  RF_HD void read(const A* table, int pairs) {
    RF_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      cosine[i] = i < pairs ? table[2 * i] : A(1);
      sine[i] = i < pairs ? table[2 * i + 1] : A(0);
      turned[i] = turns(cosine[i], sine[i]);
    }
  }
  RF_HD void operator()(A (&a)[N]) const {
    RF_UNROLL
    for (int i = 0; i < kPairs; ++i) turn_pair(turned[i] != 0, cosine[i], sine[i], a[2 * i], a[2 * i + 1]);
  }
};

// A lane's vector of the keys or of the values in a row. `separate`: the slot is written from the state
// (keys); else it is the state (values).
template <typename T, EmaState kState, int N>
struct HeldVector {
  using A = acc_t<T>;
  static constexpr bool kFloat = kState == EmaState::kFloat32, kPair = kState == EmaState::kCompensated;
  const T* source;
  T *slot, *hi, *lo;
  float* f32;
  Vec<T, N> x, high, low;
  Vec<float, N> wide;

  template <bool kUsual>
  RF_HD void read(bool separate, Plan plan) {
    if (kUsual || plan.fuses) x = load_vec<N>(source);
    if (!kUsual && !separate && !plan.init && !plan.fuses) return;  // nothing comes into the state
    const bool init = !kUsual && plan.init;
    if (kFloat && !init) {
      wide = load_vec<N>(f32);
      return;
    }
    high = load_vec<N>(init || !separate ? slot : hi);
    if constexpr (kPair) {
      if (init)
        RF_UNROLL for (int e = 0; e < N; ++e) low.v[e] = T{};
      else
        low = load_vec<N>(lo);
    }
  }

  // Fuses, and writes state and slot where the lane has a part of the row.
  template <bool kUsual, bool kTurns>
  RF_HD void write(bool active, bool separate, bool init, bool fuse, const EmaWeights<A>& weights,
                   const VectorTurn<A, N>& source_turn, const VectorTurn<A, N>& slot_turn) {
    if (!kUsual && !separate && !init && !fuse) return;
    A s[N];
    Vec<T, N> out = high;  // where the state is that, and nothing is fused
    if (kFloat && (kUsual || !init)) {
      RF_UNROLL
      for (int e = 0; e < N; ++e) s[e] = wide.v[e];
    } else {
      vec_to_acc(high, s);
      if constexpr (kPair) {
        A tail[N];
        vec_to_acc(low, tail);
        RF_UNROLL
        for (int e = 0; e < N; ++e) s[e] = ema_join(s[e], tail[e]);
      }
    }
    if (kUsual || fuse) {
      A a[N];
      vec_to_acc(x, a);
      if constexpr (kTurns) source_turn(a);
      if constexpr (kState == EmaState::kPublished)
        out = ema_fuse_published<T>(weights, s, a);
      else
        ema_fuse<T, kState>(weights, s, a);
    }
    if constexpr (kState == EmaState::kPublished)
      vec_to_acc(out, s);
    else
      out = vec_from_acc<T>(s);
    if (kUsual || init || fuse) {
      if constexpr (kFloat) {
        Vec<float, N> all;
        RF_UNROLL
        for (int e = 0; e < N; ++e) all.v[e] = s[e];
        store_global_if(active, f32, all);
      } else {
        if (separate) store_global_if(active, hi, out);
        if constexpr (kPair) {
          A rounded[N], tail[N];
          vec_to_acc(out, rounded);
          RF_UNROLL
          for (int e = 0; e < N; ++e) tail[e] = ema_tail(s[e], rounded[e]);
          store_global_if(active, lo, vec_from_acc<T>(tail));
        }
      }
    }
    if (!kUsual && !separate && !fuse) return;
    if constexpr (kTurns) {
      slot_turn(s);
      out = vec_from_acc<T>(s);
    }
    store_global_if(active, slot, out);
  }
};

template <typename T, EmaState kState, int N>
class HeldLane {
 public:
  using A = acc_t<T>;

  // From token t of sink frame j of sample b on.
  RF_HD HeldLane(const Params& p, const Units& units, int64_t b, int64_t j, int64_t t, int lane)
      : p_(p), alpha_(p.alpha + j * p.alpha_stride_frame + t * p.alpha_stride_token) {
    const int32_t* entry = p.schedule + b * p.schedule_stride_b + j * (2 + p.sources);
    // A source outside of the frames after the sink is left out (kernel.h).
    const int32_t source = p.sources > 0 && entry[1] > 0 ? entry[2] : -1;
    plan_ = {source >= p.sink_frames && source < p.frames, entry[0] != 0};

    // A lane without a part of the row reads what the first has, and writes nothing.
    const int keys = units.padded + units.plain - units.filled;
    const Place place(p, units, lane);
    k_active_ = lane < keys && place.kind != Unit::kIdle;
    v_active_ = lane < units.values;
    const int key_head = k_active_ ? place.head : 0, key_dim = k_active_ ? place.dim[0] : 0;
    const int i = v_active_ ? lane : 0, value_head = units.vectors_a_head.quotient(i);
    const int value_dim = units.vectors_a_head.remainder(i, value_head) * N;

    // What all lanes share comes first: it can then be formed once a warp.
    const int64_t state = ((b * p.sink_frames + j) * p.frame_tokens + t) * (int64_t{p.heads} * p.head_dim);
    const int64_t k_token = b * p.k_stride_b + (j * p.frame_tokens + t) * p.k_stride_t;
    const int64_t v_token = b * p.v_stride_b + (j * p.frame_tokens + t) * p.v_stride_t;
    const int64_t ahead = plan_.fuses ? (source - j) * p.frame_tokens : 0;
    k_.slot = static_cast<T*>(p.k_cache) + k_token + (key_head * p.k_stride_h + key_dim);
    v_.slot = static_cast<T*>(p.v_cache) + v_token + (value_head * p.v_stride_h + value_dim);
    k_.source = k_.slot + ahead * p.k_stride_t;
    v_.source = v_.slot + ahead * p.v_stride_t;
    const int k_place = key_head * p.head_dim + key_dim, v_place = i * N;
    if constexpr (kState == EmaState::kFloat32) {
      k_.f32 = static_cast<float*>(p.k_state) + state + k_place;
      v_.f32 = static_cast<float*>(p.v_state) + state + v_place;
    } else {
      k_.hi = static_cast<T*>(p.k_state) + state + k_place;
    }
    if constexpr (kState == EmaState::kCompensated) {
      k_.lo = static_cast<T*>(p.k_state_lo) + state + k_place;
      v_.lo = static_cast<T*>(p.v_state) + state + v_place;
    }

    // Of a warp either all lanes may have pairs inside of their vector, or none.
    turns_ = lane < units.padded;
    if (turns_) {
      const A* turns = static_cast<const A*>(p.turns) + b * p.turns_stride_b +
                       (j * (p.sources + 1) * p.temporal_pairs + place.first_pair) * 2;
      const int pairs = k_active_ ? p.temporal_pairs - place.first_pair : 0;
      source_turn_.read(turns, pairs);
      slot_turn_.read(turns + 2 * p.sources * p.temporal_pairs, pairs);
    }
  }

  RF_HD bool usual() const { return plan_.usual(); }
  RF_HD bool fuses() const { return plan_.fuses; }
  // Whether there is anything to vote on.
  RF_HD bool votes() const { return plan_.fuses && p_.skip_nonfinite; }

  // The reads of a row.
  template <bool kUsual>
  RF_HD void read() {
    alpha_now_ = *alpha_;
    k_.template read<kUsual>(true, plan_);
    v_.template read<kUsual>(false, plan_);
  }
  // Whether the lane's part of the source is finite.
  RF_HD bool finite() const { return all_finite(k_.x) && all_finite(v_.x); }

  // `fuse`: there is a source, and if it must be finite then it is so in all lanes.
  template <bool kUsual>
  RF_HD void write(bool fuse) {
    const EmaWeights<A> weights = ema_weights<A>(alpha_now_);
    if (turns_)
      k_.template write<kUsual, true>(k_active_, true, plan_.init, fuse, weights, source_turn_, slot_turn_);
    else
      k_.template write<kUsual, false>(k_active_, true, plan_.init, fuse, weights, source_turn_, slot_turn_);
    v_.template write<kUsual, false>(v_active_, false, plan_.init, fuse, weights, source_turn_, slot_turn_);
  }
  // To the next token.
  RF_HD void advance() {
    const int64_t state = int64_t{p_.heads} * p_.head_dim;
    k_.slot += p_.k_stride_t;
    k_.source += p_.k_stride_t;
    v_.slot += p_.v_stride_t;
    v_.source += p_.v_stride_t;
    if constexpr (kState == EmaState::kFloat32) {
      k_.f32 += state;
      v_.f32 += state;
    } else {
      k_.hi += state;
    }
    if constexpr (kState == EmaState::kCompensated) {
      k_.lo += state;
      v_.lo += state;
    }
    alpha_ += p_.alpha_stride_token;
  }

 private:
  const Params& p_;
  const double* alpha_;
  double alpha_now_;
  Plan plan_;
  bool turns_, k_active_, v_active_;
  HeldVector<T, kState, N> k_, v_;
  VectorTurn<A, N> source_turn_, slot_turn_;
};

}  // namespace rf::ema_evict
