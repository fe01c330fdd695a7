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
#include "csrc/math/vec.h"

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

// A state as hi + lo, each of dtype T: hi is the state rounded to T, lo its tail (ema_tail) rounded to T.
template <typename A>
RF_HD A ema_join(A hi, A lo) {
  // -0 + 0 would lose the sign of a zero, and -0 added to a number is that number.
  return add_rn(hi, lo == 0 ? A(-0.0) : lo);
}

// What `hi`, the value rounded, leaves of it; the difference is exact.
template <typename A>
RF_HD A ema_tail(A value, A hi) {
  return add_rn(value, -hi);
}

// alpha * state + (1 - alpha) * x in eager PyTorch: both products and the sum are rounded to T.
template <typename T, int N>
RF_HD Vec<T, N> ema_fuse_published(const EmaWeights<acc_t<T>>& w, const acc_t<T> (&state)[N],
                                   const acc_t<T> (&x)[N]) {
  acc_t<T> a[N], b[N];
  RF_UNROLL
  for (int e = 0; e < N; ++e) a[e] = mul_rn(w.keep, state[e]), b[e] = mul_rn(w.take, x[e]);
  return vec_add(vec_from_acc<T>(a), vec_from_acc<T>(b));
}

// One eviction of N elements. `state` and the result are what the state's storage holds, so that keeping it
// in a register over several evictions and storing it after each of them give the same bits.
template <typename T, EmaState kState, int N>
RF_HD void ema_fuse(const EmaWeights<acc_t<T>>& w, acc_t<T> (&state)[N], const acc_t<T> (&x)[N]) {
  using A = acc_t<T>;
  if constexpr (kState == EmaState::kPublished) {
    vec_to_acc(ema_fuse_published<T>(w, state, x), state);
  } else {
    A a[N], b[N];
    // keep_tail * state is added to the small term first: there it is not rounded away.
    RF_UNROLL
    for (int e = 0; e < N; ++e)
      a[e] = fma_rn(w.keep, state[e], fma_rn(w.keep_tail, state[e], mul_rn(w.take, x[e])));
    if constexpr (kState == EmaState::kFloat32) {
      RF_UNROLL
      for (int e = 0; e < N; ++e) state[e] = a[e];
      return;
    }
    // hi + lo of the sum, with the tail's sign turned: a difference of zero is +0, and to subtract
    // that leaves every number as it is, a zero's sign included.
    A hi[N];
    vec_to_acc(vec_from_acc<T>(a), hi);
    RF_UNROLL
    for (int e = 0; e < N; ++e) b[e] = add_rn(hi[e], -a[e]);
    vec_to_acc(vec_from_acc<T>(b), b);
    RF_UNROLL
    for (int e = 0; e < N; ++e) state[e] = add_rn(hi[e], -b[e]);
  }
}

// Whether the angle of (cosine, sine) is not zero.
template <typename A>
RF_HD bool turns(A cosine, A sine) {
  return !(cosine == A(1) && sine == A(0));
}

// (x, y) turned by the angle of (cosine, sine). `turned` = turns(cosine, sine): the angle zero changes no bit
// (x * 1 - y * 0 would, in the sign of a zero and beside an infinity).
template <typename A>
RF_HD void turn_pair(bool turned, A cosine, A sine, A& x, A& y) {
  const A tx = fma_rn(x, cosine, -mul_rn(y, sine));
  const A ty = fma_rn(x, sine, mul_rn(y, cosine));
  x = turned ? tx : x;
  y = turned ? ty : y;
}
template <typename A>
RF_HD void turn_pair(A cosine, A sine, A& x, A& y) {
  turn_pair(turns(cosine, sine), cosine, sine, x, y);
}

}  // namespace rf
