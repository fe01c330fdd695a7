// The exponential moving average of a sink element in its three state precisions, and the turn of a pair.
//
//     state <- alpha * state + (1 - alpha) * x
//
// At alpha = 0.999 in bf16 the step is below half a unit in the last place of nearly every element: rounded
// to bf16 at each eviction the sink does not move (docs/ema_evict.md). Hence the state can be a pair hi + lo
// of the cache's dtype, or float32; "published" rounds as the published code does.
#pragma once

#include "csrc/math/dtype.h"
#include "csrc/math/rounding.h"

namespace rf {

enum class EmaState : int { kCompensated = 0, kFloat32 = 1, kPublished = 2 };

// alpha as keep + keep_tail, so that float32's rounding of alpha (a bias, not noise: it does not average out)
// is not applied a thousand times; 1 - alpha is formed in double and rounded once.
template <typename A>
struct EmaWeights {
  A keep, keep_tail, take;
};

template <typename A>
RF_HD EmaWeights<A> ema_weights(double alpha) {
  const A keep = static_cast<A>(alpha);
  return {keep, static_cast<A>(alpha - static_cast<double>(keep)), static_cast<A>(1.0 - alpha)};
}

// A value as hi + lo, each of dtype T: `ema_join(hi, lo)` of a pair that `ema_split` made is that value
// again, and `hi` is the value rounded to T, bit for bit.
template <typename T>
RF_HD acc_t<T> ema_join(T hi, T lo) {
  const acc_t<T> tail = to_acc(lo);
  return tail == 0 ? to_acc(hi) : add_rn(to_acc(hi), tail);  // -0 + 0 would lose the sign of a zero
}

// Two results by reference, not a struct: g++ packs a pair of 16-bit members into one register, and the loop
// around it stays scalar.
template <typename T>
RF_HD void ema_split(acc_t<T> value, T& hi, T& lo) {
  hi = from_acc<T>(value);
  lo = from_acc<T>(add_rn(value, -to_acc(hi)));  // the difference is exact
}

// One eviction of one element. `state` and the result are what the state's storage holds, so that keeping it
// in a register over several evictions and storing it after each of them give the same bits.
template <typename T, EmaState kState>
RF_HD acc_t<T> ema_fuse(const EmaWeights<acc_t<T>>& w, acc_t<T> state, acc_t<T> x) {
  if constexpr (kState == EmaState::kPublished) {
    // alpha * state + (1 - alpha) * x in eager PyTorch: both products and the sum are rounded to T.
    const T kept = from_acc<T>(mul_rn(w.keep, state));
    const T taken = from_acc<T>(mul_rn(w.take, x));
    return to_acc(from_acc<T>(add_rn(to_acc(kept), to_acc(taken))));
  } else {
    // keep_tail * state is added to the small term first: there it is not rounded away.
    const acc_t<T> sum = fma_rn(w.keep, state, fma_rn(w.keep_tail, state, mul_rn(w.take, x)));
    if constexpr (kState == EmaState::kFloat32) return sum;
    T hi, lo;
    ema_split<T>(sum, hi, lo);
    return ema_join(hi, lo);
  }
}

// (x, y) turned by the angle of (cosine, sine); the angle zero changes no bit (x * 1 - y * 0 would, in the
// sign of a zero and beside an infinity).
template <typename A>
RF_HD void turn_pair(A cosine, A sine, A& x, A& y) {
  const bool identity = cosine == A(1) && sine == A(0);
  const A tx = fma_rn(x, cosine, -mul_rn(y, sine));
  const A ty = fma_rn(x, sine, mul_rn(y, cosine));
  x = identity ? x : tx;
  y = identity ? y : ty;
}

}  // namespace rf
