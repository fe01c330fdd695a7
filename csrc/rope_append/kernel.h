// The CUDA kernels of rope_append, written as what one lane of a CTA does between two barriers. launch.cu
// calls the phases with a __syncthreads() in between; tests call the same code on the host, lane after lane.
//
// A CTA serves one token at a time: its rows of q, k and v. Here any row; held.h has those with a lane for
// every unit. A unit is 2V dims of a head, held by one lane as two packs
// of V elements, so that neighbouring lanes move neighbouring 16 bytes, and a pair never leaves its lane:
//   adjacent pairs, V > 1   packs at V*u and P + V*u, pairs inside of a pack
//   otherwise               packs at the x dims and the y dims of pairs V*u ... V*u + V - 1
//   unrotated tail          packs at 2P + V*t and half a tail later (the second may not exist)
#pragma once

#include "csrc/math/vec.h"
#include "csrc/rope_append/config.h"

namespace rf::rope_append {

// What both kernels share. `T`: storage, `V`: elements of an access, kTokens: at once.
template <typename T, int V, int kTokens>
class TokenBase {
 public:
  using A = acc_t<T>;
  struct Unit {
    Vec<T, V> first, second;
  };

  // Phase 2: units to heads, in the order of the dims. (Heads of a tensor without a norm: nobody reads them.)
  RF_HD void sum_heads() {
    const int32_t first = p_.q.weight != nullptr ? 0 : p_.q.heads;
    const int32_t last = p_.q.heads + (p_.k.weight != nullptr ? p_.k.heads : 0);
    RF_NO_UNROLL
    for (int32_t i = lane_; i < kTokens * heads_; i += lanes_) {
      const int32_t h = kTokens == 1 || i < heads_ ? i : i - heads_;
      if (h >= first && h < last) head_sums_[i] = sum(unit_sums_ + i * units_, units_);
    }
  }

  // Phase 3: the scale of every head by one lane, or of the whole rows of q and of k.
  RF_HD void scale_heads() {
    if (p_.norm == NormScope::kHead) {
      RF_NO_UNROLL
      for (int32_t i = lane_; i < kTokens * heads_; i += lanes_) {
        const int32_t h = kTokens == 1 || i < heads_ ? i : i - heads_;
        if ((h < p_.q.heads ? p_.q : p_.k).weight != nullptr)
          scales_[i] = rms_scale(head_sums_[i], int64_t{p_.head_dim}, p_.eps);
      }
      return;
    }
    RF_NO_UNROLL
    for (int32_t i = lane_; i < 2 * kTokens; i += lanes_) {
      const bool k = i % 2 != 0;
      const RopeRows& rows = k ? p_.k : p_.q;
      const int32_t first = i / 2 * heads_ + (k ? p_.q.heads : 0), heads = k ? p_.k.heads : p_.q.heads;
      if (rows.weight != nullptr && heads != 0)
        scales_[first] =
            rms_scale(sum(head_sums_ + first, heads), static_cast<int64_t>(heads) * p_.head_dim, p_.eps);
    }
  }

 protected:
  struct Place {
    int32_t first, second;  // dims of the head at which the packs begin; second = D: there is none
    int32_t pair;           // first pair of the unit; P: not rotated
    int32_t head;
  };

  RF_HD TokenBase(const Params& p, const Config& config, A* angles, A* sums, int64_t batch, int32_t lane,
                  int32_t lanes)
      : p_(p),
        config_(config),
        lane_(lane),
        lanes_(lanes),
        units_(static_cast<int32_t>(config.units.divisor)),
        heads_(p.q.heads + p.k.heads),
        batch_(batch),
        angles_(angles),
        head_sums_(sums),
        scales_(head_sums_ + kTokens * heads_),
        unit_sums_(scales_ + kTokens * heads_) {}

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

  // One after the other: the order is the result.
  RF_HD static A sum(const A* values, int32_t count) {
    A total = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 4
#endif
    for (int32_t i = 0; i < count; ++i) total += values[i];
    return total;
  }
  RF_HD static A sum_squares(const Unit& unit) {
    A first[V], second[V], sum = 0, other = 0;
    vec_to_acc(unit.first, first);
    vec_to_acc(unit.second, second);
    RF_UNROLL for (int j = 0; j < V; ++j) {
      sum = fma_rn(first[j], first[j], sum);
      other = fma_rn(second[j], second[j], other);
    }
    return sum + other;
  }

  // The weights of n dims from `at` on.
  RF_HD void load_weight(const RopeRows& rows, int64_t at, A (&weight)[V]) const {
    if (rows.float_weight) {
      const Vec<float, V> raw = load_vec<V>(static_cast<const float*>(rows.weight) + at);
      RF_UNROLL for (int j = 0; j < V; ++j) weight[j] = static_cast<A>(raw.v[j]);
    } else {
      vec_to_acc(load_vec<V>(static_cast<const T*>(rows.weight) + at), weight);
    }
  }

