// linear_risk on the CPU: chunks of logits by a matrix product, then risk's passes over each row of a chunk. A chunk's
// risks are those of its own softmax; the risk over all chunks follows from them exactly:
//   p = sum_c pi_c p_c with pi = softmax of the chunks' log-sum-exps, and so E_p = sum_c pi_c E_c,
//   KL(p || q) = sum_c pi_c KL(p_c || q_c) + KL(pi || rho),   Cov_p = sum_c pi_c Cov_c + Cov_pi(E_c, E_c).
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/dispatch.h"
#include "cpu/isa.h"
#include "cpu/products.h"
#include "cpu/simd/risk.h"

namespace fastedit {
namespace {

using at::Tensor;
using Maybe = MaybeTensor;

constexpr int64_t kTokens = 1024;      // tokens of a chunk at most
constexpr int64_t kColumns = 2048;     // logits of a token in a chunk at most: a chunk stays in the caches
constexpr int64_t kFewest = 128;       // and at least
constexpr int64_t kSpare = 16;         // columns after a chunk's: the first takes what risk writes at a label elsewhere
constexpr int64_t kRoom = 16LL << 20;  // a smaller budget has no room for the library's own buffers
constexpr double kFar = 60;            // drifts apart by more are compared by their log-sum-exps

template <class Body>
void with_kind(std::string_view kind, Body&& body) {
  if (kind == "ce") return body.template operator()<RiskKind::ce>();
  if (kind == "forward_kl") return body.template operator()<RiskKind::forward_kl>();
  return body.template operator()<RiskKind::reverse_kl>();
}

// The tokens that a segment has, and how many each segment has.
struct Tokens {
  Tensor segments, kept;  // kept: their places
  const int64_t* segment_of;
  std::vector<int64_t> places, count;

  Tokens(const Tensor& segments_in, int64_t n_segments) : segments(segments_in.contiguous()), count(n_segments, 0) {
    segment_of = segments.const_data_ptr<int64_t>();
    const int64_t n = segments.numel();
    const int64_t largest = n ? *std::max_element(segment_of, segment_of + n) : -1;
    FASTEDIT_CHECK(largest < n_segments, "linear_risk", "segments are below n_segments", "max=", largest,
                   ", n_segments=", n_segments);
    for (int64_t t = 0; t < n; ++t) {
      if (segment_of[t] < 0) continue;
      places.push_back(t);
      ++count[segment_of[t]];
    }
    for (int64_t& c : count) c = std::max<int64_t>(c, 1);
    kept = at::tensor(places, segments.options());
  }

  int64_t size() const { return static_cast<int64_t>(places.size()); }

  Tensor of(const Tensor& x) const { return size() == x.size(0) ? x : x.index_select(0, kept); }
};

// A head's logits, a chunk at a time; or logits that exist, copied chunk by chunk.
struct Source {
  Tensor rows, weight, bias;  // rows: hidden states of the kept tokens, or their logits where there is no weight
  at::ScalarType wide;
  bool fast = false;  // products by the faster library
  Tensor widened;     // of 16-bit weights

  Source(const Tensor& rows_in, const Maybe& weight_in, const Maybe& bias_in, at::ScalarType dtype)
      : rows(rows_in), wide(dtype) {
    if (weight_in) weight = *weight_in;
    if (bias_in) bias = bias_in->to(wide);
    if (weight.defined()) rows = rows.to(wide);
  }

  // Numbers of the widened weight a column takes.
  int64_t per_column() const { return weight.defined() && weight.scalar_type() != wide ? weight.size(1) : 0; }

  Tensor head(int64_t first, int64_t columns) {
    const Tensor part = weight.narrow(0, first, columns);
    if (part.scalar_type() == wide) return part;
    if (!widened.defined()) widened = at::empty({columns, weight.size(1)}, weight.options().dtype(wide));
    return widened.narrow(0, 0, columns).copy_(part);
  }

