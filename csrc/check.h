// Checks of arguments at the border of an op: one message form, "op: rule (got name=value, ...)".
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <charconv>
#include <string>

namespace fastedit {

// TORCH_CHECK_VALUE raises ValueError, which is what the Python side and the references raise. Nothing of the message
// is made where the condition holds.
#define FASTEDIT_CHECK(condition, op, rule, ...) \
  TORCH_CHECK_VALUE(condition, op, ": ", rule, " (got ", __VA_ARGS__, ")")

// As Python writes them: (2, 3), torch.float32, 0.5.
inline std::string shown(at::IntArrayRef sizes) {
  std::string text = "(";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}
inline std::string shown(at::ScalarType dtype) {
  return "torch." + std::string(c10::getDtypeNames(dtype).first);
}
inline std::string shown(double number) {
  char digits[32];
  std::string text(digits, std::to_chars(digits, digits + sizeof(digits), number).ptr);
  return text.find_first_not_of("-0123456789") == std::string::npos ? text + ".0" : text;
}

inline bool is_floating(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}
// The dtype of sums.
inline at::ScalarType accumulation_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_floating(const at::Tensor& tensor, const char* op, const char* name) {
  FASTEDIT_CHECK(is_floating(tensor.scalar_type()), op, std::string(name) + " is float32, bfloat16, float16 or float64",
                 name, "=", shown(tensor.scalar_type()));
}

// A tensor of that dtype and shape, on the device of the features.
inline void check_tensor(const at::Tensor& tensor, const char* op, const char* name, at::ScalarType dtype,
                         at::IntArrayRef sizes, at::Device device) {
  FASTEDIT_CHECK(tensor.scalar_type() == dtype && tensor.sizes() == sizes, op,
                 std::string(name) + " is " + shown(dtype).substr(6) + " of shape " + shown(sizes), name, "=",
                 shown(tensor.scalar_type()), " ", shown(tensor.sizes()));
  FASTEDIT_CHECK(tensor.device() == device, op, std::string(name) + " is on the device of the features", name, "=",
                 tensor.device(), ", features=", device);
}
inline void check_index(const at::Tensor& tensor, const char* op, const char* name, int64_t length, at::Device device) {
  check_tensor(tensor, op, name, at::kLong, length, device);
}

// Ragged groups: offsets rise from 0 to the number of rows. Returns a host pointer to them.
inline const int64_t* checked_offsets(const at::Tensor& offsets, int64_t rows, const char* op, const char* name,
                                      const char* what, const char* rows_name) {
  const int64_t* values = offsets.const_data_ptr<int64_t>();
  const int64_t groups = offsets.numel() - 1;
  bool rising = groups >= 0 && values[0] == 0 && values[groups] == rows;
  for (int64_t g = 0; rising && g < groups; ++g) rising = values[g] <= values[g + 1];
  if (!rising) {
    std::string listed;
    for (int64_t g = 0; g <= groups; ++g) listed += (g ? ", " : "") + std::to_string(values[g]);
    TORCH_CHECK_VALUE(false, op, ": ", name, " rise from 0 to ", what, " (got ", name, "=[", listed, "], ", rows_name,
                      "=", rows, ")");
  }
  return values;
}

}  // namespace fastedit
