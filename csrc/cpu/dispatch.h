// From torch's dtypes to the types the kernels are written for.
#pragma once

#include <ATen/core/Tensor.h>

#include <type_traits>

#include "check.h"
#include "cpu/isa.h"

namespace fastedit {

// Calls body.operator()<T, A>() with the stored type T of the dtype and the type A of its sums.
template <class Body>
void dispatch(at::ScalarType dtype, const char* op, Body&& body) {
  switch (dtype) {
    case at::kFloat:
      return body.template operator()<float, float>();
    case at::kDouble:
      return body.template operator()<double, double>();
    case at::kBFloat16:
      return body.template operator()<BFloat16, float>();
    case at::kHalf:
      return body.template operator()<Float16, float>();
    default:
      FASTEDIT_CHECK(false, op, "the dtype is float32, bfloat16, float16 or float64", "dtype=", dtype);
  }
}

// A tensor's data as the kernels' own types; T const for reading.
template <class T>
T* data(const at::Tensor& tensor) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(tensor.const_data_ptr());
  } else {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
}

// Rows contiguous, any stride between them; the dtype stays.
inline at::Tensor with_unit_stride(const at::Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : x.contiguous();
}

}  // namespace fastedit