  // Logits of some tokens and columns into out.
  void fill(int64_t token, int64_t tokens, int64_t first, int64_t columns, Tensor out, Tensor* head_out = nullptr) {
    const Tensor own = rows.narrow(0, token, tokens);
    if (!weight.defined()) {
      out.copy_(own.narrow(1, first, columns));
      return;
    }
    const Tensor part = head(first, columns);
    if (head_out) *head_out = part;
    if (fast) {
      out.copy_(product(own, part, bias.defined() ? Maybe(bias) : std::nullopt));
    } else if (bias.defined()) {
      at::addmm_out(out, bias.narrow(0, first, columns), own, part.t());
    } else {
      at::mm_out(out, own, part.t());
    }
  }
};

// What one call works with: chunk buffers of (tokens, columns + kSpare).
struct Work {
  Source z;
  std::optional<Source> r;
  int64_t tokens, columns, vocabulary;
  bool fast;
  Tensor z_chunk, r_chunk;

  Work(const Tokens& kept, const Tensor& hidden, const Tensor& weight, const Maybe& bias, const Tensor& target,
       const Maybe& target_weight, const Maybe& target_bias, at::ScalarType wide, int64_t budget)
      : z(kept.of(hidden), weight, bias, wide), vocabulary(weight.size(0)) {
    if (target.dim() == 2) r.emplace(kept.of(target), target_weight, target_bias, wide);
    const int64_t numbers = budget / (wide == at::kDouble ? 8 : 4);
    // a fast product is made beside its chunk, of a copy without gaps, and may lay the weight out anew
    fast = budget >= kRoom && has_fast_product(wide, kept.size());
    const int64_t planes = (r ? 2 : 1) + (fast ? 2 : 0);
    const int64_t per_column = z.per_column() + (r ? r->per_column() : 0) + (fast ? weight.size(1) : 0);
    tokens = std::clamp<int64_t>(numbers / (kFewest * planes) - per_column / planes, 1, kTokens);
    tokens = std::min(tokens, std::max<int64_t>(kept.size(), 1));
    columns = std::clamp<int64_t>(numbers / (tokens * planes + per_column) - kSpare, kFewest, kColumns);
    columns = std::min(columns, vocabulary);
    z.fast = fast;
    if (r) r->fast = fast;
    const auto options = hidden.options().dtype(wide);
    z_chunk = at::empty({tokens, columns + kSpare}, options);
    if (r) r_chunk = at::empty({tokens, columns + kSpare}, options);
    // the spare columns are read by partial vectors and at a label that lies elsewhere
    z_chunk.narrow(1, columns, kSpare).zero_();
  }

