// What the ops ask of their arguments on every device: shapes, dtypes, devices, strides and scalars, which need no look
// at a tensor's values. fastedit/reference/arguments.py says the same in the same words. Offsets, segments and labels
// are looked at by the kernels of the CPU; a GPU would have to be waited for.
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "check.h"

namespace fastedit {

using MaybeTensor = std::optional<at::Tensor>;

constexpr int64_t kStats = 5;        // columns of a token's stats
constexpr int64_t kMostRanked = 64;  // most tokens or keys that are ranked

// Tensors that may be absent, with their names.
using Named = std::initializer_list<std::pair<const char*, const at::Tensor*>>;

inline const at::Tensor* given(const MaybeTensor& tensor) {
  return tensor ? &*tensor : nullptr;
}

// "name=value, ..." of those that are there.
template <class Show>
std::string listed(const Named& tensors, const Show& show) {
  std::string text;
  for (const auto& [name, tensor] : tensors) {
    if (tensor) text += (text.empty() ? "" : ", ") + std::string(name) + "=" + show(*tensor);
  }
  return text;
}
inline std::string shapes(const Named& tensors) {
  return listed(tensors, [](const at::Tensor& t) { return shown(t.sizes()); });
}
inline std::string dtypes(const Named& tensors) {
  return listed(tensors, [](const at::Tensor& t) { return shown(t.scalar_type()); });
}
inline std::string devices(const Named& tensors) {
  return listed(tensors, [](const at::Tensor& t) { return t.device().str(); });
}
inline std::string dtype_and(const at::Tensor& tensor, const std::string& more) {
  return shown(tensor.scalar_type()) + " " + more;
}

inline bool one_dtype(const Named& tensors) {
  for (const auto& [name, tensor] : tensors) {
    if (tensor && tensor->scalar_type() != tensors.begin()->second->scalar_type()) return false;
  }
  return true;
}
inline bool one_device(const Named& tensors) {
  for (const auto& [name, tensor] : tensors) {
    if (tensor && tensor->device() != tensors.begin()->second->device()) return false;
  }
  return true;
}

inline void check_kind(std::string_view kind, const char* op) {
  FASTEDIT_CHECK(kind == "ce" || kind == "forward_kl" || kind == "reverse_kl", op,
                 "kind is one of ce, forward_kl, reverse_kl", "kind=", kind);
}

inline void check_risk(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& segments,
                       int64_t n_segments, std::string_view kind) {
  constexpr const char* op = "risk";
  check_kind(kind, op);
  FASTEDIT_CHECK(logits.dim() == 2 && logits.size(1) > 0, op, "logits are (T, V) with V > 0",
                 "logits=", shown(logits.sizes()));
  check_floating(logits, op, "logits");
  FASTEDIT_CHECK(n_segments >= 0, op, "n_segments is not negative", "n_segments=", n_segments);
  check_index(segments, op, "segments", logits.size(0), logits.device());
  if (kind == "ce") return check_index(target, op, "target", logits.size(0), logits.device());
  FASTEDIT_CHECK(target.sizes() == logits.sizes() && target.scalar_type() == logits.scalar_type(), op,
                 "target of " + std::string(kind) + " has the shape and dtype of logits",
                 "target=", dtype_and(target, shown(target.sizes())),
                 ", logits=", dtype_and(logits, shown(logits.sizes())));
  FASTEDIT_CHECK(target.device() == logits.device(), op, "target is on the device of logits",
                 "target=", target.device(), ", logits=", logits.device());
}

// What the backward of risk gets beside the arguments of the forward; first the number of segments.
inline int64_t segments_of(const at::Tensor& grad_value) {
  return grad_value.dim() == 1 ? grad_value.size(0) : 0;
}
inline void check_risk_upstream(const char* op, const at::Tensor& grad_value, const at::Tensor& grad_env,
                                const at::Tensor& stats, const at::Tensor& features) {
  const at::ScalarType wide = accumulation_type(features.scalar_type());
  FASTEDIT_CHECK(grad_value.dim() == 1, op, "grad_value is (S,)", "grad_value=", shown(grad_value.sizes()));
  check_tensor(grad_value, op, "grad_value", wide, grad_value.sizes(), features.device());
  check_tensor(grad_env, op, "grad_env", wide, grad_value.sizes(), features.device());
  check_tensor(stats, op, "stats", wide, {features.size(0), kStats}, features.device());
}

inline void check_low_rank(const at::Tensor& x, const at::Tensor& down, const at::Tensor& up,
                           const at::Tensor& offsets) {
  constexpr const char* op = "low_rank";
  const Named all = {{"x", &x}, {"down", &down}, {"up", &up}};
  const bool fits = x.dim() == 2 && down.dim() == 3 && up.dim() == 3 && down.size(0) == up.size(0) &&
                    down.size(1) == x.size(1) && down.size(2) == up.size(1);
  FASTEDIT_CHECK(fits, op, "x is (T, d), down is (B, d, r), up is (B, r, o)", shapes(all));
  check_floating(x, op, "x");
  const at::ScalarType own = x.scalar_type(), dtype = down.scalar_type();
  FASTEDIT_CHECK(up.scalar_type() == dtype && (dtype == own || dtype == accumulation_type(own)), op,
                 "down and up have the dtype of x or are float32", dtypes(all));
  FASTEDIT_CHECK(one_device(all), op, "x, down and up are on one device", devices(all));
  check_index(offsets, op, "offsets", down.size(0) + 1, x.device());
}

inline void check_key_value(const at::Tensor& x, const at::Tensor& keys, const MaybeTensor& bias,
                            const at::Tensor& values, const at::Tensor& offsets, std::string_view activation,
                            const MaybeTensor& gate_keys, const MaybeTensor& gate_bias) {
  constexpr const char* op = "key_value";
  FASTEDIT_CHECK(activation == "relu" || activation == "gelu" || activation == "silu", op,
                 "activation is one of relu, gelu, silu", "activation=", activation);
  const Named parameters = {{"keys", &keys},
                            {"bias", given(bias)},
                            {"values", &values},
                            {"gate_keys", given(gate_keys)},
                            {"gate_bias", given(gate_bias)}};
  const bool ranked = x.dim() == 2 && keys.dim() == 3 && values.dim() == 3;
  const auto is_vector = [&](const MaybeTensor& t) {
    return !t || (t->dim() == 2 && t->size(0) == keys.size(0) && t->size(1) == keys.size(2));
  };
  const bool fits = ranked && keys.size(1) == x.size(1) && values.size(0) == keys.size(0) &&
                    values.size(1) == keys.size(2) && is_vector(bias) && is_vector(gate_bias) &&
                    (gate_keys ? gate_keys->sizes() == keys.sizes() : !gate_bias);
  FASTEDIT_CHECK(fits, op,
                 "x is (T, d), keys and gate_keys are (B, d, n), bias and gate_bias are (B, n), values is (B, n, o)",
                 "x=", shown(x.sizes()), ", ", shapes(parameters));
  check_floating(x, op, "x");
  const at::ScalarType own = x.scalar_type(), dtype = keys.scalar_type();
  FASTEDIT_CHECK(one_dtype(parameters) && (dtype == own || dtype == accumulation_type(own)), op,
                 "the parameters have the dtype of x or are float32", "x=", shown(own), ", ", dtypes(parameters));
  FASTEDIT_CHECK(keys.device() == x.device() && one_device(parameters), op, "x and the parameters are on one device",
                 "x=", x.device(), ", ", devices(parameters));
  check_index(offsets, op, "offsets", keys.size(0) + 1, x.device());
}

// What the backward gets beside the arguments of the forward.
inline void check_key_value_upstream(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& keys,
                                     const at::Tensor& values, const at::Tensor& entering, bool gated) {
  constexpr const char* op = "key_value";
  const int64_t width = keys.size(2) * (gated ? 2 : 1);
  check_tensor(grad, op, "grad", x.scalar_type(), {x.size(0), values.size(2)}, x.device());
  check_tensor(entering, op, "entering", accumulation_type(x.scalar_type()), {x.size(0), width}, x.device());
}
inline void check_key_value_needs(bool gated, const std::array<bool, 6>& needs) {
  const auto told = [&] {
    std::string text;
    for (bool need : needs) text += std::string(text.empty() ? "" : ", ") + (need ? "True" : "False");
    return "[" + text + "]";
  };
  FASTEDIT_CHECK(gated || !(needs[4] || needs[5]), "key_value", "gradients of a gate need gate_keys", "needs=", told());
}

inline void check_mmd2(const at::Tensor& x, const at::Tensor& y, const at::Tensor& x_offsets,
                       const at::Tensor& y_offsets, const at::Tensor& bandwidths) {
  constexpr const char* op = "mmd2";
  FASTEDIT_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1), op, "x is (N, d) and y is (M, d)",
                 "x=", shown(x.sizes()), ", y=", shown(y.sizes()));
  check_floating(x, op, "x");
  FASTEDIT_CHECK(x.scalar_type() == y.scalar_type() && x.device() == y.device(), op,
                 "x and y have the same dtype and device", "x=", dtype_and(x, x.device().str()),
                 ", y=", dtype_and(y, y.device().str()));
  FASTEDIT_CHECK(x_offsets.dim() == 1 && x_offsets.size(0) >= 1, op, "x_offsets is (G + 1,)",
                 "x_offsets=", shown(x_offsets.sizes()));
  check_index(x_offsets, op, "x_offsets", x_offsets.size(0), x.device());
  check_index(y_offsets, op, "y_offsets", x_offsets.size(0), x.device());
  check_floating(bandwidths, op, "bandwidths");
  const int64_t groups = x_offsets.size(0) - 1;
  FASTEDIT_CHECK(bandwidths.dim() == 1 || (bandwidths.dim() == 2 && bandwidths.size(0) == groups), op,
                 "bandwidths is (Q,) or (G, Q)", "bandwidths=", shown(bandwidths.sizes()), ", G=", groups);
  FASTEDIT_CHECK(bandwidths.device() == x.device(), op, "bandwidths is on the device of the features",
                 "bandwidths=", bandwidths.device(), ", features=", x.device());
}

