// key_value on the CPU, with the products of low_rank. A gate's keys stand below the others, so that one product gives
// all that enters the neurons.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/dispatch.h"
#include "cpu/isa.h"
#include "cpu/simd/low_rank.h"

namespace fastedit {
namespace {

using at::Tensor;

constexpr int64_t kRows = 16;      // tokens of one piece of work
constexpr int64_t kColumns = 512;  // columns of one piece of a weight gradient

enum class Activation { relu, gelu, silu };

Activation activation_of(c10::string_view name) {
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  return Activation::silu;
}

struct Piece {
  int64_t edit, start, stop;
};

std::vector<Piece> pieces_of(const int64_t* offsets, int64_t edits) {
  std::vector<Piece> pieces;
  for (int64_t b = 0; b < edits; ++b) {
    for (int64_t t = offsets[b]; t < offsets[b + 1]; t += kRows) {
      pieces.push_back({b, t, std::min(t + kRows, offsets[b + 1])});
    }
  }
  return pieces;
}

// n neurons, m rows of keys: n, or 2n with a gate.
struct Shapes {
  int64_t tokens, edits, d, n, m, o;
};

Shapes shapes_of(const Tensor& x, const Tensor& keys, const Tensor& values, bool gated) {
  const int64_t n = keys.size(2);
  return {x.size(0), keys.size(0), keys.size(1), n, gated ? 2 * n : n, values.size(2)};
}

// The activation and its slope.
template <class A>
std::array<A, 2> activate(A s, Activation kind) {
  if (kind == Activation::relu) return s > 0 ? std::array<A, 2>{s, 1} : std::array<A, 2>{s != s ? s : 0, 0};
  if (kind == Activation::silu) {
    const A gate = 1 / (1 + std::exp(-s));
    return {s * gate, gate * (1 + s * (1 - gate))};
  }
  const A share = static_cast<A>(0.5) * (1 + std::erf(s * static_cast<A>(0.70710678118654752440)));
  const A density = static_cast<A>(0.39894228040143267794) * std::exp(static_cast<A>(-0.5) * s * s);
  return {s * share, share + s * density};
}

// What one token's neurons put out.
template <class A>
void neurons(const A* entering, const Shapes& s, Activation kind, A* out) {
  const bool gated = s.m > s.n;
  for (int64_t i = 0; i < s.n; ++i) {
    const A active = activate(entering[gated ? s.n + i : i], kind)[0];
    out[i] = gated ? active * entering[i] : active;
  }
}

// The gradient by what enters, from that by what the neurons put out.
template <class A>
void neurons_backward(const A* grad, const A* entering, const Shapes& s, Activation kind, A* out) {
  const bool gated = s.m > s.n;
  for (int64_t i = 0; i < s.n; ++i) {
    const auto [active, slope] = activate(entering[gated ? s.n + i : i], kind);
    out[i] = grad[i] * (gated ? active : slope);
    if (gated) out[s.n + i] = grad[i] * entering[i] * slope;
  }
}

// (B, m, d): keys and gate keys along their long dimension.
Tensor stacked(const Tensor& keys, const std::optional<Tensor>& gate_keys, at::ScalarType wide) {
  const Tensor own = keys.transpose(1, 2).to(wide);
  return gate_keys ? at::cat({own, gate_keys->transpose(1, 2).to(wide)}, 1) : own.contiguous();
}

template <class A>
void add_bias(const A* bias, int64_t rows, int64_t n, int64_t stride, A* out) {
  for (int64_t t = 0; bias != nullptr && t < rows; ++t) {
    for (int64_t i = 0; i < n; ++i) out[t * stride + i] += bias[i];
  }
}

template <class T, class A>
void forward(const Tensor& x, const Tensor& keys, const Tensor& bias, const Tensor& gate_bias, const Tensor& values,
             const int64_t* offsets, const Shapes& s, Activation kind, Tensor& y, Tensor& entering) {
  const T* x_data = data<const T>(x);
  T* y_data = data<T>(y);
  A* entering_data = data<A>(entering);
  const A *keys_data = data<const A>(keys), *values_data = data<const A>(values);
  const A* bias_data = bias.defined() ? data<const A>(bias) : nullptr;
  const A* gate_bias_data = gate_bias.defined() ? data<const A>(gate_bias) : nullptr;
  const std::vector<Piece> pieces = pieces_of(offsets, s.edits);
  at::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<A> code(kRows * s.n);
    for (int64_t i = begin; i < end; ++i) {
      const auto [b, start, stop] = pieces[i];
      A* own = entering_data + start * s.m;
      FASTEDIT_SIMD(dots, (T, A), x_data + start * x.stride(0), x.stride(0), stop - start, keys_data + b * s.m * s.d,
                    s.m, s.d, own);
      add_bias(bias_data ? bias_data + b * s.n : nullptr, stop - start, s.n, s.m, own);
      add_bias(gate_bias_data ? gate_bias_data + b * s.n : nullptr, stop - start, s.n, s.m, own + s.n);
      for (int64_t t = 0; t < stop - start; ++t) neurons(own + t * s.m, s, kind, code.data() + t * s.n);
      FASTEDIT_SIMD(expand, (T, A), code.data(), stop - start, values_data + b * s.n * s.o, s.n, s.o,
                    y_data + start * s.o, s.o);
    }
  });
}

