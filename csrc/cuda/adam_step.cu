// adam_step_ on NVIDIA: bound by memory, every tensor is read and written once; gradients twice. Scalars are computed
// on the device, nothing waits for it.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <limits>
#include <optional>
#include <type_traits>

#include "arguments.h"
#include "cuda/adam_step_kernels.h"
#include "cuda/launch.h"
// registration is no matter of the device's passes of the compiler, which would read all of torch for it
#ifndef __CUDA_ARCH__
#include <torch/library.h>
#endif

namespace fastedit::gpu {
namespace {

using at::Tensor;

template <class T, class G, class A>
void run(Tensor& params, const Tensor& grads, Tensor& first, Tensor& second, Tensor& step, const Tensor& lr,
         const Tensor& active, const AdamSettings& settings, Tensor& norm) {
  AdamRows<T, G, A> in{};
  in.rows = params.size(0);
  in.size = params.size(1);
  in.pieces = (in.size + kPiece - 1) / kPiece;
  constexpr int64_t numbers = sizeof(AdamScalars<A>) / sizeof(A);
  const Tensor scalars = at::empty({in.rows, numbers}, norm.options());
  const Tensor squares = at::empty({in.rows, in.pieces}, norm.options().dtype(at::kDouble));
  in.params = data<T>(params);
  in.grads = data<const G>(grads);
  in.first = data<A>(first);
  in.second = data<A>(second);
  in.params_row = params.stride(0);
  in.grads_row = grads.stride(0);
  in.first_row = first.stride(0);
  in.second_row = second.stride(0);
  in.step = data<int64_t>(step);
  in.lr = data<const double>(lr);
  in.active = data<const bool>(active);
  in.step_row = step.stride(0);
  in.lr_row = lr.stride(0);
  in.active_row = active.stride(0);
  in.norm = data<A>(norm);
  in.scalars = reinterpret_cast<AdamScalars<A>*>(data<A>(scalars));
  in.squares = data<double>(squares);
  run_adam_step(in, settings, current_stream());
}

[[maybe_unused]] Tensor adam_step_(Tensor& params, const Tensor& grads, Tensor& exp_avg, Tensor& exp_avg_sq,
                                   Tensor& step, const Tensor& lr, const Tensor& active, double beta1, double beta2,
                                   double eps, double weight_decay, std::optional<double> clip,
                                   std::optional<double> radius) {
  check_adam_step(params, grads, exp_avg, exp_avg_sq, step, lr, active, beta1, beta2, eps, weight_decay, clip, radius);
  const c10::cuda::CUDAGuard guard(params.device());
  constexpr double none = std::numeric_limits<double>::infinity();
  const AdamSettings settings{beta1, beta2, eps, weight_decay, clip.value_or(none), radius.value_or(none)};
  Tensor norm = at::empty({params.size(0)}, exp_avg.options());
  dispatch(params.scalar_type(), "adam_step_", [&]<class T, class A>() {
    const bool same = grads.scalar_type() == params.scalar_type();
    const auto go = [&]<class G>() {
      run<T, G, A>(params, grads, exp_avg, exp_avg_sq, step, lr, active, settings, norm);
    };
    if constexpr (std::is_same_v<T, A>) {
      go.template operator()<T>();
    } else if (same) {
      go.template operator()<T>();
    } else {
      go.template operator()<A>();
    }
  });
  return norm;
}

}  // namespace
}  // namespace fastedit::gpu

#ifndef __CUDA_ARCH__
TORCH_LIBRARY_IMPL(fastedit, CUDA, m) {
  m.impl("adam_step_", fastedit::gpu::adam_step_);
}
#endif