inline void check_mmd2_upstream(const at::Tensor& grad_value, const at::Tensor& grad_env, const at::Tensor& x,
                                const at::Tensor& x_offsets) {
  // of any floating dtype
  for (const auto& [name, grad] : Named{{"grad_value", &grad_value}, {"grad_env", &grad_env}}) {
    check_floating(*grad, "mmd2", name);
    check_tensor(*grad, "mmd2", name, grad->scalar_type(), x_offsets.size(0) - 1, x.device());
  }
}

inline void check_mmd2_kept(const at::Tensor& x, const at::Tensor& y, const at::Tensor& x_offsets,
                            const at::Tensor& y_offsets, const at::Tensor& bandwidths) {
  check_mmd2(x, y, x_offsets, y_offsets, bandwidths);
  FASTEDIT_CHECK(x_offsets.size(0) == 2, "mmd2", "pairs are kept of one group", "G=", x_offsets.size(0) - 1);
}

// What mmd2_kept left for its backward.
inline void check_mmd2_pairs(const at::Tensor& pairs, const at::Tensor& x, const at::Tensor& y) {
  const int64_t rows = x.size(0) + y.size(0);
  check_tensor(pairs, "mmd2", "pairs", accumulation_type(x.scalar_type()), {rows, rows}, x.device());
}

