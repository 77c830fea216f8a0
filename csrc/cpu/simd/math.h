// exp and expm1 of vectors.
#pragma once

#include "cpu/simd/vec.h"

namespace fastedit::FASTEDIT_ISA {

// Where exp(x) is taken for zero: 2^-126 is e^-87.3.
constexpr float kExpFloor = -87.0f;

// x = k ln 2 + f with |f| <= ln(2) / 2; returns e^f - 1 = f + f^2 q(f), relative error 3e-8, and 2^k for x in [-87,
// 88]. The coefficients interpolate (e^f - 1 - f) / f^2 at Chebyshev's nodes.
FASTEDIT_INLINE Vec<float> reduced_expm1(Vec<float> x, Vec<float>& power) {
  using V = Vec<float>;
  // so large that its last bit is 1: what is added is rounded to an integer, and stands in the last bits
  const V large = V::set(0x1.8p23f + 127);
  const V sum = fma(x, V::set(1.44269504f), large);
  power = last_bits_as_exponent(sum);
  const V k = sum - large;
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
  V power;
  const V p = reduced_expm1(max(low, x), power);
  return where_from(x, low, fma(p, power, power));
}

// e^x - 1 for x <= 88, relative error 2e-7 around 0 and everywhere else; -1 below e^-87.
FASTEDIT_INLINE Vec<float> expm1(Vec<float> x) {
  using V = Vec<float>;
  V power;
  const V p = reduced_expm1(max(V::set(kExpFloor), x), power);
  return fma(power, p, power - V::set(1.0f));
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
