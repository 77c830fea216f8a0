// adam_step_ of one element, and what a row's step needs besides its tensors.
#pragma once

#include "cuda/device.h"

namespace fastedit::gpu {

// In the precision of the moments; computed in float64, as torch.optim.AdamW does.
template <class A>
struct AdamScalars {
  A grad_scale;           // of the clip; 1 without
  A beta1_rest;           // 1 - beta1
  A beta2, beta2_rest;    // beta2, 1 - beta2
  A inverse_correction2;  // 1 / sqrt(1 - beta2^step)
  A eps;
  A decay;   // 1 - lr weight_decay
  A rate;    // lr / (1 - beta1^step)
  A radius;  // of the ball around zero; infinite without
};

struct AdamSettings {
  double beta1, beta2, eps, weight_decay;
  double clip, radius;  // infinite where there is none
};

template <class A>
__device__ inline AdamScalars<A> adam_scalars(const AdamSettings& s, int64_t step, double lr) {
  const double count = static_cast<double>(step);
  AdamScalars<A> scalars;
  scalars.grad_scale = 1;
  scalars.beta1_rest = static_cast<A>(1.0 - s.beta1);
  scalars.beta2 = static_cast<A>(s.beta2);
  scalars.beta2_rest = static_cast<A>(1.0 - s.beta2);
  scalars.inverse_correction2 = static_cast<A>(1.0 / ::sqrt(1.0 - ::pow(s.beta2, count)));
  scalars.eps = static_cast<A>(s.eps);
  scalars.decay = static_cast<A>(1.0 - lr * s.weight_decay);
  scalars.rate = static_cast<A>(lr / (1.0 - ::pow(s.beta1, count)));
  scalars.radius = static_cast<A>(s.radius);
  return scalars;
}

// The coefficient of torch.nn.utils.clip_grad_norm_; 1 where clip is infinite.
template <class A>
__device__ inline A clip_scale(A norm, double clip) {
  const A scale = static_cast<A>(clip) / (norm + A(1e-6));
  return scale > 1 ? A(1) : scale;
}

__device__ inline float fused(float a, float b, float c) {
  return ::fmaf(a, b, c);
}
__device__ inline double fused(double a, double b, double c) {
  return ::fma(a, b, c);
}
__device__ inline float root(float x) {
  return ::sqrtf(x);
}
__device__ inline double root(double x) {
  return ::sqrt(x);
}

// One element's parameter p, gradient g and moments m, v. Products are fused with sums by hand: an element gets the
// same bits wherever in a row it lies.
template <class A>
__device__ inline void adam_update(const AdamScalars<A>& s, A& p, A g, A& m, A& v) {
  g *= s.grad_scale;
  m = fused(g - m, s.beta1_rest, m);
  v = fused(v, s.beta2, s.beta2_rest * g * g);
  p = fused(-s.rate, m / fused(root(v), s.inverse_correction2, s.eps), p * s.decay);
  // comparisons that a NaN passes
  p = p < -s.radius ? -s.radius : p;
  p = p > s.radius ? s.radius : p;
}

}  // namespace fastedit::gpu
