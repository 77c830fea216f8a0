// The exponential function on the vectors of vec.h; included by sources of this folder only.
#pragma once

#include "cpu/simd/vec.h"

namespace fastedit::FASTEDIT_ISA {

// e^x for x <= 0 within 2 units in the last place: x = n log 2 + r, the Taylor polynomial of e^r for |r| <= log(2) / 2,
// times 2^n. Gradual to zero; a NaN stays one.
FASTEDIT_INLINE Vec<float> exp_negative(Vec<float> x) {
  using V = Vec<float>;
  x = max(V::set(-104.0f), x);
  const V n = round(x * V::set(1.44269504f));
  // log 2 in two parts, the first with so few digits that its product with n is exact
  V r = fnma(n, V::set(0.693359375f), x);
  r = fnma(n, V::set(-2.12194440e-4f), r);
  V p = V::set(1.0f / 5040);
  p = fma(p, r, V::set(1.0f / 720));
  p = fma(p, r, V::set(1.0f / 120));
  p = fma(p, r, V::set(1.0f / 24));
  p = fma(p, r, V::set(1.0f / 6));
  p = fma(p, r, V::set(0.5f));
  p = fma(p, r, V::set(1.0f));
  return scale(fma(p, r, V::set(1.0f)), n);
}

FASTEDIT_INLINE Vec<double> exp_negative(Vec<double> x) {
  using V = Vec<double>;
  x = max(V::set(-746.0), x);
  const V n = round(x * V::set(1.4426950408889634074));
  V r = fnma(n, V::set(6.93145751953125e-1), x);
  r = fnma(n, V::set(1.42860682030941723212e-6), r);
  V p = V::set(1.0 / 6227020800.0);
  p = fma(p, r, V::set(1.0 / 479001600.0));
  p = fma(p, r, V::set(1.0 / 39916800.0));
  p = fma(p, r, V::set(1.0 / 3628800.0));
  p = fma(p, r, V::set(1.0 / 362880.0));
  p = fma(p, r, V::set(1.0 / 40320.0));
  p = fma(p, r, V::set(1.0 / 5040.0));
  p = fma(p, r, V::set(1.0 / 720.0));
  p = fma(p, r, V::set(1.0 / 120.0));
  p = fma(p, r, V::set(1.0 / 24.0));
  p = fma(p, r, V::set(1.0 / 6.0));
  p = fma(p, r, V::set(0.5));
  p = fma(p, r, V::set(1.0));
  return scale(fma(p, r, V::set(1.0)), n);
}

}  // namespace fastedit::FASTEDIT_ISA
