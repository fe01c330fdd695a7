// Tokens of rope_append with a lane for every unit and for every pair: the usual call. A CTA serves a few
// neighbouring tokens of a frame, one after the other, so what depends on a lane's place alone (addresses,
// weights, where its angle lies) is found once. Every read of a token is under way before one is waited for.
#pragma once

#include "csrc/rope_append/kernel.h"

namespace rf::rope_append {

// One pair's row of the angle table, from token to token.
struct AngleWalk {
  int64_t row;
  int32_t pairs, length, below;  // of the pair's axis; tokens that share a coordinate
  int32_t coordinate, token;     // at the token: of `length`, of `below`

  RF_HD AngleWalk(const RopeAxes& axes, int32_t at, int32_t pair) {
    int32_t begin = axes.pairs, rest = at;
    below = 1;
    RF_NO_UNROLL
    for (int32_t a = axes.count - 1; a >= 0; --a) {
      const RopeAxis& axis = axes.axis[a];
      const int32_t above = axis.length.quotient(rest);
      begin -= axis.pairs;
      if (pair >= begin) {
        pairs = axis.pairs;
        length = static_cast<int32_t>(axis.length.divisor);
        coordinate = axis.length.remainder(rest, above);
        token = at - rest * below;
        row = axis.offset + static_cast<int64_t>(coordinate) * pairs + (pair - begin);
        return;
      }
      rest = above;
      below *= static_cast<int32_t>(axis.length.divisor);
    }
  }
  RF_HD void advance() {
    if (++token < below) return;
    token = 0;
    row += pairs;
    if (++coordinate < length) return;
    coordinate = 0;
    row -= static_cast<int64_t>(length) * pairs;
  }
};

// kHeldTogether tokens at once: their sums of squares are formed together. kUsual: norm, rotation and layout
// are those of Wan and a frame has whole groups of tokens (Config::usual), which leaves no questions.
template <typename T, int V, bool kUsual>
class HeldTokens : public TokenBase<T, V, kHeldTogether> {
  using Base = TokenBase<T, V, kHeldTogether>;
  using Base::p_, Base::lane_, Base::units_, Base::heads_, Base::batch_, Base::angles_, Base::scales_,
      Base::unit_sums_;
  using typename Base::Place, typename Base::Unit;
  static constexpr int kTokens = kHeldTogether;

 public:
  using typename Base::A;

  // From token `token` of a frame on. `shared`: config.shared_bytes, uninitialised.
  RF_HD HeldTokens(const Params& p, const Config& config, void* shared, int64_t batch, int32_t frame,
                   int32_t token, int32_t lane, int32_t lanes)
      : Base(p, config, static_cast<A*>(shared), static_cast<A*>(shared) + 4 * kTokens * p.axes.pairs, batch,
             lane, lanes),
        at_(this->where(lane)),
        walk_(p.axes, token, lane < p.axes.pairs ? lane : 0),
        second_(at_.second - at_.first),
        buffer_(0) {
    q_active_ = lane < p.q.heads * units_;
    const int64_t slot_token = p.k.heads > 0 ? cache_token(p, batch, token, frame) : -1;
    k_active_ = lane < p.k.heads * units_;
    writes_ = k_active_ && slot_token >= 0;
    copies_ = writes_ && p.v.data != nullptr;
    q_in_ = source(p.q.in, token);
    k_in_ = source(p.k.in, token);
    v_in_ = source(p.v, token);
    q_out_ = target(p.q.out, token);
    k_out_ = target(p.k.out, slot_token);
    v_out_ = target(p.v_cache, slot_token);
    if (q_active_) weights(p.q, q_weight_);
    if (k_active_) weights(p.k, k_weight_);
    angles_row_ = static_cast<const A*>(p.angles) + batch * p.angles_batch_stride;
  }

  // Phase 1 of `count` tokens, at most kTokens: the reads; v goes straight to its slot. Leaves the angles, in
  // one of two places by turns (slower lanes may still read the last ones), and each unit's sum of squares.
  RF_HD void read(int count) {
    const bool q_active = q_active_, k_active = kUsual ? q_active : k_active_;
    Unit v[kTokens];
    if (q_active || k_active) {
      RF_UNROLL
      for (int i = 0; i < kTokens; ++i) {
        if (!kUsual && i >= count) break;
        if (kUsual || q_active) load(q_in_ + i * p_.q.in.token_stride, q_[i]);
        if (kUsual || k_active) load(k_in_ + i * p_.k.in.token_stride, k_[i]);
        if (kUsual || copies_) load(v_in_ + i * p_.v.token_stride, v[i]);
      }
    }
    if (lane_ < p_.axes.pairs) {
      A* angles = angles_ + 2 * (buffer_ * p_.axes.pairs + lane_);
      RF_UNROLL
      for (int i = 0; i < kTokens; ++i) {
        if (!kUsual && i >= count) break;
        angles[0] = angles_row_[2 * walk_.row];
        angles[1] = angles_row_[2 * walk_.row + 1];
        angles += 2 * p_.axes.pairs;
        walk_.advance();
      }
    }
    if (q_active || k_active) {
      RF_UNROLL
      for (int i = 0; i < kTokens; ++i) {
        if (!kUsual && i >= count) break;
        A* sums = unit_sums_ + i * heads_ * units_ + lane_;
        if (kUsual || (p_.q.weight != nullptr && q_active)) sums[0] = Base::sum_squares(q_[i]);
        if (kUsual || (p_.k.weight != nullptr && k_active))
          sums[p_.q.heads * units_] = Base::sum_squares(k_[i]);
        if (kUsual || copies_) store(writes_, v_out_ + i * p_.v_cache.token_stride, v[i]);
      }
    }
  }

