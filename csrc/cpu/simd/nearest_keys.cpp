#include "cpu/simd/nearest_keys.h"

#include "cpu/simd/vec.h"

namespace fastedit::FASTEDIT_ISA {

namespace {

// Lanes where a > b; false where either is NaN.
#if defined(__AVX512F__)
FASTEDIT_INLINE unsigned above(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ);
}
FASTEDIT_INLINE unsigned above(Vec<double> a, Vec<double> b) {
  return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ);
}
#else
FASTEDIT_INLINE unsigned above(Vec<float> a, Vec<float> b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)));
}
FASTEDIT_INLINE unsigned above(Vec<double> a, Vec<double> b) {
  return static_cast<unsigned>(_mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)));
}
#endif

// Keys come in rising order: an equal score goes behind those that are there.
template <class A>
void insert(const Best<A>& best, int64_t query, A score, int64_t key) {
  A* scores = best.scores + query * best.k;
  int64_t* keys = best.keys + query * best.k;
  int64_t at = best.k - 1;
  for (; at > 0 && score > scores[at - 1]; --at) {
    scores[at] = scores[at - 1];
    keys[at] = keys[at - 1];
  }
  scores[at] = score;
  keys[at] = key;
  best.last[query] = scores[best.k - 1];
}

}  // namespace

template <class T, class A>
A widened(const T* row, int64_t d, A* out) {
  using V = Vec<A>;
  V square = V::zero();
  for (int64_t k = 0; k < d; k += V::width) {
    const V value = V::load(row + k, d - k);
    value.store(out + k, d - k);
    square = fma(value, value, square);
  }
  return sum(square);
}

template <class A>
void take_better(const A* products, int64_t stride, int64_t rows, int64_t queries, int64_t first, const A* factor,
                 const A* shift, const Best<A>& best) {
  using V = Vec<A>;
  for (int64_t i = 0; i < rows; ++i) {
    const A* row = products + i * stride;
    const V scale = V::set(factor ? factor[i] : A(1)), less = V::set(shift ? shift[i] : A(0));
    for (int64_t j = 0; j < queries; j += V::width) {
      const int64_t n = queries - j;
      const V score = fma(scale, V::load(row + j, n), V::zero() - less);
      unsigned better = above(score, V::load(best.last + j, n));
      if (n < V::width) better &= (1u << n) - 1;
      if (better == 0) continue;
      A lanes[V::width];
      score.store(lanes);
      for (; better != 0; better &= better - 1) {
        const int lane = __builtin_ctz(better);
        insert(best, j + lane, lanes[lane], first + i);
      }
    }
  }
}

template <class T, class A>
A squared_distance(const T* a, const T* b, int64_t d) {
  using V = Vec<A>;
  V square = V::zero();
  for (int64_t k = 0; k < d; k += V::width) {
    const V gap = V::load(a + k, d - k) - V::load(b + k, d - k);
    square = fma(gap, gap, square);
  }
  return sum(square);
}

#define FASTEDIT_INSTANTIATE(T, A)                 \
  template A widened<T, A>(const T*, int64_t, A*); \
  template A squared_distance<T, A>(const T*, const T*, int64_t);
FASTEDIT_INSTANTIATE(float, float)
FASTEDIT_INSTANTIATE(BFloat16, float)
FASTEDIT_INSTANTIATE(Float16, float)
FASTEDIT_INSTANTIATE(double, double)
#undef FASTEDIT_INSTANTIATE
template void take_better<float>(const float*, int64_t, int64_t, int64_t, int64_t, const float*, const float*,
                                 const Best<float>&);
template void take_better<double>(const double*, int64_t, int64_t, int64_t, int64_t, const double*, const double*,
                                  const Best<double>&);

}  // namespace fastedit::FASTEDIT_ISA