  // Calls body(first token, tokens, first column, columns) with the chunks filled, columns innermost.
  template <class Body>
  void each(Tensor* head, Body&& body) {
    for (int64_t t = 0; t < z.rows.size(0); t += tokens) {
      const int64_t rows = std::min(tokens, z.rows.size(0) - t);
      for (int64_t k = 0; k < vocabulary; k += columns) {
        const int64_t own = std::min(columns, vocabulary - k);
        z.fill(t, rows, k, own, z_chunk.narrow(0, 0, rows).narrow(1, 0, own), head);
        if (r) r->fill(t, rows, k, own, r_chunk.narrow(0, 0, rows).narrow(1, 0, own));
        body(t, rows, k, own);
      }
    }
  }
};

// One chunk's part of a token's risk.
struct Part {
  double lse, mean, drift, value, env_grad, drift_mean, lse_r;
};

// Logits below are -inf lifted to a finite floor: differences from them have no digits left.
constexpr double kClosed = -1e14;

template <class A>
double log_sum_exp(const A* r, int64_t n) {
  const double top = *std::max_element(r, r + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(r[i] - top);
  return top > kClosed ? top + std::log(sum) : kClosed;
}

// Accumulates the chunks of one token. Scalars in double: there are few chunks.
template <RiskKind kind, class A>
struct Token {
  std::vector<Part> parts;
  double label_logit = 0;

  void add(const TokenRisk<A>& risk, const A* r, int64_t columns) {
    const RiskStats<A>& s = risk.stats;
    Part part{s.max + std::log(static_cast<double>(s.sum)), s.mean, 0, risk.value, risk.env_grad, 0, 0};
    if constexpr (kind == RiskKind::reverse_kl) {
      // KL(p_c || q_c) = E_c[z - r] - lse_z + lse_r
      part.drift_mean = s.fourth;
      part.drift = part.drift_mean - part.value;
      part.lse_r = part.lse > kClosed ? part.lse - part.drift : log_sum_exp(r, columns);
    }
    if constexpr (kind == RiskKind::forward_kl) {
      part.lse_r = s.fourth + std::log(static_cast<double>(s.fifth));
      part.drift = part.lse - part.lse_r;
    }
    parts.push_back(part);
  }

  struct Result {
    double value, env_grad;
    RiskStats<A> stats;
  };

  Result finish() const {
    double top = parts[0].lse, top_r = parts[0].lse_r, sum = 0, sum_r = 0, mean = 0;
    for (const Part& c : parts) {
      top = std::max(top, c.lse);
      top_r = std::max(top_r, c.lse_r);
    }
    for (const Part& c : parts) {
      sum += std::exp(c.lse - top);
      sum_r += std::exp(c.lse_r - top_r);
    }
    for (const Part& c : parts) mean += std::exp(c.lse - top) / sum * c.mean;
    Result out{};
    // p = e^(z - max) / sum holds for any max near the largest logit
    out.stats = {static_cast<A>(top), 1, static_cast<A>(mean), 0, 0};
    out.stats.sum = static_cast<A>(sum * std::exp(top - static_cast<double>(out.stats.max)));
    if constexpr (kind == RiskKind::ce) {
      out.value = top - label_logit + std::log(sum);
      out.env_grad = mean - label_logit;
      return out;
    }
    double within = 0, env = 0, drift = 0, between = 0, drift_mean = 0;
    // pi of the chunks for reverse_kl, rho for forward_kl, and the mean under it of the chunks' drift
    const auto weight = [&](const Part& c) {
      return kind == RiskKind::reverse_kl ? std::exp(c.lse - top) / sum : std::exp(c.lse_r - top_r) / sum_r;
    };
    for (const Part& c : parts) {
      within += weight(c) * c.value;
      env += weight(c) * c.env_grad;
      drift += weight(c) * c.drift;
      drift_mean += weight(c) * c.drift_mean;
    }
    // KL of the two distributions over chunks, about the mean drift
    const double sign = kind == RiskKind::reverse_kl ? -1 : 1;
    double farthest = 0;
    for (const Part& c : parts) {
      between += weight(c) * std::expm1(std::min(kFar, sign * (c.drift - drift)));
      // a chunk that only the other distribution has any of counts too
      const double other = kind == RiskKind::reverse_kl ? c.lse_r - top_r : c.lse - top;
      if (weight(c) > 0 || other > std::log(1e-300)) farthest = std::max(farthest, sign * (c.drift - drift));
    }
    const double lead = top + std::log(sum) - top_r - std::log(sum_r);
    out.value = within + (farthest > kFar ? sign * (lead - drift) : std::log1p(between));
    for (const Part& c : parts) {
      if constexpr (kind == RiskKind::reverse_kl) {
        env += weight(c) * (c.mean - mean) * (c.drift_mean - drift_mean);
      } else {
        env += (std::exp(c.lse - top) / sum - weight(c)) * (c.mean - mean);
      }
    }
    out.env_grad = env;
    if constexpr (kind == RiskKind::reverse_kl) {
      out.stats.fourth = static_cast<A>(drift_mean);
      out.stats.fifth = static_cast<A>(env);
    } else {
      out.stats.fourth = static_cast<A>(top_r);
      out.stats.fifth = static_cast<A>(sum_r * std::exp(top_r - static_cast<double>(out.stats.fourth)));
    }
    return out;
  }
};

const int64_t* checked_labels(const Tokens& kept, const Tensor& target, int64_t vocabulary) {
  if (target.dim() == 2) return nullptr;
  const int64_t* labels = target.const_data_ptr<int64_t>();
  int64_t low = 0, high = 0;
  for (int64_t i = 0; i < kept.size(); ++i) {
    low = i ? std::min(low, labels[kept.places[i]]) : labels[kept.places[i]];
    high = i ? std::max(high, labels[kept.places[i]]) : labels[kept.places[i]];
  }
  FASTEDIT_CHECK(low >= 0 && high < vocabulary, "linear_risk", "labels lie in [0, V) where segments >= 0", "min=", low,
                 ", max=", high, ", V=", vocabulary);
  return labels;
}

template <RiskKind kind, class A>
void forward(Work& work, const Tokens& kept, const int64_t* labels, Tensor& value, Tensor& env_grad, Tensor& stats) {
  std::vector<Token<kind, A>> tokens(kept.size());
  const A *z = data<const A>(work.z_chunk), *r = kind == RiskKind::ce ? nullptr : data<const A>(work.r_chunk);
  const int64_t stride = work.columns + kSpare;
  work.each(nullptr, [&](int64_t first, int64_t rows, int64_t column, int64_t columns) {
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Token<kind, A>& token = tokens[first + i];
        const A* own = z + i * stride;
        const A* other = r ? r + i * stride : nullptr;
        token.add(FASTEDIT_SIMD(token_risk, (kind, A, A), own, other, int64_t{0}, columns), other, columns);
        if (!labels) continue;
        const int64_t label = labels[kept.places[first + i]] - column;
        if (label >= 0 && label < columns) token.label_logit = own[label];
      }
    });
  });
  std::vector<double> value_sum(kept.count.size(), 0), env_sum(kept.count.size(), 0);
  A* stats_data = data<A>(stats);
  for (int64_t i = 0; i < kept.size(); ++i) {
    const auto result = tokens[i].finish();
    std::memcpy(stats_data + kept.places[i] * kStats, &result.stats, sizeof(result.stats));
    value_sum[kept.segment_of[kept.places[i]]] += result.value;
    env_sum[kept.segment_of[kept.places[i]]] += result.env_grad;
  }
  for (size_t s = 0; s < kept.count.size(); ++s) {
    data<A>(value)[s] = static_cast<A>(value_sum[s] / static_cast<double>(kept.count[s]));
    data<A>(env_grad)[s] = static_cast<A>(env_sum[s] / static_cast<double>(kept.count[s]));
  }
}

