// low_rank on the CPU. Ragged groups become a list of equal pieces of work; weights are laid out once so that all
// products run along their long dimension.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
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

struct Piece {
  int64_t edit, start, stop;
};

// Every edit's tokens cut into pieces of kRows.
std::vector<Piece> pieces_of(const int64_t* offsets, int64_t edits) {
  std::vector<Piece> pieces;
  for (int64_t b = 0; b < edits; ++b) {
    for (int64_t t = offsets[b]; t < offsets[b + 1]; t += kRows) {
      pieces.push_back({b, t, std::min(t + kRows, offsets[b + 1])});
    }
  }
  return pieces;
}

struct Shapes {
  int64_t tokens, edits, d, r, o;
};

Shapes shapes_of(const Tensor& x, const Tensor& down, const Tensor& up) {
  return {x.size(0), down.size(0), down.size(1), down.size(2), up.size(2)};
}

template <class T, class A>
void forward(const Tensor& x, const Tensor& down_t, const Tensor& up, const int64_t* offsets, const Shapes& s,
             Tensor& y) {
  const T* x_data = data<const T>(x);
  T* y_data = data<T>(y);
  const A* down_data = down_t.const_data_ptr<A>();
  const A* up_data = up.const_data_ptr<A>();
  const std::vector<Piece> pieces = pieces_of(offsets, s.edits);
  at::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<A> code(kRows * s.r);
    for (int64_t i = begin; i < end; ++i) {
      const auto [b, start, stop] = pieces[i];
      FASTEDIT_SIMD(dots, (T, A), x_data + start * x.stride(0), x.stride(0), stop - start, down_data + b * s.r * s.d,
                    s.r, s.d, code.data());
      FASTEDIT_SIMD(expand, (T, A), code.data(), stop - start, up_data + b * s.r * s.o, s.r, s.o, y_data + start * s.o,
                    s.o);
    }
  });
}

Tensor low_rank(const Tensor& x_in, const Tensor& down, const Tensor& up, const Tensor& offsets_in) {
  check_low_rank(x_in, down, up, offsets_in);
  const Shapes s = shapes_of(x_in, down, up);
  const Tensor offsets_there = offsets_in.contiguous();
  const int64_t* offsets = checked_offsets(offsets_there, s.tokens, "low_rank", "offsets", "the number of tokens", "T");
  const Tensor x = with_unit_stride(x_in);
  Tensor y = x.new_empty({s.tokens, s.o});
  dispatch(x.scalar_type(), "low_rank", [&]<class T, class A>() {
    const auto wide = c10::CppTypeToScalarType<A>::value;
    const Tensor down_t = down.transpose(1, 2).to(wide).contiguous();
    forward<T, A>(x, down_t, up.to(wide).contiguous(), offsets, s, y);
  });
  return y;
}

