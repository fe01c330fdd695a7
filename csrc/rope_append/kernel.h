// The CUDA kernel of rope_append, written as what one lane of a CTA does between two barriers. launch.cu
// calls the phases with a __syncthreads() in between; tests call the same code on the host, lane after lane.
//
// A CTA serves one token: its rows of q, k and v. A unit is 2V dims of a head, held by one lane as two packs
// of V elements, so that neighbouring lanes move neighbouring 16 bytes, and a pair never leaves its lane:
//   adjacent pairs, V > 1   packs at V*u and P + V*u, pairs inside of a pack
//   otherwise               packs at the x dims and the y dims of pairs V*u ... V*u + V - 1
//   unrotated tail          packs at 2P + V*t and half a tail later (the second may not exist)
#pragma once

#include "csrc/math/vec.h"
#include "csrc/rope_append/config.h"

namespace rf::rope_append {

// `T`: storage, `V`: elements of an access. kHeld: a lane for every unit, hence no loops over units.
template <typename T, int V, bool kHeld>
class Token {
 public:
  using A = acc_t<T>;
  struct Unit {
    Vec<T, V> first, second;
  };
  // A lane's first unit of q and of k stays here between the phases: at the usual widths a row is read once.
  struct Registers {
    Unit q, k;
  };

  // `shared`: config.shared_bytes, uninitialised, the same for all lanes of the CTA.
  RF_HD Token(const Params& p, const Config& config, void* shared, int64_t batch, int32_t token, int32_t lane,
              int32_t lanes)
      : p_(p),
        config_(config),
        lane_(lane),
        lanes_(lanes),
        units_(static_cast<int32_t>(config.units.divisor)),
        batch_(batch),
        token_(token),
        slot_token_(p.k.heads > 0 ? cache_token(p, batch, token, config.frame_tokens.quotient(token)) : -1),
        first_(where(lane)),
        angles_(static_cast<A*>(shared)),
        head_sums_(angles_ + 2 * p.axes.pairs),
        scales_(head_sums_ + p.q.heads + p.k.heads),
        unit_sums_(scales_ + p.q.heads + p.k.heads) {}

  // Phase 1: the reads; v goes straight to its slot. Leaves the token's angles and each unit's sum of
  // squares.
  RF_HD void read(Registers& rg) {
    if (lane_ < p_.q.heads * units_) rg.q = load(p_.q.in, first_);
    if (lane_ < p_.k.heads * units_) rg.k = load(p_.k.in, first_);
    if (slot_token_ >= 0) copy_value();
    const A* table = static_cast<const A*>(p_.angles) + batch_ * p_.angles_batch_stride;
    RF_NO_UNROLL
    for (int32_t pair = lane_; pair < p_.axes.pairs; pair += lanes_) {
      const A* row = table + 2 * angle_row(p_.axes, token_, pair);
      angles_[2 * pair] = row[0];
      angles_[2 * pair + 1] = row[1];
    }
    if (p_.q.weight != nullptr) sum_units(p_.q, rg.q, unit_sums_);
    if (p_.k.weight != nullptr) sum_units(p_.k, rg.k, unit_sums_ + p_.q.heads * units_);
  }

  // Phase 2: units to heads, in the order of the dims. (Heads of a tensor without a norm: nobody reads them.)
  RF_HD void sum_heads() {
    const int32_t first = p_.q.weight != nullptr ? 0 : p_.q.heads;
    const int32_t last = p_.q.heads + (p_.k.weight != nullptr ? p_.k.heads : 0);
    RF_NO_UNROLL
    for (int32_t h = first + lane_; h < last; h += lanes_) {
      A sum = 0;
      RF_NO_UNROLL
      for (int32_t u = 0; u < units_; ++u) sum += unit_sums_[h * units_ + u];
      head_sums_[h] = sum;
    }
  }

