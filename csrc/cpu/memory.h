// Memory of large results.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace fastedit {

// An uninitialised contiguous tensor on the CPU (NaN where torch is told to fill fresh memory), on huge pages where the
// system has them. Memory of a large one is kept when the tensor goes, and the next of about its size gets it: the
// first touch of a plane of logits costs as much as computing what is written there, at every step of every edit.
at::Tensor recycled(at::IntArrayRef sizes, const at::TensorOptions& options);

// Gives kept memory back to the system; returns its bytes.
int64_t release_kept_memory();

}  // namespace fastedit
