// topk_agreement on the CPU: one pass over each row that keeps the first k tokens.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/dispatch.h"
#include "cpu/isa.h"
#include "cpu/simd/topk_agreement.h"

namespace fastedit {
namespace {

using at::Tensor;

template <class T, class A>
void agree(const Tensor& before, const Tensor& after, int64_t k, double* top1, double* ranked) {
  const T *before_data = data<const T>(before), *after_data = data<const T>(after);
  const int64_t V = before.size(1);
  at::parallel_for(0, before.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<A> values(k);
    std::vector<int64_t> first(k), second(k);
    for (int64_t t = begin; t < end; ++t) {
      const bool sound =
          FASTEDIT_SIMD(top_ids, (T, A), before_data + t * before.stride(0), V, k, values.data(), first.data()) &&
          FASTEDIT_SIMD(top_ids, (T, A), after_data + t * after.stride(0), V, k, values.data(), second.data());
      int64_t same = 0;
      for (int64_t i = 0; sound && i < k; ++i) same += first[i] == second[i];
      top1[t] = sound && first[0] == second[0] ? 1 : 0;
      ranked[t] = static_cast<double>(same) / static_cast<double>(k);
    }
  });
}

std::tuple<Tensor, Tensor> topk_agreement(const Tensor& before_in, const Tensor& after_in, int64_t k) {
  check_topk_agreement(before_in, after_in, k);
  const Tensor before = with_unit_stride(before_in), after = with_unit_stride(after_in);
  const auto options = before.options().dtype(at::kDouble);
  Tensor top1 = at::empty({before.size(0)}, options), ranked = at::empty({before.size(0)}, options);
  dispatch(before.scalar_type(), "topk_agreement",
           [&]<class T, class A>() { agree<T, A>(before, after, k, data<double>(top1), data<double>(ranked)); });
  return {top1, ranked};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastedit, CPU, m) {
  if (best_isa() == Isa::none) return;
  m.impl("topk_agreement", topk_agreement);
}

}  // namespace fastedit
