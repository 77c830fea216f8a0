#include "cpu/simd/gemm.h"

#include "cpu/simd/vec.h"

namespace fastedit::FASTEDIT_ISA {

namespace {

// Rows of a and vectors of b in the registers at a time: accumulators take half of them.
constexpr int kRows = kRegisters / 4;
constexpr int kVectors = 2;
// Steps of the inner dimension for which a panel of b stays in the first cache.
constexpr int64_t kDepth = 256;

template <class A>
constexpr int64_t kPanel = kVectors * Vec<A>::width;

constexpr int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// kRows rows of c (., panel) (+)= a times one packed panel; rows beyond the last repeat it.
template <class A>
FASTEDIT_INLINE void micro(const A* a, int64_t lda, int64_t rows, const A* b, int64_t K, A* c, int64_t ldc, bool add) {
  using V = Vec<A>;
  const A* row[kRows];
  for (int i = 0; i < kRows; ++i) row[i] = a + least(i, rows - 1) * lda;
  V acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) acc[i][j] = add ? V::load(c + i * ldc + j * V::width) : V::zero();
  }
  for (int64_t k = 0; k < K; ++k) {
    const V low = V::load(b + k * kPanel<A>), high = V::load(b + k * kPanel<A> + V::width);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V factor = V::set(row[i][k]);
      acc[i][0] = fma(factor, low, acc[i][0]);
      acc[i][1] = fma(factor, high, acc[i][1]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) acc[i][j].store(c + i * ldc + j * V::width);
  }
}

}  // namespace

template <class A>
void pack_transposed(const A* b, int64_t ldb, int64_t rows, int64_t K, A* out) {
  constexpr int64_t panel = kPanel<A>;
  for (int64_t r = 0; r < padded(rows); r += panel) {
    A* to = out + r * K;
    // some columns of all rows at a time: what is written stays in the first cache
    for (int64_t k0 = 0; k0 < K; k0 += 64) {
      const int64_t k1 = least(k0 + 64, K);
      for (int64_t i = 0; i < panel; ++i) {
        if (r + i < rows) {
          const A* from = b + (r + i) * ldb;
          for (int64_t k = k0; k < k1; ++k) to[k * panel + i] = from[k];
        } else {
          for (int64_t k = k0; k < k1; ++k) to[k * panel + i] = 0;
        }
      }
    }
  }
}

template <class A>
void pack_columns(const A* b, int64_t ldb, int64_t first, int64_t rows, int64_t K, int64_t columns, A* out) {
  using V = Vec<A>;
  constexpr int64_t panel = kPanel<A>;
  for (int64_t j = 0; j < padded(columns); j += panel) {
    for (int64_t k = 0; k < rows; ++k) {
      for (int64_t v = 0; v < panel; v += V::width) {
        const int64_t rest = columns - j - v;
        const V values = rest > 0 ? V::load(b + k * ldb + j + v, rest) : V::zero();
        values.store(out + j * K + (first + k) * panel + v);
      }
    }
  }
}

template <class A>
void gemm(const A* a, int64_t lda, int64_t rows, const A* packed, int64_t columns, int64_t K, A* c, int64_t ldc) {
  constexpr int64_t panel = kPanel<A>;
  for (int64_t k = 0; k < K; k += kDepth) {
    const int64_t depth = least(kDepth, K - k);
    for (int64_t j = 0; j < columns; j += panel) {
      const A* b = packed + j * K + k * panel;
      for (int64_t i = 0; i < rows; i += kRows) {
        micro(a + i * lda + k, lda, rows - i, b, depth, c + i * ldc + j, ldc, k > 0);
      }
    }
  }
}

#define FASTEDIT_INSTANTIATE(A)                                                             \
  template void pack_transposed<A>(const A*, int64_t, int64_t, int64_t, A*);                \
  template void pack_columns<A>(const A*, int64_t, int64_t, int64_t, int64_t, int64_t, A*); \
  template void gemm<A>(const A*, int64_t, int64_t, const A*, int64_t, int64_t, A*, int64_t);
FASTEDIT_INSTANTIATE(float)
FASTEDIT_INSTANTIATE(double)
#undef FASTEDIT_INSTANTIATE

}  // namespace fastedit::FASTEDIT_ISA
