// Checks of arguments at the border of an op: one message form, "op: rule (got name=value, ...)".
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <string>

namespace fastedit {

// TORCH_CHECK_VALUE raises ValueError, which is what the Python side and the references raise.
#define FASTEDIT_CHECK(condition, op, rule, ...) \
  TORCH_CHECK_VALUE(condition, op, ": ", rule, " (got ", __VA_ARGS__, ")")

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
