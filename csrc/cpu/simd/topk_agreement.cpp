#include "cpu/simd/topk_agreement.h"

#include "cpu/simd/vec.h"

namespace fastedit::FASTEDIT_ISA {

namespace {

// Vectors whose maximum is compared with the k-th value at once: few blocks hold a candidate.
constexpr int kVectors = 4;

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// Inserts a value behind all that are not smaller; ids come in rising order.
template <class A>
FASTEDIT_INLINE void insert(A value, int64_t id, int64_t k, A* values, int64_t* ids) {
  int64_t place = k - 1;
  for (; place > 0 && values[place - 1] < value; --place) {
    values[place] = values[place - 1];
    ids[place] = ids[place - 1];
  }
  values[place] = value;
  ids[place] = id;
}

}  // namespace

template <class T, class A>
bool top_ids(const T* logits, int64_t V, int64_t k, A* values, int64_t* ids) {
  using Lanes = Vec<A>;
  constexpr int64_t block = kVectors * Lanes::width;
  const Lanes infinity = Lanes::set(kInfinity<A>);
  for (int64_t i = 0; i < k; ++i) {
    values[i] = -kInfinity<A>;
    ids[i] = i;
  }
  int64_t filled = 0;
  for (int64_t start = 0; start < V; start += block) {
    const int64_t n = V - start < block ? V - start : block;
    A lanes[block];
    Lanes top = Lanes::set(-kInfinity<A>);
    for (int64_t j = 0; j < n; j += Lanes::width) {
      const Lanes own = n == block ? Lanes::load(logits + start + j)
                                   : first(Lanes::set(-kInfinity<A>), Lanes::load(logits + start + j, n - j), n - j);
      own.store(lanes + j);
      // min returns its second where the first is NaN: such a block is looked into
      top = max(min(own, infinity), top);
    }
    const A best = largest(top);
    if (filled == k && best <= values[k - 1] && best < kInfinity<A>) continue;
    for (int64_t j = 0; j < n; ++j) {
      const A value = lanes[j];
      if (value != value) return false;
      if (filled < k) {
        insert(value, start + j, ++filled, values, ids);
      } else if (value > values[k - 1]) {
        insert(value, start + j, k, values, ids);
      }
    }
  }
  return true;
}

#define FASTEDIT_INSTANTIATE(T, A) template bool top_ids<T, A>(const T*, int64_t, int64_t, A*, int64_t*);
FASTEDIT_INSTANTIATE(float, float)
FASTEDIT_INSTANTIATE(BFloat16, float)
FASTEDIT_INSTANTIATE(Float16, float)
FASTEDIT_INSTANTIATE(double, double)
#undef FASTEDIT_INSTANTIATE

}  // namespace fastedit::FASTEDIT_ISA