inline void check_nearest_keys(const at::Tensor& queries, const at::Tensor& keys, int64_t k, std::string_view metric) {
  constexpr const char* op = "nearest_keys";
  FASTEDIT_CHECK(queries.dim() == 2 && keys.dim() == 2 && queries.size(1) == keys.size(1), op,
                 "queries is (Q, d) and keys is (K, d)", "queries=", shown(queries.sizes()),
                 ", keys=", shown(keys.sizes()));
  check_floating(queries, op, "queries");
  FASTEDIT_CHECK(queries.scalar_type() == keys.scalar_type() && queries.device() == keys.device(), op,
                 "queries and keys have the same dtype and device",
                 "queries=", dtype_and(queries, queries.device().str()),
                 ", keys=", dtype_and(keys, keys.device().str()));
  FASTEDIT_CHECK(metric == "cosine" || metric == "dot" || metric == "l2", op, "metric is one of cosine, dot, l2",
                 "metric=", metric);
  FASTEDIT_CHECK(k >= 1 && k <= kMostRanked && k <= keys.size(0), op,
                 "k is between 1 and the number of keys, at most " + std::to_string(kMostRanked), "k=", k,
                 ", K=", keys.size(0));
}

inline void check_topk_agreement(const at::Tensor& before, const at::Tensor& after, int64_t k) {
  constexpr const char* op = "topk_agreement";
  FASTEDIT_CHECK(before.dim() == 2 && before.sizes() == after.sizes(), op, "before and after are (T, V)",
                 "before=", shown(before.sizes()), ", after=", shown(after.sizes()));
  check_floating(before, op, "before");
  FASTEDIT_CHECK(before.scalar_type() == after.scalar_type() && before.device() == after.device(), op,
                 "before and after have one dtype and are on one device",
                 "before=", dtype_and(before, "on " + before.device().str()),
                 ", after=", dtype_and(after, "on " + after.device().str()));
  FASTEDIT_CHECK(k >= 1 && k <= kMostRanked && k <= before.size(1), op,
                 "k is 1 to V, at most " + std::to_string(kMostRanked), "k=", k, ", V=", before.size(1));
}

