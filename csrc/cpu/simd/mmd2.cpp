#include "cpu/simd/mmd2.h"

#include <type_traits>

#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

namespace fastedit::FASTEDIT_ISA {

namespace {

constexpr int kBlock = kRegisters / 8;

constexpr int64_t least(int64_t a, int64_t b) {
  return a < b ? a : b;
}

// D of one vector of a tile; max keeps a NaN in its second operand.
template <class A>
FASTEDIT_INLINE Vec<A> distance(const Tile<A>& tile, int64_t i, int64_t j, int64_t n) {
  using V = Vec<A>;
  const V value = V::load(tile.values + i * tile.stride + j, n);
  if (tile.row_norms == nullptr) return value;
  const V norms = V::set(tile.row_norms[i]) + V::load(tile.column_norms + j, n);
  return max(V::zero(), fnma(V::set(2), value, norms));
}

}  // namespace

template <class T, class A>
void distances(const T* const* rows, int64_t count, int64_t d, A* out, int64_t stride) {
  using V = Vec<A>;
  for (int64_t i0 = 0; i0 < count; i0 += kBlock) {
    for (int64_t j0 = i0; j0 < count; j0 += kBlock) {
      // rows beyond the last repeat it
      const T *a[kBlock], *b[kBlock];
      for (int i = 0; i < kBlock; ++i) a[i] = rows[least(i0 + i, count - 1)], b[i] = rows[least(j0 + i, count - 1)];
      V acc[kBlock][kBlock];
      for (auto& row : acc) {
        for (V& lane : row) lane = V::zero();
      }
      int64_t k = 0;
      for (; k + V::width <= d; k += V::width) {
        V right[kBlock];
        for (int j = 0; j < kBlock; ++j) right[j] = V::load(b[j] + k);
        for (int i = 0; i < kBlock; ++i) {
          const V left = V::load(a[i] + k);
          for (int j = 0; j < kBlock; ++j) {
            const V gap = left - right[j];
            acc[i][j] = fma(gap, gap, acc[i][j]);
          }
        }
      }
      if (k < d) {
        V right[kBlock];
        for (int j = 0; j < kBlock; ++j) right[j] = V::load(b[j] + k, d - k);
        for (int i = 0; i < kBlock; ++i) {
          const V left = V::load(a[i] + k, d - k);
          for (int j = 0; j < kBlock; ++j) {
            const V gap = left - right[j];
            acc[i][j] = fma(gap, gap, acc[i][j]);
          }
        }
      }
      for (int i = 0; i < kBlock && i0 + i < count; ++i) {
        for (int j = 0; j < kBlock && j0 + j < count; ++j) {
          const A value = sum(acc[i][j]);
          out[(i0 + i) * stride + j0 + j] = value;
          out[(j0 + j) * stride + i0 + i] = value;
        }
      }
    }
  }
}

namespace {

template <bool keeps, class A>
FASTEDIT_INLINE void add_kernels(const Tile<A>& tile, const Scales<A>& scales, double* sums, const Parts<A>& parts) {
  using V = Vec<A>;
  for (int64_t i = 0; i < tile.rows; ++i) {
    V value = V::zero(), slope = V::zero();
    for (int64_t j = 0; j < tile.columns; j += V::width) {
      const int64_t n = tile.columns - j;
      const V D = distance(tile, i, j, n);
      V kappa = V::zero(), first_derivative = V::zero(), second_derivative = V::zero(), term = V::zero();
      for (int64_t q = 0; q < scales.count; ++q) {
        const V beta = V::set(scales.beta[q]);
        term = scales.squared[q] ? term * term : exp(V::zero() - beta * D);
        kappa = kappa + term;
        first_derivative = fma(beta, term, first_derivative);
        if constexpr (keeps) second_derivative = fma(beta, beta * term, second_derivative);
      }
      value = first(value, value + kappa, n);
      slope = first(slope, fma(D, first_derivative, slope), n);
      if constexpr (keeps) {
        (V::zero() - first_derivative).store(parts.slope + i * parts.slope_stride + j, n);
        (D * second_derivative).store(parts.bend + i * parts.bend_stride + j, n);
      }
    }
    sums[0] += static_cast<double>(sum(value));
    sums[1] -= 2.0 * static_cast<double>(sum(slope));
  }
}

}  // namespace

template <class A>
void kernel_sums(const Tile<A>& tile, const Scales<A>& scales, double* sums) {
  add_kernels<false, A>(tile, scales, sums, {});
}

template <class A>
void kernel_parts(const Tile<A>& tile, const Scales<A>& scales, double* sums, const Parts<A>& parts) {
  add_kernels<true, A>(tile, scales, sums, parts);
}

template <class A>
void weights_of_parts(const Tile<A>& tile, const Parts<const A>& parts, const Upstream<A>& upstream) {
  using V = Vec<A>;
  const V on_slope = V::set(upstream.factor * (upstream.on_value + 2 * upstream.on_env));
  const V on_bend = V::set(2 * upstream.factor * upstream.on_env);
  for (int64_t i = 0; i < tile.rows; ++i) {
    for (int64_t j = 0; j < tile.columns; j += V::width) {
      const int64_t n = tile.columns - j;
      const V slope = V::load(parts.slope + i * parts.slope_stride + j, n);
      const V bend = V::load(parts.bend + i * parts.bend_stride + j, n);
      fma(on_bend, bend, on_slope * slope).store(tile.values + i * tile.stride + j, n);
    }
  }
}

template <class A>
void kernel_weights(const Tile<A>& tile, const Scales<A>& scales, const Upstream<A>& upstream) {
  using V = Vec<A>;
  // kappa' = -s1 and kappa'' = s2: W = -factor ((on_value + 2 on_env) s1 - 2 on_env D s2)
  const V on_first = V::set(-upstream.factor * (upstream.on_value + 2 * upstream.on_env));
  const V on_second = V::set(2 * upstream.factor * upstream.on_env);
  for (int64_t i = 0; i < tile.rows; ++i) {
    for (int64_t j = 0; j < tile.columns; j += V::width) {
      const int64_t n = tile.columns - j;
      const V D = distance(tile, i, j, n);
      V s1 = V::zero(), s2 = V::zero(), term = V::zero();
      for (int64_t q = 0; q < scales.count; ++q) {
        const V beta = V::set(scales.beta[q]);
        term = scales.squared[q] ? term * term : exp(V::zero() - beta * D);
        const V weighted = beta * term;
        s1 = s1 + weighted;
        s2 = fma(beta, weighted, s2);
      }
      fma(on_second * D, s2, on_first * s1).store(tile.values + i * tile.stride + j, n);
    }
  }
}

template <class T, class A>
void pull(const T* const* rows, int64_t count, int64_t d, const A* w, int64_t stride, T* const* out) {
  using V = Vec<A>;
  for (int64_t i0 = 0; i0 < count; i0 += kBlock) {
    const int64_t live = least(kBlock, count - i0);
    const T* own[kBlock];
    const A* weight[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      const int64_t row = least(i0 + i, count - 1);
      own[i] = rows[row], weight[i] = w + row * stride;
    }
    int64_t k = 0;
    for (; k + V::width <= d; k += V::width) {
      V left[kBlock], acc[kBlock];
      for (int i = 0; i < kBlock; ++i) left[i] = V::load(own[i] + k), acc[i] = V::zero();
      for (int64_t j = 0; j < count; ++j) {
        const V right = V::load(rows[j] + k);
        for (int i = 0; i < kBlock; ++i) acc[i] = fma(V::set(weight[i][j]), left[i] - right, acc[i]);
      }
      for (int i = 0; i < live; ++i) acc[i].store(out[i0 + i] + k);
    }
    if (k < d) {
      V left[kBlock], acc[kBlock];
      for (int i = 0; i < kBlock; ++i) left[i] = V::load(own[i] + k, d - k), acc[i] = V::zero();
      for (int64_t j = 0; j < count; ++j) {
        const V right = V::load(rows[j] + k, d - k);
        for (int i = 0; i < kBlock; ++i) acc[i] = fma(V::set(weight[i][j]), left[i] - right, acc[i]);
      }
      for (int i = 0; i < live; ++i) acc[i].store(out[i0 + i] + k, d - k);
    }
  }
}

template <class T, class A>
void add_row(const T* row, int64_t d, A* sum) {
  using V = Vec<A>;
  for (int64_t k = 0; k < d; k += V::width) (V::load(sum + k, d - k) + V::load(row + k, d - k)).store(sum + k, d - k);
}

template <class T, class A>
A centred(const T* row, const A* centre, int64_t d, A* out) {
  using V = Vec<A>;
  V square = V::zero();
  for (int64_t k = 0; k < d; k += V::width) {
    const V value = V::load(row + k, d - k) - V::load(centre + k, d - k);
    value.store(out + k, d - k);
    square = fma(value, value, square);
  }
  return sum(square);
}

template <class T, class A>
void finish(const A* row, const A* w, int64_t count, const A* product, int64_t d, T* out) {
  using V = Vec<A>;
  V total = V::zero();
  for (int64_t j = 0; j < count; j += V::width) total = total + V::load(w + j, count - j);
  const V factor = V::set(sum(total));
  for (int64_t k = 0; k < d; k += V::width) {
    const V value = fma(factor, V::load(row + k, d - k), V::zero() - V::load(product + k, d - k));
    value.store(out + k, d - k);
  }
}

template <class A>
void transpose(const A* a, int64_t a_stride, int64_t rows, int64_t columns, A* out, int64_t out_stride) {
  // squares of one cache line of float64 a side
  constexpr int64_t step = 8;
  for (int64_t i = 0; i < rows; i += step) {
    for (int64_t j = 0; j < columns; j += step) {
      const int64_t high = least(step, rows - i), wide = least(step, columns - j);
      const A* from = a + i * a_stride + j;
      A* to = out + j * out_stride + i;
      if constexpr (std::is_same_v<A, float>) {
        if (high == step && wide == step) {
          turn8(from, a_stride, to, out_stride);
          continue;
        }
      }
      turn(from, a_stride, high, wide, to, out_stride);
    }
  }
}

#define FASTEDIT_INSTANTIATE(T, A)                                                           \
  template void distances<T, A>(const T* const*, int64_t, int64_t, A*, int64_t);             \
  template void pull<T, A>(const T* const*, int64_t, int64_t, const A*, int64_t, T* const*); \
  template void add_row<T, A>(const T*, int64_t, A*);                                        \
  template A centred<T, A>(const T*, const A*, int64_t, A*);                                 \
  template void finish<T, A>(const A*, const A*, int64_t, const A*, int64_t, T*);
FASTEDIT_INSTANTIATE(float, float)
FASTEDIT_INSTANTIATE(BFloat16, float)
FASTEDIT_INSTANTIATE(Float16, float)
FASTEDIT_INSTANTIATE(double, double)
#undef FASTEDIT_INSTANTIATE
#define FASTEDIT_INSTANTIATE(A)                                                                 \
  template void kernel_sums<A>(const Tile<A>&, const Scales<A>&, double*);                      \
  template void kernel_parts<A>(const Tile<A>&, const Scales<A>&, double*, const Parts<A>&);    \
  template void weights_of_parts<A>(const Tile<A>&, const Parts<const A>&, const Upstream<A>&); \
  template void kernel_weights<A>(const Tile<A>&, const Scales<A>&, const Upstream<A>&);        \
  template void transpose<A>(const A*, int64_t, int64_t, int64_t, A*, int64_t);
FASTEDIT_INSTANTIATE(float)
FASTEDIT_INSTANTIATE(double)
#undef FASTEDIT_INSTANTIATE

}  // namespace fastedit::FASTEDIT_ISA
