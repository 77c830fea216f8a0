// The two passes of adam_step_ over one piece of one edit's row.
#pragma once

#include <cstdint>

namespace fastedit {

// What a row's step needs besides its tensors, in the precision of its moments.
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

#define FASTEDIT_DECLARE_ADAM_STEP(isa)                                                               \
  namespace isa {                                                                                     \
  template <class G, class A>                                                                         \
  A square_sum(const G* grad, int64_t n);                                                             \
  template <class T, class G, class A>                                                                \
  void adam_update(T* param, const G* grad, A* first, A* second, int64_t n, const AdamScalars<A>& s); \
  }

FASTEDIT_DECLARE_ADAM_STEP(avx2)
FASTEDIT_DECLARE_ADAM_STEP(avx512)
#undef FASTEDIT_DECLARE_ADAM_STEP

}  // namespace fastedit