// One of the matrices (B, P) of adam_step_.
inline void check_adam_matrix(const char* name, const at::Tensor& matrix, const at::Tensor& params, bool narrow,
                              bool written) {
  constexpr const char* op = "adam_step_";
  const at::ScalarType own = params.scalar_type(), wide = accumulation_type(own);
  FASTEDIT_CHECK(matrix.sizes() == params.sizes(), op, std::string(name) + " has the shape of params", name, "=",
                 shown(matrix.sizes()), ", params=", shown(params.sizes()));
  FASTEDIT_CHECK(matrix.scalar_type() == wide || (narrow && matrix.scalar_type() == own), op,
                 std::string(name) + " is " + (narrow && own != wide ? shown(own) + " or " : "") + shown(wide), name,
                 "=", shown(matrix.scalar_type()));
  FASTEDIT_CHECK(matrix.device() == params.device(), op, std::string(name) + " is on the device of params", name, "=",
                 matrix.device(), ", params=", params.device());
  FASTEDIT_CHECK(params.size(1) <= 1 || matrix.stride(1) == 1, op, std::string(name) + " has unit stride along P", name,
                 "=", shown(matrix.strides()));
  // grads alone are only read
  FASTEDIT_CHECK(!written || params.size(0) <= 1 || matrix.stride(0) >= params.size(1), op,
                 "rows of " + std::string(name) + " do not share memory", name, "=", shown(matrix.strides()));
}
inline void check_adam_vector(const char* op, const char* name, const at::Tensor& vector, at::ScalarType dtype,
                              const at::Tensor& params) {
  FASTEDIT_CHECK(
      vector.dim() == 1 && vector.size(0) == params.size(0) && vector.scalar_type() == dtype &&
          vector.device() == params.device(),
      op,
      std::string(name) + " is " + shown(dtype) + " of shape " + shown(params.sizes().slice(0, 1)) + " beside params",
      name, "=", dtype_and(vector, shown(vector.sizes())), " ", vector.device());
}
inline void check_not_negative(const char* op, const char* name, std::optional<double> number) {
  FASTEDIT_CHECK(!number || *number >= 0, op, std::string(name) + " is not negative", name, "=", shown(*number));
}
// What a step needs besides matrices.
inline void check_adam_settings(const char* op, const at::Tensor& params, const at::Tensor& step, const at::Tensor& lr,
                                const at::Tensor& active, double beta1, double beta2, double eps, double weight_decay,
                                std::optional<double> clip, std::optional<double> radius) {
  check_adam_vector(op, "step", step, at::kLong, params);
  check_adam_vector(op, "lr", lr, at::kDouble, params);
  check_adam_vector(op, "active", active, at::kBool, params);
  FASTEDIT_CHECK(params.size(0) <= 1 || step.stride(0) != 0, op, "rows of step do not share memory",
                 "step=", shown(step.strides()));
  FASTEDIT_CHECK(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, op, "betas lie in [0, 1)", "betas=(", shown(beta1),
                 ", ", shown(beta2), ")");
  check_not_negative(op, "eps", eps);
  check_not_negative(op, "weight_decay", weight_decay);
  check_not_negative(op, "clip", clip);
  check_not_negative(op, "radius", radius);
}

inline void check_adam_step(const at::Tensor& params, const at::Tensor& grads, const at::Tensor& exp_avg,
                            const at::Tensor& exp_avg_sq, const at::Tensor& step, const at::Tensor& lr,
                            const at::Tensor& active, double beta1, double beta2, double eps, double weight_decay,
                            std::optional<double> clip, std::optional<double> radius) {
  constexpr const char* op = "adam_step_";
  check_floating(params, op, "params");
  FASTEDIT_CHECK(params.dim() == 2, op, "params is (B, P)", "params=", shown(params.sizes()));
  check_adam_matrix("params", params, params, true, true);
  check_adam_matrix("grads", grads, params, true, false);
  check_adam_matrix("exp_avg", exp_avg, params, false, true);
  check_adam_matrix("exp_avg_sq", exp_avg_sq, params, false, true);
  check_adam_settings(op, params, step, lr, active, beta1, beta2, eps, weight_decay, clip, radius);
  const void *first = params.const_data_ptr(), *second = exp_avg.const_data_ptr();
  const void* third = exp_avg_sq.const_data_ptr();
  FASTEDIT_CHECK(params.numel() == 0 || (first != second && first != third && second != third), op,
                 "params, exp_avg and exp_avg_sq do not share memory", "params=", shown(params.sizes()));
}

