// Products of packed matrices, for epilogues that work on a tile while it lies in the cache: no library call, and the
// same order of sums for every entry, wherever it lies in a tile.
#pragma once

#include <cstdint>

namespace fastedit {

// Both instruction sets' panels divide this: buffers are padded to it, whichever is in use.
constexpr int64_t kPanelPadding = 32;
// Rows of a left matrix worked on at a time divide this.
constexpr int64_t kRowPadding = 8;

static constexpr int64_t padded(int64_t n) {
  return (n + kPanelPadding - 1) / kPanelPadding * kPanelPadding;
}

// What is needed next and lies in memory, as many bytes at each beginning: brought into the cache while a product is
// made, whose operands are there already.
struct Ahead {
  static constexpr int kMost = 3;
  int count;
  const void* begins[kMost];
  int64_t bytes;
};

#define FASTEDIT_DECLARE_GEMM(isa)                                                                                    \
  namespace isa {                                                                                                     \
  /* Pack b (rows, K), rows ldb apart, for a product with its transpose; out holds padded(rows) * K, zeros beyond. */ \
  template <class A>                                                                                                  \
  void pack_transposed(const A* b, int64_t ldb, int64_t rows, int64_t K, A* out);                                     \
  /* Pack rows [0, rows) of b (K, columns) from row `first` of K on; out holds K * padded(columns), zeros beyond. */  \
  template <class A>                                                                                                  \
  void pack_columns(const A* b, int64_t ldb, int64_t first, int64_t rows, int64_t K, int64_t columns, A* out);        \
  /* c (rows, columns) = a (rows, K) times the packed b (K, columns). c is written in whole panels and in multiples   \
     of kRowPadding rows: it must have room for padded(columns) and the rows. */                                      \
  template <class A>                                                                                                  \
  void gemm(const A* a, int64_t lda, int64_t rows, const A* packed, int64_t columns, int64_t K, A* c, int64_t ldc);   \
  /* the same, with what is needed next */                                                                            \
  template <class A>                                                                                                  \
  void gemm_ahead(const A* a, int64_t lda, int64_t rows, const A* packed, int64_t columns, int64_t K, A* c,           \
                  int64_t ldc, const Ahead& ahead);                                                                   \
  }

FASTEDIT_DECLARE_GEMM(avx2)
FASTEDIT_DECLARE_GEMM(avx512)
#undef FASTEDIT_DECLARE_GEMM

}  // namespace fastedit
