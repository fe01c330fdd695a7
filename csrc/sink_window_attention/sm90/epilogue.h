// The epilogue: fragments of a tile that several CTAs share are merged through the workspace, then O and LSE
// are written.
//
// All of it works warp by warp on registers: a fragment goes out and comes back in the same thread's layout,
// so there is no shared memory, no CTA barrier and no proxy fence, and rows beyond the last query cost
// nothing.
#pragma once

#include "csrc/arch/sync.h"
#include "csrc/arch/vec.h"
#include "csrc/math/online_softmax.h"
#include "csrc/sink_window_attention/sm90/mainloop.h"
#include "csrc/sink_window_attention/sm90/traits.h"

namespace rf::sink_window_attention {

template <class Traits>
struct EpilogueFwdSm90 {
  using Element = typename Traits::Element;
  using Fragment = typename MainloopFwdSm90<Traits>::Fragment;
  static constexpr int kOutputs = Traits::kHeadDim / 2;
  static constexpr int kQuads = kOutputs / 4;  // 16-byte pieces of a thread's O

  static RF_DEVICE float* partial_of(const FwdKernelParams& p, int range, int warp) {
    return p.partials + static_cast<size_t>(range * Traits::kConsumerWarps + warp) * Traits::kPartialFloats;
  }
  static RF_DEVICE uint32_t* flag_of(const FwdKernelParams& p, int range, int warp) {
    return p.flags + range * Traits::kConsumerWarps + warp;
  }

  // Hands this warp's fragment to the same warp of the CTA that owns the tile.
  static RF_DEVICE void contribute(const FwdKernelParams& p, int range, int warp, int lane,
                                   const Fragment& f) {
    using namespace arch;
    float* partial = partial_of(p, range, warp) + lane * 4;  // one address; the rest are constant offsets
#pragma unroll
    for (int i = 0; i < kQuads; ++i) partial_store(partial + i * 128, f.o + 4 * i);
    const float rows[4] = {f.row[0].reference, f.row[1].reference, f.row[0].sum, f.row[1].sum};
    partial_store(partial + kQuads * 128, rows);
    sync_warp();  // puts the other lanes' stores before lane 0's release, which is cumulative
    if (elect_one()) flag_signal(flag_of(p, range, warp));
  }

  // Takes in the fragment of `range`. Every lane acquires, so no further fence is needed.
  static RF_DEVICE void merge(const FwdKernelParams& p, int range, int warp, int lane, Fragment& f) {
    using namespace arch;
    const float* partial = partial_of(p, range, warp) + lane * 4;
    flag_wait(flag_of(p, range, warp));
    float rows[4], x[kQuads][4];  // all loads in flight at once: S and P are gone, registers are free
    partial_load(partial + kQuads * 128, rows);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) partial_load(partial + i * 128, x[i]);
    MergeFactors factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) factor[r] = softmax_merge(f.row[r], {rows[r], rows[2 + r]});
#pragma unroll
    for (int i = 0; i < kQuads; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& o = f.o[i * 4 + e];
        o = o * factor[e >> 1].own + x[i][e] * factor[e >> 1].other;
      }
  }

  // Words y[0..3] of thread x of a quad are word x of column blocks 0..3; afterwards thread x holds words
  // 0..3 of block x.
  static RF_DEVICE void transpose_quad(uint32_t (&y)[4], int x) {
    using namespace arch;
    const bool upper = x & 2, odd = x & 1;
    const uint32_t a = shuffle_xor(upper ? y[0] : y[2], 2), b = shuffle_xor(upper ? y[1] : y[3], 2);
    const uint32_t z0 = upper ? a : y[0],
                   z1 = upper ? b : y[1];  // words 0, 1 of the two blocks of this half ...
    const uint32_t z2 = upper ? y[2] : a, z3 = upper ? y[3] : b;  // ... and words 2, 3
    const uint32_t c = shuffle_xor(odd ? z0 : z1, 1), d = shuffle_xor(odd ? z2 : z3, 1);
    y[0] = odd ? c : z0;
    y[1] = odd ? z1 : c;
    y[2] = odd ? d : z2;
    y[3] = odd ? z3 : d;
  }

  // Normalises and writes the warp's 16 rows: 16 bytes a thread, 64 contiguous bytes a quad.
  static RF_DEVICE void store(const FwdKernelParams& p, const FwdWork& work, int warp, int lane,
                              const Fragment& f) {
    using namespace arch;
    const int x = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = work.row + warp * 16 + lane / 4 + 8 * r;
      const bool exists = row < work.row_end;
      const float inverse =
          f.row[r].sum == 0.f ? 0.f : 1.f / f.row[r].sum;  // every score -inf: the empty sum
      if (x == 0 && exists)
        global_store(p.lse + (static_cast<int64_t>(work.batch) * p.q_heads + work.head) * p.q_tokens + row,
                     softmax_lse(f.row[r]));
      char* out = p.out + 2 * (work.batch * p.out_batch_stride + row * p.out_token_stride +
                               work.head * p.out_head_stride);
#pragma unroll
      for (int block = 0; block < Traits::kHeadDim / 8; block += 4) {
        uint32_t y[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* o = f.o + (block + i) * 4 + 2 * r;
          y[i] = pack2<Element>(o[0] * inverse, o[1] * inverse);
        }
        transpose_quad(y, x);
        if (exists) global_store(out + (block + x) * 16, y);
      }
    }
  }
};

}  // namespace rf::sink_window_attention
