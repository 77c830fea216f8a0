#include "cpu/simd/low_rank.h"

#include "cpu/simd/vec.h"

// Every output entry is summed in an order that does not depend on how many rows are worked on at a time, so that a
// batch gives the bits of its edits one by one.
namespace fastedit::FASTEDIT_ISA {

namespace {

// Ranks worked on at a time: accumulators fill the registers but for the operands.
constexpr int kRanks = kRegisters / 4;

template <int R, int Q, class T, class A>
FASTEDIT_INLINE void dots_block(const T* a, int64_t a_stride, const A* b, int64_t K, A* c, int64_t r) {
  using V = Vec<A>;
  V acc[R][Q];
  for (auto& row : acc) {
    for (V& lane : row) lane = V::zero();
  }
  int64_t k = 0;
  for (; k + V::width <= K; k += V::width) {
    V left[R];
    for (int i = 0; i < R; ++i) left[i] = V::load(a + i * a_stride + k);
    for (int q = 0; q < Q; ++q) {
      const V right = V::load(b + q * K + k);
      for (int i = 0; i < R; ++i) acc[i][q] = fma(left[i], right, acc[i][q]);
    }
  }
  if (k < K) {
    V left[R];
    for (int i = 0; i < R; ++i) left[i] = V::load(a + i * a_stride + k, K - k);
    for (int q = 0; q < Q; ++q) {
      const V right = V::load(b + q * K + k, K - k);
      for (int i = 0; i < R; ++i) acc[i][q] = fma(left[i], right, acc[i][q]);
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int q = 0; q < Q; ++q) c[i * r + q] = sum(acc[i][q]);
  }
}

template <int R, int Q, class T, class A>
FASTEDIT_INLINE void dots_ranks(int64_t ranks, const T* a, int64_t a_stride, const A* b, int64_t K, A* c, int64_t r) {
  if constexpr (Q > 0) {
    if (ranks == Q) return dots_block<R, Q>(a, a_stride, b, K, c, r);
    return dots_ranks<R, Q - 1>(ranks, a, a_stride, b, K, c, r);
  }
}

// Rows R at a time onto two vectors of y.
template <int R, class T, class A>
FASTEDIT_INLINE void expand_block(const A* c, const A* b, int64_t r, int64_t K, T* y, int64_t y_stride) {
  using V = Vec<A>;
  int64_t k = 0;
  for (; k + 2 * V::width <= K; k += 2 * V::width) {
    V acc[R][2];
    for (auto& row : acc) row[0] = row[1] = V::zero();
    for (int64_t q = 0; q < r; ++q) {
      const V low = V::load(b + q * K + k), high = V::load(b + q * K + k + V::width);
      for (int i = 0; i < R; ++i) {
        const V factor = V::set(c[i * r + q]);
        acc[i][0] = fma(factor, low, acc[i][0]);
        acc[i][1] = fma(factor, high, acc[i][1]);
      }
    }
    for (int i = 0; i < R; ++i) {
      acc[i][0].store(y + i * y_stride + k);
      acc[i][1].store(y + i * y_stride + k + V::width);
    }
  }
  for (; k < K; k += V::width) {
    V acc[R];
    for (V& lane : acc) lane = V::zero();
    for (int64_t q = 0; q < r; ++q) {
      const V right = V::load(b + q * K + k, K - k);
      for (int i = 0; i < R; ++i) acc[i] = fma(V::set(c[i * r + q]), right, acc[i]);
    }
    for (int i = 0; i < R; ++i) acc[i].store(y + i * y_stride + k, K - k);
  }
}

// Ranks Q at a time over all rows.
template <int Q, class T, class A>
FASTEDIT_INLINE void collect_block(const A* c, int64_t rows, int64_t r, const T* a, int64_t a_stride, int64_t K, A* g,
                                   int64_t g_stride) {
  using V = Vec<A>;
  int64_t k = 0;
  for (; k + 2 * V::width <= K; k += 2 * V::width) {
    V acc[Q][2];
    for (auto& rank : acc) rank[0] = rank[1] = V::zero();
    for (int64_t t = 0; t < rows; ++t) {
      const V low = V::load(a + t * a_stride + k), high = V::load(a + t * a_stride + k + V::width);
      for (int q = 0; q < Q; ++q) {
        const V factor = V::set(c[t * r + q]);
        acc[q][0] = fma(factor, low, acc[q][0]);
        acc[q][1] = fma(factor, high, acc[q][1]);
      }
    }
    for (int q = 0; q < Q; ++q) {
      acc[q][0].store(g + q * g_stride + k);
      acc[q][1].store(g + q * g_stride + k + V::width);
    }
  }
  for (; k < K; k += V::width) {
    V acc[Q];
    for (V& lane : acc) lane = V::zero();
    for (int64_t t = 0; t < rows; ++t) {
      const V left = V::load(a + t * a_stride + k, K - k);
      for (int q = 0; q < Q; ++q) acc[q] = fma(V::set(c[t * r + q]), left, acc[q]);
    }
    for (int q = 0; q < Q; ++q) acc[q].store(g + q * g_stride + k, K - k);
  }
}

template <int Q, class T, class A>
FASTEDIT_INLINE void collect_ranks(int64_t ranks, const A* c, int64_t rows, int64_t r, const T* a, int64_t a_stride,
                                   int64_t K, A* g, int64_t g_stride) {
  if constexpr (Q > 0) {
    if (ranks == Q) return collect_block<Q>(c, rows, r, a, a_stride, K, g, g_stride);
    return collect_ranks<Q - 1>(ranks, c, rows, r, a, a_stride, K, g, g_stride);
  }
}

constexpr int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

}  // namespace

template <class T, class A>
void dots(const T* a, int64_t a_stride, int64_t rows, const A* b, int64_t r, int64_t K, A* c) {
  for (int64_t q = 0; q < r; q += kRanks) {
    const int64_t ranks = least(kRanks, r - q);
    int64_t i = 0;
    for (; i + 2 <= rows; i += 2)
      dots_ranks<2, kRanks>(ranks, a + i * a_stride, a_stride, b + q * K, K, c + i * r + q, r);
    if (i < rows) dots_ranks<1, kRanks>(ranks, a + i * a_stride, a_stride, b + q * K, K, c + i * r + q, r);
  }
}

template <class T, class A>
void expand(const A* c, int64_t rows, const A* b, int64_t r, int64_t K, T* y, int64_t y_stride) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) expand_block<4>(c + i * r, b, r, K, y + i * y_stride, y_stride);
  for (; i < rows; ++i) expand_block<1>(c + i * r, b, r, K, y + i * y_stride, y_stride);
}

template <class T, class A>
void collect(const A* c, int64_t rows, int64_t r, const T* a, int64_t a_stride, int64_t K, A* g, int64_t g_stride) {
  constexpr int step = kRanks;
  for (int64_t q = 0; q < r; q += step) {
    collect_ranks<step>(least(step, r - q), c + q, rows, r, a, a_stride, K, g + q * g_stride, g_stride);
  }
}

#define FASTEDIT_INSTANTIATE(T, A)                                                        \
  template void dots<T, A>(const T*, int64_t, int64_t, const A*, int64_t, int64_t, A*);   \
  template void expand<T, A>(const A*, int64_t, const A*, int64_t, int64_t, T*, int64_t); \
  template void collect<T, A>(const A*, int64_t, int64_t, const T*, int64_t, int64_t, A*, int64_t);
FASTEDIT_INSTANTIATE(float, float)
FASTEDIT_INSTANTIATE(BFloat16, float)
FASTEDIT_INSTANTIATE(Float16, float)
FASTEDIT_INSTANTIATE(double, double)
#undef FASTEDIT_INSTANTIATE

}  // namespace fastedit::FASTEDIT_ISA