// One part of adam_step_outer_: matrices of all edits, and the outer products that their gradients are the sums of.
inline void check_outer_part(const at::Tensor& params, const at::Tensor& inputs, const at::Tensor& grads,
                             const at::Tensor& offsets, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                             const at::Tensor& first) {
  constexpr const char* op = "adam_step_outer_";
  const Named features = {
      {"params", &params}, {"inputs", &inputs}, {"grads", &grads}, {"exp_avg", &exp_avg}, {"exp_avg_sq", &exp_avg_sq}};
  const Named all = {{"params", &params},   {"inputs", &inputs},   {"grads", &grads},
                     {"offsets", &offsets}, {"exp_avg", &exp_avg}, {"exp_avg_sq", &exp_avg_sq}};
  const Named written = {{"params", &params}, {"exp_avg", &exp_avg}, {"exp_avg_sq", &exp_avg_sq}};
  bool fits = params.dim() == 3 && inputs.dim() == 2 && grads.dim() == 2 && offsets.dim() == 1;
  fits = fits && params.size(0) == first.size(0) && offsets.size(0) == params.size(0) + 1;
  fits = fits && inputs.size(1) == params.size(2) && grads.size(1) == params.size(1) && grads.size(0) == inputs.size(0);
  FASTEDIT_CHECK(fits && exp_avg.sizes() == params.sizes() && exp_avg_sq.sizes() == params.sizes(), op,
                 "params, exp_avg and exp_avg_sq are (B, o, i), inputs (T, i), grads (T, o), offsets (B + 1,)",
                 shapes(all), ", B=", first.size(0));
  const at::ScalarType dtype = first.scalar_type();
  bool same = (dtype == at::kFloat || dtype == at::kDouble) && offsets.scalar_type() == at::kLong;
  FASTEDIT_CHECK(same && params.scalar_type() == dtype && one_dtype(features), op,
                 "all are float32 or all are float64, offsets int64", dtypes(all));
  FASTEDIT_CHECK(params.device() == first.device() && one_device(all), op, "all are on one device", devices(all));
  const int64_t o = params.size(1), i = params.size(2);
  for (const auto& [name, matrix] : written) {
    const bool dense = (i <= 1 || matrix->stride(2) == 1) && (o <= 1 || matrix->stride(1) == i);
    FASTEDIT_CHECK(dense && (params.size(0) <= 1 || matrix->stride(0) >= o * i), op,
                   std::string("matrices of ") + name + " are contiguous and do not share memory", name, "=",
                   shown(matrix->strides()));
  }
}

inline void check_adam_step_outer(at::TensorList params, at::TensorList inputs, at::TensorList grads,
                                  at::TensorList offsets, at::TensorList exp_avg, at::TensorList exp_avg_sq,
                                  const at::Tensor& step, const at::Tensor& lr, const at::Tensor& active, double beta1,
                                  double beta2, double eps, double weight_decay, std::optional<double> clip,
                                  std::optional<double> radius) {
  constexpr const char* op = "adam_step_outer_";
  const std::array<size_t, 6> lengths{params.size(),  inputs.size(),  grads.size(),
                                      offsets.size(), exp_avg.size(), exp_avg_sq.size()};
  bool alike = lengths[0] > 0;
  for (size_t length : lengths) alike = alike && length == lengths[0];
  FASTEDIT_CHECK(alike, op, "there is at least one part, and every list has one entry per part", "params=", lengths[0],
                 ", inputs=", lengths[1], ", grads=", lengths[2], ", offsets=", lengths[3], ", exp_avg=", lengths[4],
                 ", exp_avg_sq=", lengths[5]);
  FASTEDIT_CHECK(params[0].dim() == 3, op, "params are (B, o, i)", "params=", shown(params[0].sizes()));
  for (size_t s = 0; s < lengths[0]; ++s) {
    check_outer_part(params[s], inputs[s], grads[s], offsets[s], exp_avg[s], exp_avg_sq[s], params[0]);
  }
  check_adam_settings(op, params[0], step, lr, active, beta1, beta2, eps, weight_decay, clip, radius);
  std::vector<const void*> begins;
  for (const at::TensorList& list : {params, exp_avg, exp_avg_sq}) {
    for (const at::Tensor& tensor : list) {
      if (tensor.numel() > 0) begins.push_back(tensor.const_data_ptr());
    }
  }
  std::sort(begins.begin(), begins.end());
  FASTEDIT_CHECK(std::adjacent_find(begins.begin(), begins.end()) == begins.end(), op,
                 "params, exp_avg and exp_avg_sq do not share memory", "params=", shown(params[0].sizes()));
}

}  // namespace fastedit
