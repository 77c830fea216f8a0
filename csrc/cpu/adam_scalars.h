// What a row's AdamW step needs besides its tensors, from the settings of the op.
#pragma once

#include <cmath>
#include <limits>
#include <optional>

#include "cpu/simd/adam_step.h"

namespace fastedit {

struct AdamSettings {
  double beta1, beta2, eps, weight_decay;
  std::optional<double> clip, radius;
};

// Step number `count` of a row, counted from 1. The clip's coefficient is that of torch.nn.utils.clip_grad_norm_.
template <class A>
AdamScalars<A> adam_scalars(const AdamSettings& s, double lr, double count, A norm) {
  AdamScalars<A> scalars;
  scalars.grad_scale = 1;
  if (s.clip) {
    const A scale = static_cast<A>(*s.clip) / (norm + static_cast<A>(1e-6));
    scalars.grad_scale = scale > 1 ? 1 : scale;
  }
  scalars.beta1_rest = static_cast<A>(1.0 - s.beta1);
  scalars.beta2 = static_cast<A>(s.beta2);
  scalars.beta2_rest = static_cast<A>(1.0 - s.beta2);
  scalars.inverse_correction2 = static_cast<A>(1.0 / std::sqrt(1.0 - std::pow(s.beta2, count)));
  scalars.eps = static_cast<A>(s.eps);
  scalars.decay = static_cast<A>(1.0 - lr * s.weight_decay);
  // before the first step both corrections are 0 or roots of negative numbers: nothing that is a number comes of them
  scalars.rate =
      count < 1 ? std::numeric_limits<A>::quiet_NaN() : static_cast<A>(lr / (1.0 - std::pow(s.beta1, count)));
  scalars.radius = static_cast<A>(s.radius.value_or(std::numeric_limits<double>::infinity()));
  return scalars;
}

}  // namespace fastedit
