// The first tokens of one row of logits.
#pragma once

#include <cstdint>

namespace fastedit {

#define FASTEDIT_DECLARE_TOP_IDS(isa)                                                                                \
  namespace isa {                                                                                                    \
  /* ids (k) of the largest logits (V), best first, equal ones by id; values (k) is room. False where one is NaN. */ \
  template <class T, class A>                                                                                        \
  bool top_ids(const T* logits, int64_t V, int64_t k, A* values, int64_t* ids);                                      \
  }

FASTEDIT_DECLARE_TOP_IDS(avx2)
FASTEDIT_DECLARE_TOP_IDS(avx512)
#undef FASTEDIT_DECLARE_TOP_IDS

}  // namespace fastedit