std::tuple<Tensor, Tensor> key_value(const Tensor& x_in, const Tensor& keys, const std::optional<Tensor>& bias,
                                     const Tensor& values, const Tensor& offsets_in, c10::string_view activation,
                                     const std::optional<Tensor>& gate_keys, const std::optional<Tensor>& gate_bias) {
  check_key_value(x_in, keys, bias, values, offsets_in, activation, gate_keys, gate_bias);
  const Shapes s = shapes_of(x_in, keys, values, gate_keys.has_value());
  const Activation kind = activation_of(activation);
  const Tensor offsets_there = offsets_in.contiguous();
  const int64_t* offsets =
      checked_offsets(offsets_there, s.tokens, "key_value", "offsets", "the number of tokens", "T");
  const Tensor x = with_unit_stride(x_in);
  Tensor y = at::empty({s.tokens, s.o}, x.options()), entering;
  dispatch(x.scalar_type(), "key_value", [&]<class T, class A>() {
    const auto wide = c10::CppTypeToScalarType<A>::value;
    entering = at::empty({s.tokens, s.m}, x.options().dtype(wide));
    const auto widened = [&](const std::optional<Tensor>& t) { return t ? t->to(wide).contiguous() : Tensor(); };
    forward<T, A>(x, stacked(keys, gate_keys, wide), widened(bias), widened(gate_bias), values.to(wide).contiguous(),
                  offsets, s, kind, y, entering);
  });
  return {y, entering};
}

// The gradients that are wanted; an undefined tensor is not.
struct Gradients {
  Tensor x, keys, bias, values, gate_keys, gate_bias;
};

// Writes a block (n, columns) turned around, as (columns, n).
template <class A>
void write_turned(const A* block, int64_t n, int64_t columns, A* out) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < n; ++i) out[j * n + i] = block[i * columns + j];
  }
}

// Gradients of the weights: an edit's columns in pieces, each over all of its tokens in order.
template <class T, class A>
void weight_gradients(const Tensor& grad, const Tensor& x, const A* code, const A* inner, const int64_t* offsets,
                      const Shapes& s, Gradients& out) {
  const T *x_data = data<const T>(x), *grad_data = data<const T>(grad);
  A* keys = out.keys.defined() ? data<A>(out.keys) : nullptr;
  A* gate_keys = out.gate_keys.defined() ? data<A>(out.gate_keys) : nullptr;
  A* values = out.values.defined() ? data<A>(out.values) : nullptr;
  const int64_t key_pieces = keys || gate_keys ? (s.d + kColumns - 1) / kColumns : 0;
  const int64_t value_pieces = values ? (s.o + kColumns - 1) / kColumns : 0;
  const int64_t all = key_pieces + value_pieces;
  at::parallel_for(0, s.edits * all, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> block(key_pieces ? kColumns * s.m : 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / all, piece = i % all, start = offsets[b], rows = offsets[b + 1] - start;
      if (piece < key_pieces) {
        const int64_t k = piece * kColumns, columns = std::min(kColumns, s.d - k);
        FASTEDIT_SIMD(collect, (T, A), inner + start * s.m, rows, s.m, x_data + start * x.stride(0) + k, x.stride(0),
                      columns, block.data(), columns);
        if (keys) write_turned(block.data(), s.n, columns, keys + (b * s.d + k) * s.n);
        if (gate_keys) write_turned(block.data() + s.n * columns, s.n, columns, gate_keys + (b * s.d + k) * s.n);
      } else {
        const int64_t k = (piece - key_pieces) * kColumns, columns = std::min(kColumns, s.o - k);
        FASTEDIT_SIMD(collect, (T, A), code + start * s.n, rows, s.n, grad_data + start * grad.stride(0) + k,
                      grad.stride(0), columns, values + b * s.n * s.o + k, s.o);
      }
    }
  });
}

// Sums over each edit's tokens of n columns of inner (T, m), from column first on.
template <class A>
void bias_gradient(const A* inner, int64_t first, const int64_t* offsets, const Shapes& s, Tensor& out) {
  if (!out.defined()) return;
  A* sums = data<A>(out);
  for (int64_t b = 0; b < s.edits; ++b) {
    std::fill_n(sums + b * s.n, s.n, A{0});
    for (int64_t t = offsets[b]; t < offsets[b + 1]; ++t) {
      for (int64_t i = 0; i < s.n; ++i) sums[b * s.n + i] += inner[t * s.m + first + i];
    }
  }
}

