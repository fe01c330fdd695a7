// CuTe's own layouts, printed: the oracle for the model's addresses and fragments. Host code, no GPU.
//
// Lines: "k_major mn k byte" (64 x 128 tile, SW128), "mn_major n k byte" (128 x 176), "accumulator t i row
// col" (m64n128), "a_operand t j h row col" (m64k16).
#include <cuda_runtime.h>

#include <cstdio>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;
namespace gmma = SM90::GMMA;
using Element = cute::bfloat16_t;

int main() {
  const auto k_major = as_position_independent_swizzle_layout(
      tile_to_shape(gmma::Layout_K_SW128_Atom<Element>{}, Shape<_64, _128>{}));
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < 128; ++k)
      std::printf("k_major %d %d %d\n", m, k, static_cast<int>(k_major(m, k)) * 2);
  const auto mn_major = as_position_independent_swizzle_layout(
      tile_to_shape(gmma::Layout_MN_SW128_Atom<Element>{}, Shape<_128, _176>{}, Step<_2, _1>{}));
  for (int n = 0; n < 128; ++n)
    for (int k = 0; k < 176; ++k)
      std::printf("mn_major %d %d %d\n", n, k, static_cast<int>(mn_major(n, k)) * 2);
  using SS = SM90_64x128x16_F32BF16BF16_SS<gmma::Major::K, gmma::Major::K>;
  using RS = SM90_64x128x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::K>;
  const typename MMA_Traits<SS>::CLayout c;
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < 64; ++i)
      std::printf("accumulator %d %d %d %d\n", t, i, int(c(t, i)) % 64, int(c(t, i)) / 64);
  const typename MMA_Traits<RS>::ALayout a;
  for (int t = 0; t < 128; ++t)
    for (int j = 0; j < 4; ++j)
      for (int h = 0; h < 2; ++h) {
        const int x = a(t, j * 2 + h);
        std::printf("a_operand %d %d %d %d %d\n", t, j, h, x % 64, x / 64);
      }
}
