// adam_step_ on the CPU: bound by memory, so every tensor is read and written once, gradients twice: the norm comes
// before the update, which a row whose norm is not finite does not get. The norm adds the pieces in order, whoever made
// them.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "cpu/adam_scalars.h"
#include "cpu/dispatch.h"
#include "cpu/isa.h"

namespace fastedit {
namespace {

using at::Tensor;

constexpr int64_t kPiece = 4096;

template <class T, class G, class A>
struct Row {
  T* param;
  const G* grad;
  A *first, *second;
  AdamScalars<A> scalars;
  double lr;
  int64_t* step;
  A* norm;

  // Sums of squares of the pieces [begin, end).
  void sums(int64_t size, int64_t begin, int64_t end, double* out) const {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = FASTEDIT_SIMD(square_sum, (G, A), grad + i * kPiece, std::min(kPiece, size - i * kPiece));
    }
  }

  void update(int64_t size, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i * kPiece;
      FASTEDIT_SIMD(adam_update, (T, G, A), param + k, grad + k, first + k, second + k, std::min(kPiece, size - k),
                    scalars);
    }
  }

  // Whether the row makes a step, which is counted then.
  bool starts(const std::vector<double>& pieces, const AdamSettings& s) {
    double total = 0;
    for (double piece : pieces) total += piece;
    *norm = static_cast<A>(std::sqrt(total));
    if (!std::isfinite(*norm)) return false;
    *step += 1;
    scalars = adam_scalars<A>(s, lr, static_cast<double>(*step), *norm);
    return true;
  }
};

// Rows one after another, all threads on one row's pieces.
template <class R>
void by_pieces(std::vector<R>& rows, int64_t size, const AdamSettings& s) {
  const int64_t count = (size + kPiece - 1) / kPiece;
  std::vector<double> sums(count);
  for (R& row : rows) {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { row.sums(size, begin, end, sums.data()); });
    if (!row.starts(sums, s)) continue;
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { row.update(size, begin, end); });
  }
}

// A thread for every row.
template <class R>
void by_rows(std::vector<R>& rows, int64_t size, const AdamSettings& s) {
  const int64_t count = (size + kPiece - 1) / kPiece;
  at::parallel_for(0, static_cast<int64_t>(rows.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(count);
    for (int64_t r = begin; r < end; ++r) {
      rows[r].sums(size, 0, count, sums.data());
      if (rows[r].starts(sums, s)) rows[r].update(size, 0, count);
    }
  });
}

template <class T, class G, class A>
void run(Tensor& params, const Tensor& grads, Tensor& first, Tensor& second, Tensor& step, const Tensor& lr,
         const Tensor& active, const AdamSettings& s, Tensor& norm) {
  const auto lr_of = lr.accessor<double, 1>();
  const auto active_of = active.accessor<bool, 1>();
  auto step_of = step.accessor<int64_t, 1>();
  std::vector<Row<T, G, A>> rows;
  for (int64_t b = 0; b < params.size(0); ++b) {
    if (!active_of[b]) continue;
    Row<T, G, A> row{data<T>(params) + b * params.stride(0),
                     data<const G>(grads) + b * grads.stride(0),
                     data<A>(first) + b * first.stride(0),
                     data<A>(second) + b * second.stride(0),
                     {},
                     lr_of[b],
                     &step_of[b],
                     data<A>(norm) + b};
    rows.push_back(row);
  }
  const int64_t threads = at::get_num_threads(), count = static_cast<int64_t>(rows.size());
  const bool even = count >= 4 * threads || count % threads == 0;
  return even ? by_rows(rows, params.size(1), s) : by_pieces(rows, params.size(1), s);
}

Tensor adam_step_(Tensor& params, const Tensor& grads, Tensor& exp_avg, Tensor& exp_avg_sq, Tensor& step,
                  const Tensor& lr, const Tensor& active, double beta1, double beta2, double eps, double weight_decay,
                  std::optional<double> clip, std::optional<double> radius) {
  check_adam_step(params, grads, exp_avg, exp_avg_sq, step, lr, active, beta1, beta2, eps, weight_decay, clip, radius);
  const AdamSettings settings{beta1, beta2, eps, weight_decay, clip, radius};
  Tensor norm = at::zeros({params.size(0)}, exp_avg.options());
  dispatch(params.scalar_type(), "adam_step_", [&]<class T, class A>() {
    const bool same = grads.scalar_type() == params.scalar_type();
    if constexpr (std::is_same_v<T, A>) {
      run<T, T, A>(params, grads, exp_avg, exp_avg_sq, step, lr, active, settings, norm);
    } else if (same) {
      run<T, T, A>(params, grads, exp_avg, exp_avg_sq, step, lr, active, settings, norm);
    } else {
      run<T, A, A>(params, grads, exp_avg, exp_avg_sq, step, lr, active, settings, norm);
    }
  });
  return norm;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastedit, CPU, m) {
  if (best_isa() == Isa::none) return;
  m.impl("adam_step_", adam_step_);
}

}  // namespace fastedit
