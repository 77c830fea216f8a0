// risk on the CPU: one pass over a token's logits for its risk and the derivative by the scale, one for the gradient.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "cpu/dispatch.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/simd/risk.h"

namespace fastedit {
namespace {

using at::Tensor;

// Gradients larger than this leave the caches before anybody reads them: they are written past.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// Calls body with the kind as a template argument.
template <class Body>
void with_kind(std::string_view kind, Body&& body) {
  if (kind == "ce") return body.template operator()<RiskKind::ce>();
  if (kind == "forward_kl") return body.template operator()<RiskKind::forward_kl>();
  return body.template operator()<RiskKind::reverse_kl>();
}

// The inputs as the passes read them: rows contiguous, any stride between them.
struct Inputs {
  Tensor logits, target, segments;
  const int64_t* segment_of;
  std::vector<int64_t> tokens;  // those of a segment
  std::vector<int64_t> count;   // tokens per segment, at least 1

  Inputs(const Tensor& logits_in, const Tensor& target_in, const Tensor& segments_in, int64_t n_segments)
      : logits(rows(logits_in)),
        target(target_in.dim() == 2 ? rows(target_in) : target_in.contiguous()),
        segments(segments_in.contiguous()),
        segment_of(segments.const_data_ptr<int64_t>()),
        count(n_segments, 0) {
    const int64_t n = logits.size(0);
    const int64_t largest = n ? *std::max_element(segment_of, segment_of + n) : -1;
    FASTEDIT_CHECK(largest < n_segments, "risk", "segments are below n_segments", "max=", largest,
                   ", n_segments=", n_segments);
    for (int64_t t = 0; t < n; ++t) {
      if (segment_of[t] < 0) continue;
      tokens.push_back(t);
      ++count[segment_of[t]];
    }
    for (int64_t& c : count) c = std::max<int64_t>(c, 1);
    if (target.dim() == 1) check_labels();
  }

  static Tensor rows(const Tensor& x) { return x.stride(1) == 1 ? x : x.contiguous(); }

  void check_labels() const {
    const int64_t* labels = target.const_data_ptr<int64_t>();
    int64_t low = 0, high = 0;
    for (size_t i = 0; i < tokens.size(); ++i) {
      low = i ? std::min(low, labels[tokens[i]]) : labels[tokens[i]];
      high = i ? std::max(high, labels[tokens[i]]) : labels[tokens[i]];
    }
    FASTEDIT_CHECK(low >= 0 && high < logits.size(1), "risk", "labels lie in [0, V) where segments >= 0", "min=", low,
                   ", max=", high, ", V=", logits.size(1));
  }

  template <RiskKind kind, class T>
  const T* reference(int64_t t) const {
    return kind == RiskKind::ce ? nullptr : data<const T>(target) + t * target.stride(0);
  }

  template <RiskKind kind>
  int64_t label(int64_t t) const {
    return kind == RiskKind::ce ? target.const_data_ptr<int64_t>()[t] : 0;
  }
};

template <RiskKind kind, class T, class A>
void forward(const Inputs& in, Tensor& value, Tensor& env_grad, Tensor& stats) {
  const int64_t n = static_cast<int64_t>(in.tokens.size()), V = in.logits.size(1);
  std::vector<TokenRisk<A>> risks(n);
  A* stats_data = stats.mutable_data_ptr<A>();
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = in.tokens[i];
      risks[i] = FASTEDIT_SIMD(token_risk, (kind, T, A), data<const T>(in.logits) + t * in.logits.stride(0),
                               in.reference<kind, T>(t), in.label<kind>(t), V);
      std::memcpy(stats_data + t * kStats, &risks[i].stats, sizeof(RiskStats<A>));
    }
  });
  std::vector<double> value_sum(in.count.size(), 0), env_sum(in.count.size(), 0);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t s = in.segment_of[in.tokens[i]];
    value_sum[s] += static_cast<double>(risks[i].value);
    env_sum[s] += static_cast<double>(risks[i].env_grad);
  }
  A *value_data = value.mutable_data_ptr<A>(), *env_data = env_grad.mutable_data_ptr<A>();
  for (size_t s = 0; s < in.count.size(); ++s) {
    value_data[s] = static_cast<A>(value_sum[s] / static_cast<double>(in.count[s]));
    env_data[s] = static_cast<A>(env_sum[s] / static_cast<double>(in.count[s]));
  }
}

std::tuple<Tensor, Tensor, Tensor> risk(const Tensor& logits, const Tensor& target, const Tensor& segments,
                                        int64_t n_segments, std::string_view kind) {
  check_risk(logits, target, segments, n_segments, kind);
  // the results first: memory that is not there is told before any work
  const auto wide = logits.options().dtype(accumulation_type(logits.scalar_type()));
  Tensor value = at::empty({n_segments}, wide), env_grad = at::empty({n_segments}, wide);
  Tensor stats = at::zeros({logits.size(0), kStats}, wide);
  const Inputs in(logits, target, segments, n_segments);
  dispatch(logits.scalar_type(), "risk", [&]<class T, class A>() {
    static_assert(sizeof(RiskStats<A>) == kStats * sizeof(A));
    with_kind(kind, [&]<RiskKind k>() { forward<k, T, A>(in, value, env_grad, stats); });
  });
  return {value, env_grad, stats};
}

template <RiskKind kind, class T, class A>
void backward(const Inputs& in, const Tensor& on_value, const Tensor& on_env, const Tensor& stats, Tensor& grad) {
  const int64_t n = static_cast<int64_t>(in.tokens.size()), V = in.logits.size(1);
  const A *value_data = on_value.const_data_ptr<A>(), *env_data = on_env.const_data_ptr<A>();
  const A* stats_data = stats.const_data_ptr<A>();
  T* out = data<T>(grad);
  const bool stream = grad.numel() * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = in.tokens[i], s = in.segment_of[t];
      RiskStats<A> own;
      std::memcpy(&own, stats_data + t * kStats, sizeof(own));
      const A share = static_cast<A>(in.count[s]);
      FASTEDIT_SIMD(token_gradient, (kind, T, A), data<const T>(in.logits) + t * in.logits.stride(0),
                    in.reference<kind, T>(t), in.label<kind>(t), V, own, value_data[s] / share, env_data[s] / share,
                    out + t * V, stream);
    }
  });
  const int64_t all = in.logits.size(0);
  at::parallel_for(0, n == all ? 0 : all, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (in.segment_of[t] < 0) std::memset(static_cast<void*>(out + t * V), 0, V * sizeof(T));
    }
  });
}

Tensor risk_backward(const Tensor& grad_value, const Tensor& grad_env, const Tensor& logits, const Tensor& target,
                     const Tensor& segments, const Tensor& stats, std::string_view kind) {
  check_risk(logits, target, segments, segments_of(grad_value), kind);
  check_risk_upstream("risk", grad_value, grad_env, stats, logits);
  const Inputs in(logits, target, segments, grad_value.size(0));
  Tensor grad = recycled(logits.sizes(), logits.options());
  dispatch(logits.scalar_type(), "risk", [&]<class T, class A>() {
    with_kind(kind, [&]<RiskKind k>() {
      backward<k, T, A>(in, grad_value.contiguous(), grad_env.contiguous(), stats.contiguous(), grad);
    });
  });
  return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastedit, CPU, m) {
  if (best_isa() == Isa::none) return;
  m.impl("risk", risk);
  m.impl("risk_backward", risk_backward);
}

}  // namespace fastedit
