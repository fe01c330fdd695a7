// CPU backend of rope_append and rope: one token at a time, in a row of accumulators that stays in the L1
// cache.
//
// Tokens are independent and each is computed in one fixed order, so the bits do not depend on the number of
// threads, and not on strides either.
#include <vector>

#include "csrc/common/torch_stable.h"
#include "csrc/math/convert.h"
#include "csrc/rope_append/launch.h"

namespace rf::rope_append {
namespace {

// The angles of one token, cosines and sines apart so that the rotation reads them with full vectors.
template <typename A>
void gather_angles(const Params& p, int64_t batch, int32_t token, A* cosines, A* sines) {
  const A* table = static_cast<const A*>(p.angles) + batch * p.angles_batch_stride;
  for (int32_t begin = 0, a = 0; a < p.axes.count; begin += p.axes.axis[a++].pairs) {
    if (p.axes.axis[a].pairs == 0) continue;
    const A* row =
        table + 2 * angle_row(p.axes, token, begin);  // rows of one axis and coordinate are neighbours
    for (int32_t i = 0; i < p.axes.axis[a].pairs; ++i) {
      cosines[begin + i] = row[2 * i];
      sines[begin + i] = row[2 * i + 1];
    }
  }
}

// Sixteen partial sums and a fixed tree: vectorises, and rounds alike on every machine.
template <typename A>
A sum_of_squares(const A* x, int64_t n) {
  constexpr int kPartials = 16;
  A partial[kPartials] = {};
  int64_t i = 0;
  for (; i + kPartials <= n; i += kPartials)
    for (int j = 0; j < kPartials; ++j) partial[j] += x[i + j] * x[i + j];
  for (int j = 0; i < n; ++i, ++j) partial[j] += x[i] * x[i];
  for (int width = kPartials / 2; width > 0; width /= 2)
    for (int j = 0; j < width; ++j) partial[j] += partial[j + width];
  return partial[0];
}

template <typename A>
void normalise(A* x, const A* weight, A scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = normalised(x[i], scale, weight[i]);
}

template <typename A>
void rotate_adjacent(A* head, const A* cosines, const A* sines, int32_t pairs) {
  for (int32_t i = 0; i < pairs; ++i) {
    const A x = head[2 * i], y = head[2 * i + 1];
    head[2 * i] = rotated_x(x, y, cosines[i], sines[i]);
    head[2 * i + 1] = rotated_y(x, y, cosines[i], sines[i]);
  }
}

template <typename A>
void rotate_half(A* __restrict__ xs, A* __restrict__ ys, const A* cosines, const A* sines, int32_t pairs) {
  for (int32_t i = 0; i < pairs; ++i) {
    const A x = xs[i], y = ys[i];
    xs[i] = rotated_x(x, y, cosines[i], sines[i]);
    ys[i] = rotated_y(x, y, cosines[i], sines[i]);
  }
}

template <typename A>
void rotate(A* head, const RopeAxes& axes, const A* cosines, const A* sines) {
  switch (axes.layout) {
    case RopeLayout::kAdjacent:
      rotate_adjacent(head, cosines, sines, axes.pairs);
      break;
    case RopeLayout::kHalf:
      rotate_half(head, head + axes.pairs, cosines, sines, axes.pairs);
      break;
    case RopeLayout::kAxisHalf:
      for (int32_t begin = 0, a = 0; a < axes.count; begin += axes.axis[a++].pairs)
        rotate_half(head + 2 * begin, head + 2 * begin + axes.axis[a].pairs, cosines + begin, sines + begin,
                    axes.axis[a].pairs);
      break;
  }
}

// The norm's weight in accumulators, converted once a call: [heads * D] or [D]; empty without a norm.
template <typename T>
std::vector<acc_t<T>> weight_row(const Params& p, const RopeRows& rows) {
  if (rows.weight == nullptr) return {};
  std::vector<acc_t<T>> out(static_cast<size_t>(p.norm == NormScope::kModel ? rows.heads : 1) * p.head_dim);
  if (rows.float_weight) {
    const float* from = static_cast<const float*>(rows.weight);
    for (size_t i = 0; i < out.size(); ++i) out[i] = from[i];
  } else {
    row_to_acc(static_cast<const T*>(rows.weight), out.data(), static_cast<int64_t>(out.size()));
  }
  return out;
}

template <typename T>
struct TokenScratch {
  std::vector<acc_t<T>> row, cosines, sines;
  explicit TokenScratch(const Params& p)
      : row(static_cast<size_t>(std::max(p.q.heads, p.k.heads)) * p.head_dim),
        cosines(p.axes.pairs),
        sines(p.axes.pairs) {}
};

// One token of q or k: read, normalise, rotate, round once, write.
template <typename T>
void transform_token(const Params& p, const RopeRows& rows, const std::vector<acc_t<T>>& weight,
                     int64_t batch, int32_t token, int64_t out_token, TokenScratch<T>& scratch) {
  using A = acc_t<T>;
  const int64_t dim = p.head_dim, width = rows.heads * dim;
  const T* in =
      static_cast<const T*>(rows.in.data) + batch * rows.in.batch_stride + token * rows.in.token_stride;
  T* out = static_cast<T*>(rows.out.data) + batch * rows.out.batch_stride + out_token * rows.out.token_stride;
  A* row = scratch.row.data();

  for (int64_t h = 0; h < rows.heads; ++h) row_to_acc(in + h * rows.in.head_stride, row + h * dim, dim);
  if (!weight.empty() && p.norm == NormScope::kModel)
    normalise(row, weight.data(), rms_scale(sum_of_squares(row, width), width, p.eps), width);
  for (int64_t h = 0; h < rows.heads; ++h) {
    A* head = row + h * dim;
    if (!weight.empty() && p.norm == NormScope::kHead)
      normalise(head, weight.data(), rms_scale(sum_of_squares(head, dim), dim, p.eps), dim);
    rotate(head, p.axes, scratch.cosines.data(), scratch.sines.data());
    row_from_acc(head, out + h * rows.out.head_stride, dim);
  }
}

template <typename T>
void copy_value(const Params& p, int64_t batch, int32_t token, int64_t out_token) {
  const T* in = static_cast<const T*>(p.v.data) + batch * p.v.batch_stride + token * p.v.token_stride;
  T* out =
      static_cast<T*>(p.v_cache.data) + batch * p.v_cache.batch_stride + out_token * p.v_cache.token_stride;
  for (int64_t h = 0; h < p.k.heads; ++h)
    memcpy(out + h * p.v_cache.head_stride, in + h * p.v.head_stride, sizeof(T) * p.head_dim);
}

template <typename T>
void run(const Params& p) {
  const auto q_weight = weight_row<T>(p, p.q);
  const auto k_weight = weight_row<T>(p, p.k);
  // About 16K elements are worth a thread (the start of a parallel region costs some microseconds).
  const int64_t row = static_cast<int64_t>(p.q.heads + p.k.heads) * p.head_dim;
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, row));
  torch::stable::parallel_for(0, p.batch * p.tokens, grain, [&](int64_t begin, int64_t end) {
    TokenScratch<T> scratch(p);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / p.tokens;
      const int32_t token = static_cast<int32_t>(i % p.tokens);
      gather_angles(p, batch, token, scratch.cosines.data(), scratch.sines.data());
      transform_token<T>(p, p.q, q_weight, batch, token, token, scratch);
      if (p.k.heads == 0) continue;
      const int64_t slot_token = cache_token(p, batch, token);
      transform_token<T>(p, p.k, k_weight, batch, token, slot_token, scratch);
      if (p.v.data != nullptr) copy_value<T>(p, batch, token, slot_token);
    }
  });
}

}  // namespace

const char* run_cpu(const Params& p) {
  with_dtype(p.dtype, [&]<typename T>() { run<T>(p); });
  return "C++ backend";
}

}  // namespace rf::rope_append
