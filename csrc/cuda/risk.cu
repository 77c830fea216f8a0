// risk on NVIDIA: bound by memory, so logits are read once forward and once backward, and the gradient is written once.
// Nothing waits for the device.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <string>
#include <string_view>
#include <tuple>

#include "arguments.h"
#include "cuda/launch.h"
#include "cuda/risk_kernels.h"
// registration is no matter of the device's passes of the compiler, which would read all of torch for it
#ifndef __CUDA_ARCH__
#include <torch/library.h>
#endif

namespace fastedit::gpu {
namespace {

using at::Tensor;

// Fewest logits of a block's part of a row.
constexpr int64_t kForwardPart = 4096, kBackwardPart = 8192;

// Calls body with the kind as a template argument.
template <class Body>
void with_kind(std::string_view kind, Body&& body) {
  if (kind == "ce") return body.template operator()<RiskKind::ce>();
  if (kind == "forward_kl") return body.template operator()<RiskKind::forward_kl>();
  return body.template operator()<RiskKind::reverse_kl>();
}

// segments and labels are contiguous; the rest may have any strides.
template <class T>
RiskInput<T> input(const Tensor& logits, const Tensor& target, const Tensor& segments, int64_t n_segments,
                   int64_t fewest) {
  RiskInput<T> in{};
  in.z = data<const T>(logits);
  in.z_row = logits.stride(0);
  in.z_column = logits.stride(1);
  if (target.dim() == 2) {
    in.r = data<const T>(target);
    in.r_row = target.stride(0);
    in.r_column = target.stride(1);
  } else {
    in.labels = target.const_data_ptr<int64_t>();
  }
  in.segments = segments.const_data_ptr<int64_t>();
  in.tokens = logits.size(0);
  in.vocabulary = logits.size(1);
  in.n_segments = n_segments;
  in.parts = risk_parts(in.tokens, in.vocabulary, multiprocessors(logits), fewest);
  return in;
}

[[maybe_unused]] std::tuple<Tensor, Tensor, Tensor> risk(const Tensor& logits, const Tensor& target_in,
                                                         const Tensor& segments_in, int64_t n_segments,
                                                         std::string_view kind) {
  check_risk(logits, target_in, segments_in, n_segments, kind);
  const c10::cuda::CUDAGuard guard(logits.device());
  const Tensor segments = segments_in.contiguous(), target = target_in.dim() == 1 ? target_in.contiguous() : target_in;
  Tensor value, env_grad, stats;
  dispatch(logits.scalar_type(), "risk", [&]<class T, class A>() {
    static_assert(sizeof(RiskStats<A>) == 5 * sizeof(A) && sizeof(TokenRisk<A>) == 2 * sizeof(A));
    const auto options = logits.options().dtype(c10::CppTypeToScalarType<A>::value);
    const RiskInput<T> in = input<T>(logits, target, segments, n_segments, kForwardPart);
    value = at::empty({n_segments}, options);
    env_grad = at::empty({n_segments}, options);
    stats = at::empty({in.tokens, 5}, options);
    const Tensor of_token = at::empty({in.tokens, 2}, options);
    const Tensor parts = at::empty({in.parts > 1 ? in.tokens * in.parts * kRecord : 0}, options.dtype(at::kDouble));
    const Tensor ranges = at::zeros({n_segments, 2}, options.dtype(at::kInt));
    const RiskOutput<A> out{data<A>(value),
                            data<A>(env_grad),
                            reinterpret_cast<RiskStats<A>*>(data<A>(stats)),
                            reinterpret_cast<TokenRisk<A>*>(data<A>(of_token)),
                            data<double>(parts),
                            data<int>(ranges)};
    with_kind(kind, [&]<RiskKind k>() { run_risk<k>(in, out, current_stream()); });
  });
  return {value, env_grad, stats};
}

[[maybe_unused]] Tensor risk_backward(const Tensor& grad_value_in, const Tensor& grad_env_in, const Tensor& logits,
                                      const Tensor& target_in, const Tensor& segments_in, const Tensor& stats_in,
                                      std::string_view kind) {
  check_risk(logits, target_in, segments_in, segments_of(grad_value_in), kind);
  check_risk_upstream("risk", grad_value_in, grad_env_in, stats_in, logits);
  const c10::cuda::CUDAGuard guard(logits.device());
  const Tensor segments = segments_in.contiguous(), target = target_in.dim() == 1 ? target_in.contiguous() : target_in;
  const Tensor grad_value = grad_value_in.contiguous(), grad_env = grad_env_in.contiguous();
  const Tensor stats = stats_in.contiguous();
  const int64_t n_segments = grad_value.size(0);
  Tensor grad = at::empty(logits.sizes(), logits.options());
  dispatch(logits.scalar_type(), "risk", [&]<class T, class A>() {
    const RiskInput<T> in = input<T>(logits, target, segments, n_segments, kBackwardPart);
    const Tensor counts = at::zeros({n_segments}, stats.options().dtype(at::kInt));
    const RiskUpstream<T, A> up{data<const A>(grad_value), data<const A>(grad_env),
                                reinterpret_cast<const RiskStats<A>*>(data<const A>(stats)), data<int>(counts),
                                data<T>(grad)};
    with_kind(kind, [&]<RiskKind k>() { run_risk_backward<k>(in, up, current_stream()); });
  });
  return grad;
}

}  // namespace
}  // namespace fastedit::gpu

#ifndef __CUDA_ARCH__
TORCH_LIBRARY_IMPL(fastedit, CUDA, m) {
  m.impl("risk", fastedit::gpu::risk);
  m.impl("risk_backward", fastedit::gpu::risk_backward);
}
#endif
