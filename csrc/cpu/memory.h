// Memory of large results.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace fastedit {

// An uninitialised contiguous tensor on the CPU (NaN where torch is told to fill fresh memory), on huge pages where the
// system has them. Memory of a large one is kept when the tensor goes, and the next of about its size gets it: the
// first touch of a plane of logits costs as much as computing what is written there, at every step of every edit.
at::Tensor recycled(at::IntArrayRef sizes, const at::TensorOptions& options);

// Gives kept memory back to the system, and what the C library keeps; returns the bytes of the former.
int64_t release_kept_memory();

// Lets torch take large blocks of memory from those that were freed before, of which so many bytes are kept:
// activations are freed and taken again at every step, and every page of a new block costs a fault when it is first
// touched. For the whole process, until it ends.
void keep_freed_memory(int64_t bytes);

}  // namespace fastedit