  // n pairs from `pair` on, as (cos, sin, cos, sin, ...): 16-byte reads of shared memory.
  template <int n>
  RF_HD static Vec<A, 2 * n> angles_of(const A* angles, int32_t pair) {
    Vec<A, 2 * n> out;
    memcpy(&out, __builtin_assume_aligned(angles + 2 * pair, sizeof(out) < 16 ? sizeof(out) : 16),
           sizeof(out));
    return out;
  }
  RF_HD static void turn(A c, A s, A& x, A& y) {
    const A turned = rotated_x(x, y, c, s);
    y = rotated_y(x, y, c, s);
    x = turned;
  }
  // kInside: known to be pairs_inside().
  template <bool kInside = false>
  RF_HD void rotate(const Place& at, const A* angles, A (&first)[V], A (&second)[V]) const {
    if constexpr (V > 1) {
      if (kInside || pairs_inside()) {
        const auto one = angles_of<V / 2>(angles, at.first / 2),
                   two = angles_of<V / 2>(angles, at.second / 2);
        RF_UNROLL for (int j = 0; j < V; j += 2) {
          turn(one.v[j], one.v[j + 1], first[j], first[j + 1]);
          turn(two.v[j], two.v[j + 1], second[j], second[j + 1]);
        }
        return;
      }
    }
    const auto turns = angles_of<V>(angles, at.pair);
    RF_UNROLL for (int j = 0; j < V; ++j) turn(turns.v[2 * j], turns.v[2 * j + 1], first[j], second[j]);
  }

  const Params& p_;
  const Config& config_;
  const int32_t lane_, lanes_, units_, heads_;  // heads_: Hq + Hkv
  const int64_t batch_;
  A* const angles_;     // [kTokens, P, 2], in held.h twice
  A* const head_sums_;  // [kTokens, Hq + Hkv]
  A* const scales_;     // [kTokens, Hq + Hkv]: of each head, or of q and k at their first head
  A* const unit_sums_;  // [kTokens, Hq + Hkv, units]
};

template <typename T, int V>
class Token : public TokenBase<T, V, 1> {
  using Base = TokenBase<T, V, 1>;
  using Base::p_, Base::config_, Base::lane_, Base::lanes_, Base::units_, Base::batch_, Base::angles_,
      Base::scales_, Base::unit_sums_;
  using typename Base::Place;

 public:
  using typename Base::A, typename Base::Unit;
  // A lane's first unit of q and of k stays here between the phases: at the usual widths a row is read once.
  struct Registers {
    Unit q, k;
  };

  // `shared`: config.shared_bytes, uninitialised, the same for all lanes of the CTA.
  RF_HD Token(const Params& p, const Config& config, void* shared, int64_t batch, int32_t token, int32_t lane,
              int32_t lanes)
      : Base(p, config, static_cast<A*>(shared), static_cast<A*>(shared) + 2 * p.axes.pairs, batch, lane,
             lanes),
        token_(token),
        slot_token_(p.k.heads > 0 ? cache_token(p, batch, token, config.frame_tokens.quotient(token)) : -1),
        first_(this->where(lane)) {}

  // Phase 1: the reads; v goes straight to its slot. Leaves the token's angles and each unit's sum of
  // squares.
  RF_HD void read(Registers& rg) {
    if (lane_ < p_.q.heads * units_) rg.q = load(p_.q.in, first_);
    if (lane_ < p_.k.heads * units_) rg.k = load(p_.k.in, first_);
    if (slot_token_ >= 0 && p_.v.data != nullptr) copy_value();
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

  // Phase 4: normalise, rotate, round once, write.
  RF_HD void write(const Registers& rg) {
    write_rows(p_.q, rg.q, scales_, token_);
    if (slot_token_ >= 0) write_rows(p_.k, rg.k, scales_ + p_.q.heads, slot_token_);
  }

 private:
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
    Place at = first_;
    Unit unit = held;
    RF_NO_UNROLL
    for (int32_t i = lane_;;) {
      f(i, at, unit);
      i += lanes_;
      if (i >= count) return;
      at = this->where(i);
      unit = load(rows, at);
    }
  }

  RF_HD void copy_value() const {
    if (lane_ >= p_.k.heads * units_) return;
    for_units(p_.v, p_.k.heads, load(p_.v, first_),
              [&](int32_t, const Place& at, const Unit& unit) { store(p_.v_cache, slot_token_, at, unit); });
  }

  RF_HD void sum_units(const RopeRows& rows, const Unit& held, A* sums) const {
    for_units(rows.in, rows.heads, held,
              [&](int32_t i, const Place&, const Unit& unit) { sums[i] = Base::sum_squares(unit); });
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
      if (at.pair < p_.axes.pairs) this->rotate(at, angles_, first, second);
      store(rows.out, out_token, at, Unit{vec_from_acc<T>(first), vec_from_acc<T>(second)});
    });
  }

  RF_HD void normalise(const RopeRows& rows, int64_t at, A scale, A (&x)[V]) const {
    A weight[V];
    this->load_weight(rows, at, weight);
    RF_UNROLL for (int j = 0; j < V; ++j) x[j] = normalised(x[j], scale, weight[j]);
  }

  const int32_t token_;
  const int64_t slot_token_;  // -1: this frame has no place in the cache
  const Place first_;         // of this lane's first unit
};

}  // namespace rf::rope_append
