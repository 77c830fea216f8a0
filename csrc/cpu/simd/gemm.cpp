#include "cpu/simd/gemm.h"

#include <type_traits>

#include "cpu/simd/vec.h"

namespace fastedit::FASTEDIT_ISA {

namespace {

// Rows of a and vectors of b in the registers at a time: accumulators take half of them.
constexpr int kRows = kRegisters / 4;
constexpr int kVectors = 2;
// Steps of the inner dimension for which a panel of b stays in the first cache.
constexpr int64_t kDepth = 256;

// Rows and columns transposed at a time; panels are multiples of it.
constexpr int64_t kSquare = 8;

template <class A>
constexpr int64_t kPanel = kVectors * Vec<A>::width;

constexpr int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// Bytes that come into the cache at a time, and how many of them during one micro().
constexpr int64_t kLine = 64;
constexpr int64_t kMostLines = 256;

// Some lines of what is needed next, one a step of the inner dimension.
struct Lines {
  int64_t count = 0;
  const char* of[kMostLines];
};

// kRows rows of c (., panel) (+)= a times one packed panel; rows beyond the last repeat it.
template <bool has_lines, class A>
FASTEDIT_INLINE void micro(const A* a, int64_t lda, int64_t rows, const A* b, int64_t K, A* c, int64_t ldc, bool add,
                           const Lines& lines) {
  using V = Vec<A>;
  const A* row[kRows];
  for (int i = 0; i < kRows; ++i) row[i] = a + least(i, rows - 1) * lda;
  V acc[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) acc[i][j] = add ? V::load(c + i * ldc + j * V::width) : V::zero();
  }
  for (int64_t k = 0; k < K; ++k) {
    if constexpr (has_lines) {
      if (k < lines.count) _mm_prefetch(lines.of[k], _MM_HINT_T0);
    }
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
    for (int64_t k = 0; k < K; k += kSquare) {
      const int64_t depth = least(kSquare, K - k);
      for (int64_t i = 0; i < panel; i += kSquare) {
        const int64_t live = least(kSquare, rows - r - i);
        const A* from = b + (r + i) * ldb + k;
        if constexpr (std::is_same_v<A, float>) {
          if (live == kSquare && depth == kSquare) {
            turn8(from, ldb, to + k * panel + i, panel);
            continue;
          }
        }
        for (int64_t j = 0; j < depth; ++j) {
          for (int64_t q = 0; q < kSquare; ++q) to[(k + j) * panel + i + q] = q < live ? from[q * ldb + j] : 0;
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

namespace {

// The lines that a micro() brings in: number `step` of `steps`.
FASTEDIT_INLINE void choose_lines(const Ahead& ahead, int64_t step, int64_t steps, Lines& lines) {
  const int64_t all = ahead.bytes / kLine, first = all * step / steps, last = all * (step + 1) / steps;
  lines.count = 0;
  for (int array = 0; array < ahead.count; ++array) {
    for (int64_t line = first; line < last && lines.count < kMostLines; ++line) {
      lines.of[lines.count++] = static_cast<const char*>(ahead.begins[array]) + line * kLine;
    }
  }
}

template <bool has_lines, class A>
FASTEDIT_INLINE void product(const A* a, int64_t lda, int64_t rows, const A* packed, int64_t columns, int64_t K, A* c,
                             int64_t ldc, const Ahead& ahead) {
  constexpr int64_t panel = kPanel<A>;
  Lines lines;
  const auto pieces = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  const int64_t steps = pieces(K, kDepth) * pieces(columns, panel) * pieces(rows, kRows);
  int64_t step = 0;
  for (int64_t k = 0; k < K; k += kDepth) {
    const int64_t depth = least(kDepth, K - k);
    for (int64_t j = 0; j < columns; j += panel) {
      const A* b = packed + j * K + k * panel;
      for (int64_t i = 0; i < rows; i += kRows) {
        if constexpr (has_lines) choose_lines(ahead, step++, steps, lines);
        micro<has_lines>(a + i * lda + k, lda, rows - i, b, depth, c + i * ldc + j, ldc, k > 0, lines);
      }
    }
  }
}

}  // namespace

template <class A>
void gemm(const A* a, int64_t lda, int64_t rows, const A* packed, int64_t columns, int64_t K, A* c, int64_t ldc) {
  product<false>(a, lda, rows, packed, columns, K, c, ldc, {});
}

template <class A>
void gemm_ahead(const A* a, int64_t lda, int64_t rows, const A* packed, int64_t columns, int64_t K, A* c, int64_t ldc,
                const Ahead& ahead) {
  product<true>(a, lda, rows, packed, columns, K, c, ldc, ahead);
}

#define FASTEDIT_INSTANTIATE(A)                                                               \
  template void pack_transposed<A>(const A*, int64_t, int64_t, int64_t, A*);                  \
  template void pack_columns<A>(const A*, int64_t, int64_t, int64_t, int64_t, int64_t, A*);   \
  template void gemm<A>(const A*, int64_t, int64_t, const A*, int64_t, int64_t, A*, int64_t); \
  template void gemm_ahead<A>(const A*, int64_t, int64_t, const A*, int64_t, int64_t, A*, int64_t, const Ahead&);
FASTEDIT_INSTANTIATE(float)
FASTEDIT_INSTANTIATE(double)
#undef FASTEDIT_INSTANTIATE

}  // namespace fastedit::FASTEDIT_ISA
