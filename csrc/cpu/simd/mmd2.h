// The pieces of mmd2: distances of few rows, kernels of the squared distance on a tile, sums back onto features.
#pragma once

#include <cstdint>

namespace fastedit {

// sum_q exp(-beta_q D), beta ascending. Term q is the square of term q - 1 where `squared` says so.
template <class A>
struct Scales {
  int64_t count;
  const A* beta;
  const bool* squared;
};

// One tile of squared distances. With norms the tile holds inner products and D = |a|^2 + |b|^2 - 2 <a, b>.
template <class A>
struct Tile {
  A* values;
  int64_t stride, rows, columns;
  const A *row_norms, *column_norms;
};

// Weight W(D) = factor (on_value kappa' + on_env psi').
template <class A>
struct Upstream {
  A on_value, on_env, factor;
};

// What a pair's weight is made of: kappa'(D) and D kappa''(D), each of a tile's pairs.
template <class A>
struct Parts {
  A* slope;  // A const for reading
  int64_t slope_stride;
  A* bend;
  int64_t bend_stride;
};

#define FASTEDIT_DECLARE_MMD2(isa)                                                                         \
  namespace isa {                                                                                          \
  /* D (count, count) of few rows, each feature's difference squared; row j at rows[j] */                  \
  template <class T, class A>                                                                              \
  void distances(const T* const* rows, int64_t count, int64_t d, A* out, int64_t stride);                  \
  /* sums of kappa(D) and of 2 D kappa'(D) over the tile, added to sums[0] and sums[1] */                  \
  template <class A>                                                                                       \
  void kernel_sums(const Tile<A>& tile, const Scales<A>& scales, double* sums);                            \
  /* the same, and the parts of every pair's weight */                                                     \
  template <class A>                                                                                       \
  void kernel_parts(const Tile<A>& tile, const Scales<A>& scales, double* sums, const Parts<A>& parts);    \
  /* the tile's values become W(D) of the parts; its norms are not read */                                 \
  template <class A>                                                                                       \
  void weights_of_parts(const Tile<A>& tile, const Parts<const A>& parts, const Upstream<A>& upstream);    \
  /* the tile's values become W(D) */                                                                      \
  template <class A>                                                                                       \
  void kernel_weights(const Tile<A>& tile, const Scales<A>& scales, const Upstream<A>& upstream);          \
  /* out[i] = sum_j w[i][j] (z_i - z_j) for one row i of few */                                            \
  template <class T, class A>                                                                              \
  void pull(const T* const* rows, int64_t count, int64_t d, const A* w, int64_t stride, T* const* out);    \
  /* sum (d,) += the row, widened */                                                                       \
  template <class T, class A>                                                                              \
  void add_row(const T* row, int64_t d, A* sum);                                                           \
  /* out = row - centre; returns its squared norm */                                                       \
  template <class T, class A>                                                                              \
  A centred(const T* row, const A* centre, int64_t d, A* out);                                             \
  /* out = row * sum(w) - product, narrowed */                                                             \
  template <class T, class A>                                                                              \
  void finish(const A* row, const A* w, int64_t count, const A* product, int64_t d, T* out);               \
  /* the transpose of a (rows, columns) tile */                                                            \
  template <class A>                                                                                       \
  void transpose(const A* a, int64_t a_stride, int64_t rows, int64_t columns, A* out, int64_t out_stride); \
  }

FASTEDIT_DECLARE_MMD2(avx2)
FASTEDIT_DECLARE_MMD2(avx512)
#undef FASTEDIT_DECLARE_MMD2

}  // namespace fastedit