std::tuple<Tensor, Tensor, Tensor> linear_risk(const Tensor& hidden, const Tensor& weight, const Maybe& bias,
                                               const Tensor& target_in, const Maybe& target_weight,
                                               const Maybe& target_bias, const Tensor& segments, int64_t n_segments,
                                               std::string_view kind, int64_t budget) {
  check_linear_risk(hidden, weight, bias, target_in, target_weight, target_bias, segments, n_segments, kind, budget);
  // the results first: memory that is not there is told before any work
  const auto options = hidden.options().dtype(accumulation_type(hidden.scalar_type()));
  Tensor value = at::empty({n_segments}, options), env_grad = at::empty({n_segments}, options);
  Tensor stats = at::zeros({hidden.size(0), kStats}, options);
  const Tokens kept(segments, n_segments);
  const Tensor target = target_in.dim() == 1 ? target_in.contiguous() : target_in;
  const int64_t* labels = checked_labels(kept, target, weight.size(0));
  dispatch(hidden.scalar_type(), "linear_risk", [&]<class T, class A>() {
    static_assert(sizeof(RiskStats<A>) == kStats * sizeof(A));
    const auto wide = c10::CppTypeToScalarType<A>::value;
    Work work(kept, hidden, weight, bias, target, target_weight, target_bias, wide, budget);
    with_kind(kind, [&]<RiskKind k>() { forward<k, A>(work, kept, labels, value, env_grad, stats); });
  });
  return {value, env_grad, stats};
}

struct Gradients {
  Tensor hidden, weight, bias;
};

