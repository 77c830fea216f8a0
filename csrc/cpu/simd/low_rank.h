// The three products of low_rank, all with the long dimension K contiguous: c = a b', y = c b, g = c' a.
#pragma once

#include <cstdint>

namespace fastedit {

#define FASTEDIT_DECLARE_LOW_RANK(isa)                                                                                \
  namespace isa {                                                                                                     \
  /* c (rows, r) = a (rows, K) times b (r, K) transposed */                                                           \
  template <class T, class A>                                                                                         \
  void dots(const T* a, int64_t a_stride, int64_t rows, const A* b, int64_t r, int64_t K, A* c);                      \
  /* y (rows, K) = c (rows, r) times b (r, K) */                                                                      \
  template <class T, class A>                                                                                         \
  void expand(const A* c, int64_t rows, const A* b, int64_t r, int64_t K, T* y, int64_t y_stride);                    \
  /* g (r, K) = c (rows, r) transposed times a (rows, K) */                                                           \
  template <class T, class A>                                                                                         \
  void collect(const A* c, int64_t rows, int64_t r, const T* a, int64_t a_stride, int64_t K, A* g, int64_t g_stride); \
  }

FASTEDIT_DECLARE_LOW_RANK(avx2)
FASTEDIT_DECLARE_LOW_RANK(avx512)
#undef FASTEDIT_DECLARE_LOW_RANK

}  // namespace fastedit
