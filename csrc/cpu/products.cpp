#include "cpu/products.h"

#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <string_view>

#include "cpu/isa.h"

namespace fastedit {
namespace {

constexpr int64_t kFewRows = 8;

using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                             c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);

// torch's own op over oneDNN; it is not there in every build.
const std::optional<c10::OperatorHandle>& handle() {
  static const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  return found;
}

}  // namespace

bool has_fast_product(at::ScalarType dtype, int64_t rows) {
  static const bool slow = best_isa() == Isa::avx512 && std::string_view(processor_vendor()) != "intel";
  return slow && dtype == at::kFloat && rows >= kFewRows && current_isa() == Isa::avx512 && handle().has_value();
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias) {
  static const auto op = handle()->typed<Signature>();
  return op.call(a, b, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

}  // namespace fastedit