template <class T, class A>
void backward(const Tensor& grad, const Tensor& x, const Tensor& down_t, const Tensor& up, const int64_t* offsets,
              const Shapes& s, std::array<bool, 3> needs, Tensor& grad_x, Tensor& grad_down, Tensor& grad_up) {
  const auto [need_x, need_down, need_up] = needs;
  const T *x_data = data<const T>(x), *grad_data = data<const T>(grad);
  const A *down_data = down_t.const_data_ptr<A>(), *up_data = up.const_data_ptr<A>();
  T* grad_x_data = need_x ? data<T>(grad_x) : nullptr;
  // (T, r): gradient of the hidden code, and the code itself
  const auto options = down_t.options();
  const Tensor code_grad = at::empty({s.tokens, s.r}, options);
  const Tensor code = at::empty({need_up ? s.tokens : 0, s.r}, options);
  A *code_grad_data = code_grad.mutable_data_ptr<A>(), *code_data = code.mutable_data_ptr<A>();
  const std::vector<Piece> pieces = pieces_of(offsets, s.edits);
  at::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [b, start, stop] = pieces[i];
      const A *own_down = down_data + b * s.r * s.d, *own_up = up_data + b * s.r * s.o;
      if (need_x || need_down) {
        FASTEDIT_SIMD(dots, (T, A), grad_data + start * grad.stride(0), grad.stride(0), stop - start, own_up, s.r, s.o,
                      code_grad_data + start * s.r);
      }
      if (need_up) {
        FASTEDIT_SIMD(dots, (T, A), x_data + start * x.stride(0), x.stride(0), stop - start, own_down, s.r, s.d,
                      code_data + start * s.r);
      }
      if (need_x) {
        FASTEDIT_SIMD(expand, (T, A), code_grad_data + start * s.r, stop - start, own_down, s.r, s.d,
                      grad_x_data + start * s.d, s.d);
      }
    }
  });

  // Weight gradients: an edit's columns in pieces, each over all of its tokens.
  const int64_t down_pieces = need_down ? (s.d + kColumns - 1) / kColumns : 0;
  const int64_t up_pieces = need_up ? (s.o + kColumns - 1) / kColumns : 0;
  A *grad_down_data = need_down ? grad_down.mutable_data_ptr<A>() : nullptr,
    *grad_up_data = need_up ? grad_up.mutable_data_ptr<A>() : nullptr;
  at::parallel_for(0, s.edits * (down_pieces + up_pieces), 1, [&](int64_t begin, int64_t end) {
    std::vector<A> turned(need_down ? kColumns * s.r : 0);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / (down_pieces + up_pieces), piece = i % (down_pieces + up_pieces);
      const int64_t start = offsets[b], rows = offsets[b + 1] - start;
      if (piece < down_pieces) {
        const int64_t k = piece * kColumns, columns = std::min(kColumns, s.d - k);
        FASTEDIT_SIMD(collect, (T, A), code_grad_data + start * s.r, rows, s.r, x_data + start * x.stride(0) + k,
                      x.stride(0), columns, turned.data(), columns);
        A* out = grad_down_data + (b * s.d + k) * s.r;
        for (int64_t j = 0; j < columns; ++j) {
          for (int64_t q = 0; q < s.r; ++q) out[j * s.r + q] = turned[q * columns + j];
        }
      } else {
        const int64_t k = (piece - down_pieces) * kColumns, columns = std::min(kColumns, s.o - k);
        FASTEDIT_SIMD(collect, (T, A), code_data + start * s.r, rows, s.r, grad_data + start * grad.stride(0) + k,
                      grad.stride(0), columns, grad_up_data + b * s.r * s.o + k, s.o);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> low_rank_backward(const Tensor& grad_in, const Tensor& x_in, const Tensor& down,
                                                     const Tensor& up, const Tensor& offsets_in,
                                                     std::array<bool, 3> needs) {
  check_low_rank(x_in, down, up, offsets_in);
  check_tensor(grad_in, "low_rank", "grad", x_in.scalar_type(), {x_in.size(0), up.size(2)}, x_in.device());
  const Shapes s = shapes_of(x_in, down, up);
  const Tensor offsets_there = offsets_in.contiguous();
  const int64_t* offsets = checked_offsets(offsets_there, s.tokens, "low_rank", "offsets", "the number of tokens", "T");
  const Tensor x = with_unit_stride(x_in), grad = with_unit_stride(grad_in);
  Tensor grad_x = needs[0] ? x.new_empty({s.tokens, s.d}) : x.new_empty({0});
  Tensor grad_down, grad_up;
  dispatch(x.scalar_type(), "low_rank", [&]<class T, class A>() {
    const auto options = down.options().dtype(c10::CppTypeToScalarType<A>::value);
    const Tensor down_t = down.transpose(1, 2).to(options).contiguous();
    grad_down = needs[1] ? at::empty({s.edits, s.d, s.r}, options) : at::empty({0}, options);
    grad_up = needs[2] ? at::empty({s.edits, s.r, s.o}, options) : at::empty({0}, options);
    backward<T, A>(grad, x, down_t, up.to(options).contiguous(), offsets, s, needs, grad_x, grad_down, grad_up);
  });
  return {grad_x, grad_down.to(down.scalar_type()), grad_up.to(up.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastedit, CPU, m) {
  if (best_isa() == Isa::none) return;
  m.impl("low_rank", low_rank);
  m.impl("low_rank_backward", low_rank_backward);
}

}  // namespace fastedit
