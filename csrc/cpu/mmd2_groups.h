// The groups of mmd2 on the CPU: their rows, what pairs weigh, and a large one's rows packed for Gram tiles.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/mmd2.h"

namespace fastedit::mmd2_groups {

using at::Tensor;

constexpr int64_t kFew = 40;    // rows of a group done from differences
constexpr int64_t kTile = 128;  // rows and columns of a Gram tile
constexpr int64_t kChain = 5;   // terms from one exponential: every squaring doubles its relative error

// Memory that earlier calls left, where it is large: the first touch of some MiB takes longer than filling them again.
template <class A>
struct Buffer {
  Tensor memory;
  A* get() const { return memory.mutable_data_ptr<A>(); }
  A& operator[](int64_t i) const { return get()[i]; }
};

template <class A>
Buffer<A> buffer(int64_t size) {
  return {recycled({size}, at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value))};
}

// Coefficients of one group, in an order that lets squares follow each other.
template <class A>
struct OwnScales {
  std::vector<A> beta;
  std::unique_ptr<bool[]> squared;

  OwnScales(const A* sigma, int64_t count) : beta(count), squared(new bool[count]) {
    for (int64_t q = 0; q < count; ++q) beta[q] = A(0.5) / (sigma[q] * sigma[q]);
    if (std::all_of(beta.begin(), beta.end(), [](A b) { return std::isfinite(b); })) {
      std::sort(beta.begin(), beta.end());
    }
    int64_t chain = kChain;
    for (int64_t q = 0; q < count; ++q) {
      const A close = 4 * std::numeric_limits<A>::epsilon() * beta[q];
      squared[q] = chain < kChain && std::abs(beta[q] - 2 * beta[q - 1]) <= close;
      chain = squared[q] ? chain + 1 : 1;
    }
  }
  Scales<A> view() const { return {static_cast<int64_t>(beta.size()), beta.data(), squared.get()}; }
};

// One group: its rows in x and y and what a pair of rows weighs.
struct Group {
  int64_t x, n, y, m;  // first row and number of rows
  double on_x, on_y, on_xy;

  Group(const int64_t* x_offsets, const int64_t* y_offsets, int64_t g, bool unbiased)
      : x(x_offsets[g]), n(x_offsets[g + 1] - x), y(y_offsets[g]), m(y_offsets[g + 1] - y) {
    on_x = within(n, unbiased), on_y = within(m, unbiased);
    on_xy = -2.0 / (static_cast<double>(n) * static_cast<double>(m));
  }
  static double within(int64_t count, bool unbiased) {
    const double k = static_cast<double>(count);
    return !unbiased ? 1.0 / (k * k) : count > 1 ? 1.0 / (k * (k - 1.0)) : 0.0;
  }
  bool empty() const { return n == 0 || m == 0; }
  bool few() const { return n + m <= kFew; }
  // Weight of an ordered pair of rows of the stack, both in one sample or one in each.
  double pair(bool first_is_y, bool second_is_y) const {
    return first_is_y != second_is_y ? on_xy : first_is_y ? on_y : on_x;
  }
};

// The op's inputs as the kernels read them.
template <class T, class A>
struct Inputs {
  const Tensor &x, &y;
  const A* sigma;
  int64_t scales, sigma_stride;  // stride 0: one set for all groups
  bool unbiased;
  std::vector<Group> groups;

  OwnScales<A> scales_of(int64_t g) const { return OwnScales<A>(sigma + g * sigma_stride, scales); }
  const T* row(const Group& group, int64_t i) const {
    return i < group.n ? data<const T>(x) + (group.x + i) * x.stride(0)
                       : data<const T>(y) + (group.y + i - group.n) * y.stride(0);
  }
  std::vector<const T*> rows(const Group& group) const {
    std::vector<const T*> found(group.n + group.m);
    for (int64_t i = 0; i < group.n + group.m; ++i) found[i] = row(group, i);
    return found;
  }
};

// Calls small(g) or large(g) for every group with rows on both sides. Small groups are shared out to the threads; large
// ones too where there are enough, else all threads work on one after another.
template <class T, class A>
void for_groups(const Inputs<T, A>& in, const std::function<void(int64_t)>& small,
                const std::function<void(int64_t)>& large) {
  std::vector<int64_t> few, many;
  for (int64_t g = 0; g < static_cast<int64_t>(in.groups.size()); ++g) {
    if (!in.groups[g].empty()) (in.groups[g].few() ? few : many).push_back(g);
  }
  const auto share = [](const std::vector<int64_t>& list, const std::function<void(int64_t)>& body) {
    at::parallel_for(0, static_cast<int64_t>(list.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(list[i]);
    });
  };
  share(few, small);
  if (static_cast<int64_t>(many.size()) >= at::get_num_threads()) return share(many, large);
  for (int64_t g : many) large(g);
}

// A large group's rows, x above y, less their mean; the rows in blocks, none of which holds both x and y.
template <class T, class A>
struct Stack {
  struct Block {
    int64_t start, rows, packed;
    bool is_y;
  };
  const Group& group;
  const int64_t d, rows, stride;
  std::vector<Block> blocks;
  Buffer<A> z, norms, packed;

  // packs: for tile()
  Stack(const Inputs<T, A>& in, int64_t g, bool packs = true)
      : group(in.groups[g]),
        d(in.x.size(1)),
        rows(group.n + group.m),
        // one cache line more than a multiple: rows do not meet in the same places of the cache
        stride(padded(d) + 16),
        z(buffer<A>(rows * stride)),
        norms(buffer<A>(rows)) {
    int64_t size = 0;
    for (const auto& [start, stop, is_y] : {std::tuple{int64_t{0}, group.n, false}, std::tuple{group.n, rows, true}}) {
      for (int64_t i = start; i < stop; i += kTile) {
        blocks.push_back({i, std::min(kTile, stop - i), size * d, is_y});
        size += padded(blocks.back().rows);
      }
    }
    packed = buffer<A>(packs ? size * d : 0);
    std::vector<A> centre(d, A(0));
    for (int64_t i = 0; i < rows; ++i) FASTEDIT_SIMD(add_row, (T, A), in.row(group, i), d, centre.data());
    for (A& value : centre) value /= static_cast<A>(rows);
    at::parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const Block& block = blocks[b];
        for (int64_t i = block.start; i < block.start + block.rows; ++i) {
          norms[i] = FASTEDIT_SIMD(centred, (T, A), in.row(group, i), centre.data(), d, z.get() + i * stride);
        }
        if (packs) {
          FASTEDIT_SIMD(pack_transposed, (A), z.get() + block.start * stride, stride, block.rows, d,
                        packed.get() + block.packed);
        }
      }
    });
  }
  int64_t count() const { return static_cast<int64_t>(blocks.size()); }
  // Inner products of two blocks; the diagonal so that its distances are exactly 0.
  Tile<A> tile(int64_t a, int64_t b, A* to) const {
    const Block &left = blocks[a], &right = blocks[b];
    FASTEDIT_SIMD(gemm, (A), z.get() + left.start * stride, stride, left.rows, packed.get() + right.packed, right.rows,
                  d, to, kTile);
    if (a == b) {
      for (int64_t i = 0; i < left.rows; ++i) to[i * kTile + i] = norms[left.start + i];
    }
    return {to, kTile, left.rows, right.rows, norms.get() + left.start, norms.get() + right.start};
  }
};

}  // namespace fastedit::mmd2_groups