  // Phase 3: the scale of every head by one lane, or of a whole row of q (lane 0) and of k (the last lane).
  RF_HD void scale_heads() {
    if (p_.norm == NormScope::kHead) {
      RF_NO_UNROLL
      for (int32_t h = lane_; h < p_.q.heads + p_.k.heads; h += lanes_)
        if ((h < p_.q.heads ? p_.q : p_.k).weight != nullptr)
          scales_[h] = rms_scale(head_sums_[h], int64_t{p_.head_dim}, p_.eps);
      return;
    }
    RF_NO_UNROLL
    for (int32_t k = 0; k < 2; ++k) {
      const RopeRows& rows = k == 0 ? p_.q : p_.k;
      if (lane_ != (k == 0 ? 0 : lanes_ - 1) || rows.weight == nullptr || rows.heads == 0) continue;
      const A* sums = head_sums_ + k * p_.q.heads;
      A sum = 0;
      RF_NO_UNROLL
      for (int32_t h = 0; h < rows.heads; ++h) sum += sums[h];
      scales_[k * p_.q.heads] = rms_scale(sum, static_cast<int64_t>(rows.heads) * p_.head_dim, p_.eps);
    }
  }

  // Phase 4: normalise, rotate, round once, write.
  RF_HD void write(const Registers& rg) {
    write_rows(p_.q, rg.q, scales_, token_);
    if (slot_token_ >= 0) write_rows(p_.k, rg.k, scales_ + p_.q.heads, slot_token_);
  }

 private:
  struct Place {
    int32_t first, second;  // dims of the head at which the packs begin; second = D: there is none
    int32_t pair;           // first pair of the unit; P: not rotated
    int32_t head;
  };

  RF_HD bool pairs_inside() const { return V > 1 && p_.axes.layout == RopeLayout::kAdjacent; }

  RF_HD Place where(int32_t index) const {
    const int32_t head = config_.units.quotient(index);
    const int32_t unit = config_.units.remainder(index, head);
    const int32_t pairs = p_.axes.pairs, rotated = pairs / V;
    if (unit < rotated) {
      const int32_t pair = V * unit;
      if (pairs_inside()) return {pair, pairs + pair, pair, head};
      const PairDims dims = pair_dims(p_.axes, pair);
      return {dims.x, dims.y, pair, head};
    }
    const int32_t first = 2 * pairs + V * (unit - rotated);
    const int32_t second = first + V * (units_ - rotated);
    return {first, second < p_.head_dim ? second : p_.head_dim, pairs, head};
  }

  RF_HD const T* source(const HeadRows& rows, int32_t head) const {
    return static_cast<const T*>(rows.data) + batch_ * rows.batch_stride + token_ * rows.token_stride +
           head * rows.head_stride;
  }
  RF_HD T* target(const MutableHeadRows& rows, int64_t token, int32_t head) const {
    return static_cast<T*>(rows.data) + batch_ * rows.batch_stride + token * rows.token_stride +
           head * rows.head_stride;
  }

  RF_HD Unit load(const HeadRows& rows, const Place& at) const {
    const T* head = source(rows, at.head);
    Unit unit;
    unit.first = load_vec<V>(head + at.first);
    if (at.second < p_.head_dim)
      unit.second = load_vec<V>(head + at.second);
    else
      RF_UNROLL for (int i = 0; i < V; ++i) unit.second.v[i] = from_acc<T>(A(0));
    return unit;
  }

  RF_HD void store(const MutableHeadRows& rows, int64_t token, const Place& at, const Unit& unit) const {
    T* head = target(rows, token, at.head);
    store_global(head + at.first, unit.first);
    if (at.second < p_.head_dim) store_global(head + at.second, unit.second);
  }

  // f(index, place, unit) for the units of this lane: the first as it is held, the others read.
  template <typename F>
  RF_HD void for_units(const HeadRows& rows, int32_t heads, const Unit& held, const F& f) const {
    const int32_t count = heads * units_;
    if (lane_ >= count) return;
    if constexpr (kHeld) return f(lane_, first_, held);
    Place at = first_;
    Unit unit = held;
    RF_NO_UNROLL
    for (int32_t i = lane_;;) {
      f(i, at, unit);
      i += lanes_;
      if (i >= count) return;
      at = where(i);
      unit = load(rows, at);
    }
  }

  RF_HD void copy_value() const {
    if (lane_ >= p_.k.heads * units_) return;
    for_units(p_.v, p_.k.heads, load(p_.v, first_),
              [&](int32_t, const Place& at, const Unit& unit) { store(p_.v_cache, slot_token_, at, unit); });
  }

