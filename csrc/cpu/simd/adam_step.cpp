#include "cpu/simd/adam_step.h"

#include "cpu/simd/vec.h"

namespace fastedit::FASTEDIT_ISA {

template <class G, class A>
A square_sum(const G* grad, int64_t n) {
  using V = Vec<A>;
  V acc[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + 4 * V::width <= n; i += 4 * V::width) {
    for (int j = 0; j < 4; ++j) {
      const V g = V::load(grad + i + j * V::width);
      acc[j] = fma(g, g, acc[j]);
    }
  }
  for (; i < n; i += V::width) {
    const V g = V::load(grad + i, n - i);
    acc[0] = fma(g, g, acc[0]);
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

namespace {

// m / (sqrt(v) s + eps), relative error 2^-22 and better: a division and a root take longer than all the rest of a step
// whose tensors are in the cache. NaNs come through, an infinite v leaves next to nothing; only roots of numbers below
// 2^-124 come out too small. Half of that is a normal number still: denormal ones, which v = 0 would lead to, take a
// hundred cycles.
FASTEDIT_INLINE Vec<float> over_root(Vec<float> m, Vec<float> v, Vec<float> s, Vec<float> eps) {
  using V = Vec<float>;
  const V within = min(V::set(0x1p127f), max(V::set(0x1p-124f), v));
  V inverse = rough_inverse_sqrt(within);
  inverse = inverse * fnma(within * V::set(0.5f) * inverse, inverse, V::set(1.5f));
  const V below = min(V::set(0x1p125f), fma(v * inverse, s, eps));
  const V rough = rough_inverse(below);
  return m * (rough * fnma(below, rough, V::set(2)));
}
FASTEDIT_INLINE Vec<double> over_root(Vec<double> m, Vec<double> v, Vec<double> s, Vec<double> eps) {
  return m / fma(sqrt(v), s, eps);
}

template <class A>
struct Lanes {
  using V = Vec<A>;
  V grad_scale, beta1_rest, beta2, beta2_rest, inverse_correction2, eps, decay, rate, low, high;

  explicit Lanes(const AdamScalars<A>& s)
      : grad_scale(V::set(s.grad_scale)),
        beta1_rest(V::set(s.beta1_rest)),
        beta2(V::set(s.beta2)),
        beta2_rest(V::set(s.beta2_rest)),
        inverse_correction2(V::set(s.inverse_correction2)),
        eps(V::set(s.eps)),
        decay(V::set(s.decay)),
        rate(V::set(s.rate)),
        low(V::set(-s.radius)),
        high(V::set(s.radius)) {}

  FASTEDIT_INLINE void step(const Lanes& s, V& p, V g, V& m, V& v) {
    g = g * s.grad_scale;
    m = fma(g - m, s.beta1_rest, m);
    v = fma(v, s.beta2, s.beta2_rest * g * g);
    p = fnma(s.rate, over_root(m, v, s.inverse_correction2, s.eps), p * s.decay);
    // in this order a NaN comes through
    p = min(s.high, max(s.low, p));
  }
};

}  // namespace

template <class T, class G, class A>
void adam_update(T* param, const G* grad, A* first, A* second, int64_t n, const AdamScalars<A>& s) {
  using V = Vec<A>;
  const Lanes<A> lanes(s);
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) {
    V p = V::load(param + i), m = V::load(first + i), v = V::load(second + i);
    Lanes<A>::step(lanes, p, V::load(grad + i), m, v);
    p.store(param + i);
    m.store(first + i);
    v.store(second + i);
  }
  if (i < n) {
    const int64_t rest = n - i;
    V p = V::load(param + i, rest), m = V::load(first + i, rest), v = V::load(second + i, rest);
    Lanes<A>::step(lanes, p, V::load(grad + i, rest), m, v);
    p.store(param + i, rest);
    m.store(first + i, rest);
    v.store(second + i, rest);
  }
}

#define FASTEDIT_INSTANTIATE(T, G, A) \
  template void adam_update<T, G, A>(T*, const G*, A*, A*, int64_t, const AdamScalars<A>&);
FASTEDIT_INSTANTIATE(float, float, float)
FASTEDIT_INSTANTIATE(BFloat16, BFloat16, float)
FASTEDIT_INSTANTIATE(BFloat16, float, float)
FASTEDIT_INSTANTIATE(Float16, Float16, float)
FASTEDIT_INSTANTIATE(Float16, float, float)
FASTEDIT_INSTANTIATE(double, double, double)
#undef FASTEDIT_INSTANTIATE
template float square_sum<float, float>(const float*, int64_t);
template float square_sum<BFloat16, float>(const BFloat16*, int64_t);
template float square_sum<Float16, float>(const Float16*, int64_t);
template double square_sum<double, double>(const double*, int64_t);

}  // namespace fastedit::FASTEDIT_ISA
