// Fresh memory of large results.
#pragma once

#include <ATen/core/Tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace fastedit {

// Asks for huge pages under a tensor that was just allocated and not yet touched: a plane of logits is thousands of
// small pages, whose first touch costs more than computing what is written there. The rest of a page at either end
// stays small.
inline void prefer_huge_pages([[maybe_unused]] const at::Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + fresh.nbytes()) / page * page;
  // a refusal changes nothing but the speed
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastedit
