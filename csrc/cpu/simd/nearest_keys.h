// The pieces of nearest_keys: scores of a block of keys against the best so far of every query.
#pragma once

#include <cstdint>

namespace fastedit {

// The best keys so far of some queries: per query k scores, the best first, and the keys they belong to (-1: none yet).
template <class A>
struct Best {
  int64_t k;
  A* scores;
  int64_t* keys;
  A* last;  // every query's k-th score; what is not above it changes nothing
};

#define FASTEDIT_DECLARE_NEAREST_KEYS(isa)                                                                           \
  namespace isa {                                                                                                    \
  /* out = row, widened; returns its squared norm */                                                                 \
  template <class T, class A>                                                                                        \
  A widened(const T* row, int64_t d, A* out);                                                                        \
  /* Score products (rows, queries) of keys first, first + 1, ... by factor * product - shift (null: 1 and 0) and    \
     take what is better than the last of its query. */                                                              \
  template <class A>                                                                                                 \
  void take_better(const A* products, int64_t stride, int64_t rows, int64_t queries, int64_t first, const A* factor, \
                   const A* shift, const Best<A>& best);                                                             \
  /* sum of squared differences */                                                                                   \
  template <class T, class A>                                                                                        \
  A squared_distance(const T* a, const T* b, int64_t d);                                                             \
  }

FASTEDIT_DECLARE_NEAREST_KEYS(avx2)
FASTEDIT_DECLARE_NEAREST_KEYS(avx512)
#undef FASTEDIT_DECLARE_NEAREST_KEYS

}  // namespace fastedit
