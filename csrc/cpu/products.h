// Matrix products by the faster of the libraries that torch carries.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace fastedit {

// Whether product() has something faster than at::mm for that many rows: on processors that are not Intel's, torch's
// float32 products use AVX2 code, while oneDNN takes the full width of AVX-512.
bool has_fast_product(at::ScalarType dtype, int64_t rows);

// a (n, k) times b (m, k) transposed plus bias (m,): (n, m) by oneDNN, fresh. b of any strides.
at::Tensor product(const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias);

}  // namespace fastedit
