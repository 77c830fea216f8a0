// adam_step_outer_ on the CPU. The gradient of a matrix is a sum of outer products, one a token: it is made for some
// rows at a time, in the cache, where the update takes it. So a step reads and writes the matrix and its moments once.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "arguments.h"
#include "cpu/adam_scalars.h"
#include "cpu/dispatch.h"
#include "cpu/isa.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/mmd2.h"

namespace fastedit {
namespace {

using at::Tensor;
using at::TensorList;

constexpr int64_t kTileNumbers = 1 << 14;  // of a gradient at a time: 64 KiB of float32
constexpr int64_t kGramRows = 32;          // of a Gram matrix at a time; panels divide it
constexpr int64_t kLeastRows = 64;         // of a matrix that a thread takes

// One part of one edit: a matrix (o, i), its moments, and the n outer products that its gradient is the sum of.
template <class A>
struct Matrix {
  A *param, *first, *second;
  const A *x, *y;  // (n, i), (n, o)
  int64_t n, o, i;

  int64_t tile_rows() const {
    return std::clamp<int64_t>(kTileNumbers / padded(i) / kRowPadding * kRowPadding, kRowPadding, o + kRowPadding);
  }
  // Whether the products of all pairs of tokens are fewer operations than the gradient.
  bool has_few_tokens() const { return n * (i + o) <= i * o; }
};

// The gradient of some rows of a matrix at a time.
template <class A>
class Gradient {
 public:
  explicit Gradient(const Matrix<A>& matrix)
      : m_(matrix),
        columns_(padded(matrix.i)),
        packed_(matrix.n * columns_),
        turned_(matrix.tile_rows() * matrix.n),
        tile_((matrix.tile_rows() + kRowPadding) * columns_) {
    FASTEDIT_SIMD(pack_columns, (A), m_.x, m_.i, 0, m_.n, m_.n, m_.i, packed_.data());
  }

  int64_t stride() const { return columns_; }

  // Rows [row, row + rows), at most tile_rows(); what is needed next comes into the cache meanwhile.
  const A* rows(int64_t row, int64_t rows, const Ahead& ahead = {}) {
    if (m_.n == 0) return tile_.data();
    FASTEDIT_SIMD(transpose, (A), m_.y + row, m_.o, m_.n, rows, turned_.data(), m_.n);
    FASTEDIT_SIMD(gemm_ahead, (A), turned_.data(), m_.n, rows, packed_.data(), m_.i, m_.n, tile_.data(), columns_,
                  ahead);
    return tile_.data();
  }