template <class T, class A>
void backward(const Tensor& grad, const Tensor& x, const Tensor& keys, const Tensor& values, const Tensor& entering,
              const int64_t* offsets, const Shapes& s, Activation kind, Gradients& out) {
  const T* grad_data = data<const T>(grad);
  const A *keys_data = data<const A>(keys), *values_data = data<const A>(values);
  const A* entering_data = data<const A>(entering);
  T* grad_x = out.x.defined() ? data<T>(out.x) : nullptr;
  const bool weigh = out.values.defined();
  // what the neurons put out, and the gradient by what enters them
  std::vector<A> code(weigh ? s.tokens * s.n : 0), inner(s.tokens * s.m);
  const std::vector<Piece> pieces = pieces_of(offsets, s.edits);
  at::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<A> code_grad(kRows * s.n);
    for (int64_t i = begin; i < end; ++i) {
      const auto [b, start, stop] = pieces[i];
      FASTEDIT_SIMD(dots, (T, A), grad_data + start * grad.stride(0), grad.stride(0), stop - start,
                    values_data + b * s.n * s.o, s.n, s.o, code_grad.data());
      for (int64_t t = start; t < stop; ++t) {
        const A* own = entering_data + t * s.m;
        neurons_backward(code_grad.data() + (t - start) * s.n, own, s, kind, inner.data() + t * s.m);
        if (weigh) neurons(own, s, kind, code.data() + t * s.n);
      }
      if (grad_x) {
        FASTEDIT_SIMD(expand, (T, A), inner.data() + start * s.m, stop - start, keys_data + b * s.m * s.d, s.m, s.d,
                      grad_x + start * s.d, s.d);
      }
    }
  });
  weight_gradients<T, A>(grad, x, code.data(), inner.data(), offsets, s, out);
  bias_gradient(inner.data(), 0, offsets, s, out.bias);
  bias_gradient(inner.data(), s.n, offsets, s, out.gate_bias);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> key_value_backward(
    const Tensor& grad_in, const Tensor& x_in, const Tensor& keys, const Tensor& values, const Tensor& offsets_in,
    const Tensor& entering, c10::string_view activation, const std::optional<Tensor>& gate_keys,
    std::array<bool, 6> needs) {
  check_key_value(x_in, keys, std::nullopt, values, offsets_in, activation, gate_keys, std::nullopt);
  check_key_value_upstream(grad_in, x_in, keys, values, entering, gate_keys.has_value());
  const Shapes s = shapes_of(x_in, keys, values, gate_keys.has_value());
  const Activation kind = activation_of(activation);
  const Tensor offsets_there = offsets_in.contiguous();
  const int64_t* offsets =
      checked_offsets(offsets_there, s.tokens, "key_value", "offsets", "the number of tokens", "T");
  check_key_value_needs(gate_keys.has_value(), needs);
  const Tensor x = with_unit_stride(x_in), grad = with_unit_stride(grad_in);
  Gradients out;
  dispatch(x.scalar_type(), "key_value", [&]<class T, class A>() {
    const auto wide = c10::CppTypeToScalarType<A>::value;
    const auto options = keys.options().dtype(wide);
    if (needs[0]) out.x = at::empty({s.tokens, s.d}, x.options());
    if (needs[1]) out.keys = at::empty({s.edits, s.d, s.n}, options);
    if (needs[2]) out.bias = at::empty({s.edits, s.n}, options);
    if (needs[3]) out.values = at::empty({s.edits, s.n, s.o}, options);
    if (needs[4]) out.gate_keys = at::empty({s.edits, s.d, s.n}, options);
    if (needs[5]) out.gate_bias = at::empty({s.edits, s.n}, options);
    const Tensor all_keys = needs[0] ? stacked(keys, gate_keys, wide) : at::empty({0}, options);
    backward<T, A>(grad, x, all_keys, values.to(wide).contiguous(), entering.contiguous(), offsets, s, kind, out);
  });
  const auto given = [&](const Tensor& t) {
    return t.defined() ? t.to(keys.scalar_type()) : at::empty({0}, keys.options());
  };
  return {needs[0] ? out.x : at::empty({0}, x.options()),
          given(out.keys),
          given(out.bias),
          given(out.values),
          given(out.gate_keys),
          given(out.gate_bias)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastedit, CPU, m) {
  if (best_isa() == Isa::none) return;
  m.impl("key_value", key_value);
  m.impl("key_value_backward", key_value_backward);
}

}  // namespace fastedit
