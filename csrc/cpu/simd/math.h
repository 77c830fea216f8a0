// exp and expm1 of vectors.
#pragma once

#include "cpu/simd/vec.h"

namespace fastedit::FASTEDIT_ISA {

// Where exp(x) is taken for zero: 2^-126 is e^-87.3.
constexpr float kExpFloor = -87.0f;

// x = k ln 2 + f with |f| <= ln(2) / 2; returns e^f - 1 = f + f^2 q(f), relative error 3e-8. The coefficients
// interpolate (e^f - 1 - f) / f^2 at Chebyshev's nodes.
FASTEDIT_INLINE Vec<float> reduced_expm1(Vec<float> x, Vec<float>& k) {
  using V = Vec<float>;
  k = round(x * V::set(1.44269504f));
  // ln 2 in two parts, the first with trailing zeros: k times it is exact
  V f = fnma(k, V::set(0x1.62e000p-1f), x);
  f = fnma(k, V::set(0x1.0bfbe8p-15f), f);
  V q = V::set(0x1.6d110ap-10f);
  q = fma(q, f, V::set(0x1.120b6ep-7f));
  q = fma(q, f, V::set(0x1.55551ap-5f));
  q = fma(q, f, V::set(0x1.5554dcp-3f));
  q = fma(q, f, V::set(0.5f));
  return fma(f * f, q, f);
}

// e^x for x <= 88, relative error 1.2e-7; 0 below e^-87.
FASTEDIT_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  const V low = V::set(kExpFloor);
  V k;
  const V p = reduced_expm1(max(low, x), k);
  return where_from(x, low, scale(p + V::set(1.0f), k));
}

// e^x - 1 for x <= 88, relative error 2e-7 around 0 and everywhere else; -1 below e^-87.
FASTEDIT_INLINE Vec<float> expm1(Vec<float> x) {
  using V = Vec<float>;
  V k;
  const V p = reduced_expm1(max(V::set(kExpFloor), x), k);
  const V one = V::set(1.0f), power = scale(one, k);
  return fma(power, p, power - one);
}

// float64 serves the tests: lane by lane through the C library.
FASTEDIT_INLINE Vec<double> exp(Vec<double> x) {
  double lanes[Vec<double>::width];
  x.store(lanes);
  for (double& lane : lanes) lane = __builtin_exp(lane);
  return Vec<double>::load(lanes);
}

FASTEDIT_INLINE Vec<double> expm1(Vec<double> x) {
  double lanes[Vec<double>::width];
  x.store(lanes);
  for (double& lane : lanes) lane = __builtin_expm1(lane);
  return Vec<double>::load(lanes);
}

}  // namespace fastedit::FASTEDIT_ISA