 private:
  const Matrix<A>& m_;
  int64_t columns_;
  std::vector<A> packed_, turned_, tile_;
};

// Inner products of rows [row, row + kGramRows) of a (n, K) with rows row, row + 1, ..., n - 1.
template <class A>
void gram(const A* a, const A* packed, int64_t n, int64_t K, int64_t row, A* out, int64_t stride) {
  FASTEDIT_SIMD(gemm, (A), a + row * K, K, std::min(kGramRows, n - row), packed + row * K, n - row, K, out, stride);
}

// |sum_t y_t x_t'|^2 = sum_tu (x_t . x_u) (y_t . y_u)
template <class A>
double square_by_tokens(const Matrix<A>& m) {
  const int64_t n = m.n, stride = padded(n);
  std::vector<A> x(stride * m.i), y(stride * m.o), of_x(kGramRows * stride), of_y(kGramRows * stride);
  FASTEDIT_SIMD(pack_transposed, (A), m.x, m.i, n, m.i, x.data());
  FASTEDIT_SIMD(pack_transposed, (A), m.y, m.o, n, m.o, y.data());
  double total = 0;
  for (int64_t row = 0; row < n; row += kGramRows) {
    gram(m.x, x.data(), n, m.i, row, of_x.data(), stride);
    gram(m.y, y.data(), n, m.o, row, of_y.data(), stride);
    for (int64_t t = 0; t < std::min(kGramRows, n - row); ++t) {
      double square = 0, beside = 0;
      const A *left = of_x.data() + t * stride, *right = of_y.data() + t * stride;
      const int64_t inside = std::min(kGramRows, n - row);
      for (int64_t u = 0; u < inside; ++u) square += static_cast<double>(left[u]) * static_cast<double>(right[u]);
      for (int64_t u = inside; u < n - row; ++u) beside += static_cast<double>(left[u]) * static_cast<double>(right[u]);
      total += square + 2 * beside;
    }
  }
  // rounding may leave less than nothing; a NaN stays one
  return total < 0 ? 0 : total;
}

template <class A>
double square_by_rows(const Matrix<A>& m) {
  Gradient<A> gradient(m);
  double total = 0;
  for (int64_t row = 0; row < m.o; row += m.tile_rows()) {
    const int64_t rows = std::min(m.tile_rows(), m.o - row);
    const A* tile = gradient.rows(row, rows);
    for (int64_t r = 0; r < rows; ++r) total += FASTEDIT_SIMD(square_sum, (A, A), tile + r * gradient.stride(), m.i);
  }
  return total;
}

template <class A>
void update(const Matrix<A>& m, int64_t begin, int64_t end, const AdamScalars<A>& scalars) {
  Gradient<A> gradient(m);
  for (int64_t row = begin; row < end; row += m.tile_rows()) {
    const int64_t rows = std::min(m.tile_rows(), end - row);
    // the matrix and its moments wait in memory: with a product of their own they need not be waited for
    const int64_t start = row * m.i;
    const Ahead here{
        3, {m.param + start, m.first + start, m.second + start}, rows * m.i * static_cast<int64_t>(sizeof(A))};
    const A* tile = gradient.rows(row, rows, here);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = (row + r) * m.i;
      FASTEDIT_SIMD(adam_update, (A, A, A), m.param + at, tile + r * gradient.stride(), m.first + at, m.second + at,
                    m.i, scalars);
    }
  }
}

// Every part of the edits that are active, an edit's parts beside each other.
template <class A>
std::vector<Matrix<A>> matrices_of(TensorList params, const std::vector<Tensor>& inputs,
                                   const std::vector<Tensor>& grads, const std::vector<Tensor>& offsets,
                                   TensorList exp_avg, TensorList exp_avg_sq, const std::vector<int64_t>& edits) {
  std::vector<Matrix<A>> matrices;
  for (int64_t b : edits) {
    for (size_t s = 0; s < params.size(); ++s) {
      const int64_t* ends = offsets[s].const_data_ptr<int64_t>() + b;
      const int64_t o = params[s].size(1), i = params[s].size(2);
      const auto matrix = [&](const Tensor& all) { return all.mutable_data_ptr<A>() + b * all.stride(0); };
      matrices.push_back({matrix(params[s]), matrix(exp_avg[s]), matrix(exp_avg_sq[s]),
                          inputs[s].const_data_ptr<A>() + ends[0] * i, grads[s].const_data_ptr<A>() + ends[0] * o,
                          ends[1] - ends[0], o, i});
    }
  }
  return matrices;
}

template <class A>
void run(const std::vector<Matrix<A>>& matrices, int64_t parts, const std::vector<int64_t>& edits,
         const AdamSettings& settings, Tensor& step, const Tensor& lr, Tensor& norm) {
  const auto lr_of = lr.accessor<double, 1>();
  auto step_of = step.accessor<int64_t, 1>();
  A* norms = norm.mutable_data_ptr<A>();
  const int64_t count = static_cast<int64_t>(matrices.size());
  std::vector<double> squares(count);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      squares[k] = matrices[k].has_few_tokens() ? square_by_tokens(matrices[k]) : square_by_rows(matrices[k]);
    }
  });
  std::vector<AdamScalars<A>> scalars(edits.size());
  std::vector<std::array<int64_t, 3>> pieces;  // matrix, first row, last row
  for (size_t e = 0; e < edits.size(); ++e) {
    double total = 0;
    for (int64_t s = 0; s < parts; ++s) total += squares[e * parts + s];
    const int64_t b = edits[e];
    norms[b] = static_cast<A>(std::sqrt(total));
    if (!std::isfinite(norms[b])) continue;
    step_of[b] += 1;
    scalars[e] = adam_scalars<A>(settings, lr_of[b], static_cast<double>(step_of[b]), norms[b]);
    for (int64_t s = 0; s < parts; ++s) {
      const int64_t k = static_cast<int64_t>(e) * parts + s, rows = matrices[k].o;
      const int64_t share = std::max(kLeastRows, (rows + at::get_num_threads() - 1) / at::get_num_threads());
      for (int64_t row = 0; row < rows; row += share) pieces.push_back({k, row, std::min(row + share, rows)});
    }
  }
  at::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const auto [k, first, last] = pieces[p];
      update(matrices[k], first, last, scalars[k / parts]);
    }
  });
}

std::vector<Tensor> contiguous(TensorList tensors) {
  std::vector<Tensor> made;
  for (const Tensor& tensor : tensors) made.push_back(tensor.contiguous());
  return made;
}

Tensor adam_step_outer_(TensorList params, TensorList inputs, TensorList grads, TensorList offsets, TensorList exp_avg,
                        TensorList exp_avg_sq, Tensor& step, const Tensor& lr, const Tensor& active, double beta1,
                        double beta2, double eps, double weight_decay, std::optional<double> clip,
                        std::optional<double> radius) {
  check_adam_step_outer(params, inputs, grads, offsets, exp_avg, exp_avg_sq, step, lr, active, beta1, beta2, eps,
                        weight_decay, clip, radius);
  const AdamSettings settings{beta1, beta2, eps, weight_decay, clip, radius};
  const std::vector<Tensor> x = contiguous(inputs), y = contiguous(grads), ends = contiguous(offsets);
  for (size_t s = 0; s < ends.size(); ++s) {
    checked_offsets(ends[s], x[s].size(0), "adam_step_outer_", "offsets", "the number of tokens", "T");
  }
  const auto active_of = active.accessor<bool, 1>();
  std::vector<int64_t> edits;
  for (int64_t b = 0; b < active.size(0); ++b) {
    if (active_of[b]) edits.push_back(b);
  }
  Tensor norm = at::zeros({active.size(0)}, params[0].options());
  const auto go = [&]<class A>() {
    run(matrices_of<A>(params, x, y, ends, exp_avg, exp_avg_sq, edits), static_cast<int64_t>(params.size()), edits,
        settings, step, lr, norm);
  };
  if (params[0].scalar_type() == at::kDouble) {
    go.template operator()<double>();
  } else {
    go.template operator()<float>();
  }
  return norm;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastedit, CPU, m) {
  if (best_isa() == Isa::none) return;
  m.impl("adam_step_outer_", adam_step_outer_);
}

}  // namespace fastedit