  RF_HD void sum_units(const RopeRows& rows, const Unit& held, A* sums) const {
    for_units(rows.in, rows.heads, held, [&](int32_t i, const Place&, const Unit& unit) {
      A first[V], second[V], sum = 0;
      vec_to_acc(unit.first, first);
      vec_to_acc(unit.second, second);
      RF_UNROLL for (int j = 0; j < V; ++j) sum += first[j] * first[j] + second[j] * second[j];
      sums[i] = sum;
    });
  }

  RF_HD void write_rows(const RopeRows& rows, const Unit& held, const A* scales, int64_t out_token) const {
    const bool model = p_.norm == NormScope::kModel;
    for_units(rows.in, rows.heads, held, [&](int32_t, const Place& at, const Unit& unit) {
      A first[V], second[V];
      vec_to_acc(unit.first, first);
      vec_to_acc(unit.second, second);
      if (rows.weight != nullptr) {
        const A scale = scales[model ? 0 : at.head];
        const int64_t begin = model ? static_cast<int64_t>(at.head) * p_.head_dim : 0;
        normalise(rows, begin + at.first, scale, first);
        if (at.second < p_.head_dim) normalise(rows, begin + at.second, scale, second);
      }
      if (at.pair < p_.axes.pairs) rotate(at, first, second);
      store(rows.out, out_token, at, Unit{vec_from_acc<T>(first), vec_from_acc<T>(second)});
    });
  }

  RF_HD void normalise(const RopeRows& rows, int64_t at, A scale, A (&x)[V]) const {
    if (rows.float_weight) {
      const Vec<float, V> weight = load_vec<V>(static_cast<const float*>(rows.weight) + at);
      RF_UNROLL for (int j = 0; j < V; ++j) x[j] = normalised(x[j], scale, static_cast<A>(weight.v[j]));
    } else {
      A weight[V];
      vec_to_acc(load_vec<V>(static_cast<const T*>(rows.weight) + at), weight);
      RF_UNROLL for (int j = 0; j < V; ++j) x[j] = normalised(x[j], scale, weight[j]);
    }
  }

  // n pairs from `pair` on, as (cos, sin, cos, sin, ...): 16-byte reads of shared memory.
  template <int n>
  RF_HD Vec<A, 2 * n> angles_of(int32_t pair) const {
    Vec<A, 2 * n> out;
    memcpy(&out, __builtin_assume_aligned(angles_ + 2 * pair, sizeof(out) < 16 ? sizeof(out) : 16),
           sizeof(out));
    return out;
  }
  RF_HD static void turn(A c, A s, A& x, A& y) {
    const A turned = rotated_x(x, y, c, s);
    y = rotated_y(x, y, c, s);
    x = turned;
  }

  RF_HD void rotate(const Place& at, A (&first)[V], A (&second)[V]) const {
    if constexpr (V > 1) {
      if (pairs_inside()) {
        const auto one = angles_of<V / 2>(at.first / 2), two = angles_of<V / 2>(at.second / 2);
        RF_UNROLL for (int j = 0; j < V; j += 2) {
          turn(one.v[j], one.v[j + 1], first[j], first[j + 1]);
          turn(two.v[j], two.v[j + 1], second[j], second[j + 1]);
        }
        return;
      }
    }
    const auto angles = angles_of<V>(at.pair);
    RF_UNROLL for (int j = 0; j < V; ++j) turn(angles.v[2 * j], angles.v[2 * j + 1], first[j], second[j]);
  }

  const Params& p_;
  const Config& config_;
  const int32_t lane_, lanes_, units_;
  const int64_t batch_;
  const int32_t token_;
  const int64_t slot_token_;  // -1: this frame has no place in the cache
  const Place first_;         // of this lane's first unit
  A* const angles_;           // [P, 2]
  A* const head_sums_;        // [Hq + Hkv]
  A* const scales_;           // [Hq + Hkv]: of each head, or of q and k at their first head
  A* const unit_sums_;        // [Hq + Hkv, units]
};

}  // namespace rf::rope_append