template <RiskKind kind, class A>
void backward(Work& work, const Tokens& kept, const int64_t* labels, const Tensor& on_value, const Tensor& on_env,
              const Tensor& stats, Gradients& out) {
  A* z = data<A>(work.z_chunk);
  const A* r = kind == RiskKind::ce ? nullptr : data<const A>(work.r_chunk);
  const A *value_data = data<const A>(on_value), *env_data = data<const A>(on_env), *stats_data = data<const A>(stats);
  const int64_t stride = work.columns + kSpare;
  Tensor head;
  work.each(&head, [&](int64_t first, int64_t rows, int64_t column, int64_t columns) {
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t place = kept.places[first + i], s = kept.segment_of[place];
        RiskStats<A> own;
        std::memcpy(&own, stats_data + place * kStats, sizeof(own));
        const A share = static_cast<A>(kept.count[s]), value = value_data[s] / share, env = env_data[s] / share;
        A* row = z + i * stride;
        // in place: the label's term goes to the spare column and, where the label is here, to it by hand
        FASTEDIT_SIMD(token_gradient, (kind, A, A), row, r ? r + i * stride : nullptr, work.columns, columns, own,
                      value, env, row, false);
        if (!labels) continue;
        row[work.columns] = 0;
        const int64_t label = labels[place] - column;
        if (label >= 0 && label < columns) row[label] -= value + env;
      }
    });
    const Tensor grad = work.z_chunk.narrow(0, 0, rows).narrow(1, 0, columns);
    if (out.hidden.defined()) {
      Tensor own = out.hidden.narrow(0, first, rows);
      if (work.fast) {
        own.add_(product(grad, head.t(), std::nullopt));
      } else {
        own.addmm_(grad, head);
      }
    }
    if (out.weight.defined()) {
      out.weight.narrow(0, column, columns).addmm_(grad.t(), work.z.rows.narrow(0, first, rows));
    }
    if (out.bias.defined()) out.bias.narrow(0, column, columns).add_(grad.sum(0));
  });
}

std::tuple<Tensor, Tensor, Tensor> linear_risk_backward(const Tensor& grad_value, const Tensor& grad_env,
                                                        const Tensor& hidden, const Tensor& weight, const Maybe& bias,
                                                        const Tensor& target_in, const Maybe& target_weight,
                                                        const Maybe& target_bias, const Tensor& segments,
                                                        const Tensor& stats, std::string_view kind, int64_t budget,
                                                        std::array<bool, 3> needs) {
  check_linear_risk(hidden, weight, bias, target_in, target_weight, target_bias, segments, segments_of(grad_value),
                    kind, budget);
  check_risk_upstream("linear_risk", grad_value, grad_env, stats, hidden);
  const Tokens kept(segments, grad_value.size(0));
  const Tensor target = target_in.dim() == 1 ? target_in.contiguous() : target_in;
  const int64_t* labels = checked_labels(kept, target, weight.size(0));
  Gradients out;
  dispatch(hidden.scalar_type(), "linear_risk", [&]<class T, class A>() {
    const auto wide = c10::CppTypeToScalarType<A>::value;
    const auto options = hidden.options().dtype(wide);
    if (needs[0]) out.hidden = at::zeros({kept.size(), hidden.size(1)}, options);
    if (needs[1]) out.weight = at::zeros({weight.size(0), weight.size(1)}, options);
    if (needs[2]) out.bias = at::zeros({weight.size(0)}, options);
    Work work(kept, hidden, weight, bias, target, target_weight, target_bias, wide, budget);
    with_kind(kind, [&]<RiskKind k>() {
      backward<k, A>(work, kept, labels, grad_value.contiguous(), grad_env.contiguous(), stats.contiguous(), out);
    });
  });
  if (needs[0] && kept.size() < hidden.size(0)) {
    out.hidden =
        at::zeros({hidden.size(0), hidden.size(1)}, out.hidden.options()).index_copy_(0, kept.kept, out.hidden);
  }
  const auto given = [&](const Tensor& t) {
    return t.defined() ? t.to(hidden.scalar_type()) : at::empty({0}, hidden.options());
  };
  return {given(out.hidden), given(out.weight), given(out.bias)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastedit, CPU, m) {
  if (best_isa() == Isa::none) return;
  m.impl("linear_risk", linear_risk);
  m.impl("linear_risk_backward", linear_risk_backward);
}

}  // namespace fastedit