  // Phase 4: normalise, rotate, round once, write.
  RF_HD void write(int count) {
    if (!q_active_ && (kUsual || !writes_)) return;
    const A* angles = angles_ + 2 * buffer_ * p_.axes.pairs;
    if (kUsual || q_active_) write_rows(true, p_.q, q_, q_weight_, scales_, angles, q_out_, count);
    if (kUsual || writes_)
      write_rows(writes_, p_.k, k_, k_weight_, scales_ + p_.q.heads, angles, k_out_, count);
  }

  // To the next tokens of the frame.
  RF_HD void advance() {
    q_in_ += kTokens * p_.q.in.token_stride;
    k_in_ += kTokens * p_.k.in.token_stride;
    v_in_ += kTokens * p_.v.token_stride;
    q_out_ += kTokens * p_.q.out.token_stride;
    k_out_ += kTokens * p_.k.out.token_stride;
    v_out_ += kTokens * p_.v_cache.token_stride;
    buffer_ = kTokens - buffer_;
  }

 private:
  RF_HD const T* source(const HeadRows& rows, int32_t token) const {
    return static_cast<const T*>(rows.data) + batch_ * rows.batch_stride + token * rows.token_stride +
           at_.head * rows.head_stride + at_.first;
  }
  RF_HD T* target(const MutableHeadRows& rows, int64_t token) const {
    return static_cast<T*>(rows.data) + batch_ * rows.batch_stride + token * rows.token_stride +
           at_.head * rows.head_stride + at_.first;
  }
  RF_HD void load(const T* at, Unit& unit) const {
    unit.first = load_vec<V>(at);
    unit.second = load_vec<V>(at + second_);
  }
  RF_HD void store(bool writes, T* at, const Unit& unit) const {
    store_global_if(writes, at, unit.first);
    store_global_if(writes, at + second_, unit.second);
  }
  RF_HD void weights(const RopeRows& rows, Unit& out) const {
    if (rows.weight == nullptr) return;
    const int64_t at = (p_.norm == NormScope::kModel ? int64_t{at_.head} * p_.head_dim : 0) + at_.first;
    load(static_cast<const T*>(rows.weight) + at, out);
  }

  RF_HD void write_rows(bool writes, const RopeRows& rows, const Unit (&units)[kTokens], const Unit& weight,
                        const A* scales, const A* angles, T* out, int count) const {
    A one[V], two[V];
    if (kUsual || rows.weight != nullptr) {
      vec_to_acc(weight.first, one);
      vec_to_acc(weight.second, two);
    }
    RF_UNROLL
    for (int i = 0; i < kTokens; ++i) {
      if (!kUsual && i >= count) break;
      A first[V], second[V];
      vec_to_acc(units[i].first, first);
      vec_to_acc(units[i].second, second);
      if (kUsual || rows.weight != nullptr) {
        const A scale = scales[i * heads_ + (kUsual || p_.norm == NormScope::kModel ? 0 : at_.head)];
        RF_UNROLL for (int j = 0; j < V; ++j) {
          first[j] = normalised(first[j], scale, one[j]);
          second[j] = normalised(second[j], scale, two[j]);
        }
      }
      if (kUsual || at_.pair < p_.axes.pairs)
        this->template rotate<kUsual>(at_, angles + 2 * i * p_.axes.pairs, first, second);
      store(writes, out + i * rows.out.token_stride, Unit{vec_from_acc<T>(first), vec_from_acc<T>(second)});
    }
  }

  const Place at_;
  AngleWalk walk_;
  const int32_t second_;                        // from the first pack of a unit to the second
  int32_t buffer_;                              // token of angles_ that the next ones go to: 0 or kTokens
  bool q_active_, k_active_, writes_, copies_;  // copies_: v, where there is one
  const T *q_in_, *k_in_, *v_in_;
  T *q_out_, *k_out_, *v_out_;
  const A* angles_row_;
  Unit q_[kTokens], k_[kTokens], q_weight_, k_weight_;
};

}  // namespace rf::rope_append
