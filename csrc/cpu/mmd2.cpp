// mmd2 on the CPU. A group of few rows is done by one thread from its features' differences, no copy made. A larger one
// is centred, stacked (x above y) and packed once; its Gram matrix is made in tiles, of which only those on and above
// the diagonal are needed, and every tile gets its epilogue while it lies in the cache. mmd2_kept
// leaves the parts of the pairs' weights: its backward makes no Gram matrix.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/dispatch.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/mmd2_groups.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/mmd2.h"

namespace fastedit {
namespace {

using at::Tensor;
using namespace mmd2_groups;

constexpr int64_t kStrip = 8;               // rows of kept parts written at a time
constexpr int64_t kBandBytes = 64LL << 20;  // weights kept at a time

// The four rectangles of a small group's distances: x with x, x with y, y with x, y with y.
template <class Body>
void for_rectangles(const Group& group, const Body& body) {
  const std::array<std::array<int64_t, 2>, 2> sides{{{0, group.n}, {group.n, group.m}}};
  for (int a = 0; a < 2; ++a) {
    for (int b = 0; b < 2; ++b) body(sides[a][0], sides[a][1], sides[b][0], sides[b][1], group.pair(a, b), a == b);
  }
}

template <class T, class A>
void forward_few(const Inputs<T, A>& in, int64_t g, A* value, A* env) {
  const Group& group = in.groups[g];
  const OwnScales<A> scales = in.scales_of(g);
  const std::vector<const T*> rows = in.rows(group);
  std::array<A, kFew * kFew> D;
  FASTEDIT_SIMD(distances, (T, A), rows.data(), group.n + group.m, in.x.size(1), D.data(), kFew);
  double total = 0, slope = 0;
  for_rectangles(group, [&](int64_t i, int64_t rows_i, int64_t j, int64_t rows_j, double weight, bool within) {
    if (j < i) return;  // y with x is x with y
    const Tile<A> tile{D.data() + i * kFew + j, kFew, rows_i, rows_j, nullptr, nullptr};
    double sums[2] = {0, 0};
    FASTEDIT_SIMD(kernel_sums, (A), tile, scales.view(), sums);
    if (within && in.unbiased) sums[0] -= static_cast<double>(in.scales * rows_i);
    total += weight * sums[0], slope += weight * sums[1];
  });
  value[g] = static_cast<A>(total), env[g] = static_cast<A>(slope);
}

template <class T, class A>
void backward_few(const Inputs<T, A>& in, int64_t g, A on_value, A on_env, T* const* out) {
  const Group& group = in.groups[g];
  const OwnScales<A> scales = in.scales_of(g);
  const std::vector<const T*> rows = in.rows(group);
  std::array<A, kFew * kFew> W;
  FASTEDIT_SIMD(distances, (T, A), rows.data(), group.n + group.m, in.x.size(1), W.data(), kFew);
  for_rectangles(group, [&](int64_t i, int64_t rows_i, int64_t j, int64_t rows_j, double weight, bool within) {
    const Tile<A> tile{W.data() + i * kFew + j, kFew, rows_i, rows_j, nullptr, nullptr};
    const A factor = static_cast<A>((within ? 4 : 2) * weight);
    FASTEDIT_SIMD(kernel_weights, (A), tile, scales.view(), Upstream<A>{on_value, on_env, factor});
  });
  FASTEDIT_SIMD(pull, (T, A), rows.data(), group.n + group.m, in.x.size(1), W.data(), kFew, out);
}

// Parts are kept of all pairs of a group's rows in one square: kappa' on and above the diagonal, D kappa'' below it.
// Sums of a tile whose first pair is (i, j), whose parts are kept there; space holds a tile.
template <class A>
void keep(A* kept, int64_t stride, int64_t i, int64_t j, const Tile<A>& tile, const Scales<A>& scales, double* sums,
          A* space) {
  A* slopes = kept + i * stride + j;
  if (i != j) {
    FASTEDIT_SIMD(kernel_parts, (A), tile, scales, sums, Parts<A>{slopes, stride, space, kTile});
    // few rows of the square at a time: whole lines of the cache are written
    for (int64_t k = 0; k < tile.columns; k += kStrip) {
      FASTEDIT_SIMD(transpose, (A), space + k, kTile, tile.rows, std::min(kStrip, tile.columns - k),
                    kept + (j + k) * stride + i, stride);
    }
    return;
  }
  FASTEDIT_SIMD(kernel_parts, (A), tile, scales, sums, Parts<A>{tile.values, kTile, space, kTile});
  for (int64_t k = 0; k < tile.rows; ++k) {
    std::copy_n(space + k * kTile, k, slopes + k * stride);
    std::copy_n(tile.values + k * kTile + k, tile.columns - k, slopes + k * stride + k);
  }
}

// The weights W(D) of a tile whose first pair is (i, j), from what keep() left.
template <class A>
void weigh(const A* kept, int64_t stride, int64_t i, int64_t j, const Tile<A>& tile, const Upstream<A>& upstream,
           A* space) {
  // (j, i) has the other part
  const A* here = kept + i * stride + j;
  FASTEDIT_SIMD(transpose, (A), kept + j * stride + i, stride, tile.columns, tile.rows, space, kTile);
  const Parts<const A> parts =
      i <= j ? Parts<const A>{here, stride, space, kTile} : Parts<const A>{space, kTile, here, stride};
  FASTEDIT_SIMD(weights_of_parts, (A), tile, parts, upstream);
  if (i != j) return;
  // above the diagonal they are right
  for (int64_t k = 0; k < tile.rows; ++k) {
    tile.values[k * tile.stride + k] = 0;
    for (int64_t l = 0; l < k; ++l) tile.values[k * tile.stride + l] = tile.values[l * tile.stride + k];
  }
}

// kept: where the parts of the pairs go, or null.
template <class T, class A>
void forward_large(const Inputs<T, A>& in, int64_t g, A* value, A* env, A* kept) {
  const Stack<T, A> stack(in, g);
  const OwnScales<A> scales = in.scales_of(g);
  std::vector<std::array<int64_t, 2>> pairs;
  for (int64_t a = 0; a < stack.count(); ++a) {
    for (int64_t b = a; b < stack.count(); ++b) pairs.push_back({a, b});
  }
  std::vector<std::array<double, 2>> sums(pairs.size(), {0, 0});
  at::parallel_for(0, static_cast<int64_t>(pairs.size()), 1, [&](int64_t begin, int64_t end) {
    const Buffer<A> space = buffer<A>(kTile * kTile), bends = buffer<A>(kept == nullptr ? 0 : kTile * kTile);
    for (int64_t i = begin; i < end; ++i) {
      const auto [a, b] = pairs[i];
      const Tile<A> tile = stack.tile(a, b, space.get());
      if (kept == nullptr) {
        FASTEDIT_SIMD(kernel_sums, (A), tile, scales.view(), sums[i].data());
      } else {
        keep(kept, stack.rows, stack.blocks[a].start, stack.blocks[b].start, tile, scales.view(), sums[i].data(),
             bends.get());
      }
    }
  });
  double total = 0, slope = 0;
  for (size_t i = 0; i < pairs.size(); ++i) {
    const auto [a, b] = pairs[i];
    const auto &left = stack.blocks[a], &right = stack.blocks[b];
    if (a == b && in.unbiased) sums[i][0] -= static_cast<double>(in.scales * left.rows);
    // a tile above the diagonal stands for the one below as well; x with y is not counted twice
    const double weight = stack.group.pair(left.is_y, right.is_y) * (a != b && left.is_y == right.is_y ? 2 : 1);
    total += weight * sums[i][0], slope += weight * sums[i][1];
  }
  value[g] = static_cast<A>(total), env[g] = static_cast<A>(slope);
}

// A large group's features as the right side of a product with weights of pairs, and what it gives.
template <class T, class A>
struct Pull {
  const Stack<T, A>& stack;
  T* const* out;
  const int64_t w_stride;
  Buffer<A> columns;

  Pull(const Stack<T, A>& stack, T* const* out)
      : stack(stack), out(out), w_stride(padded(stack.rows) + 16), columns(buffer<A>(stack.rows * padded(stack.d))) {
    at::parallel_for(0, stack.count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const auto& block = stack.blocks[b];
        FASTEDIT_SIMD(pack_columns, (A), stack.z.get() + block.start * stack.stride, stack.stride, block.start,
                      block.rows, stack.rows, stack.d, columns.get());
      }
    });
  }
  // The gradients of a block's rows from their weights; product holds the rows.
  void rows(const typename Stack<T, A>::Block& block, const A* w, A* product) const {
    const int64_t d = stack.d;
    FASTEDIT_SIMD(gemm, (A), w, w_stride, block.rows, columns.get(), d, stack.rows, product, padded(d));
    for (int64_t i = 0; i < block.rows; ++i) {
      FASTEDIT_SIMD(finish, (T, A), stack.z.get() + (block.start + i) * stack.stride, w + i * w_stride, stack.rows,
                    product + i * padded(d), d, out[block.start + i]);
    }
  }
  // What a pair of two blocks' rows weighs beside its kernel.
  A factor(int64_t a, int64_t b) const {
    const bool first = stack.blocks[a].is_y, second = stack.blocks[b].is_y;
    return static_cast<A>((first == second ? 4 : 2) * stack.group.pair(first, second));
  }
};

// Gradients of one group: weights of all pairs of rows band by band, then one product with the features.
template <class T, class A>
void backward_large(const Inputs<T, A>& in, int64_t g, A on_value, A on_env, T* const* out) {
  const Stack<T, A> stack(in, g);
  const OwnScales<A> scales = in.scales_of(g);
  const Pull<T, A> pull(stack, out);
  const int64_t w_stride = pull.w_stride;
  // in a band of all rows a tile above the diagonal gives the one below too
  const int64_t fitting = kBandBytes / (w_stride * kTile * static_cast<int64_t>(sizeof(A)));
  const int64_t band_blocks = std::clamp<int64_t>(fitting, 1, stack.count());
  const bool symmetric = band_blocks == stack.count();
  const Buffer<A> weights = buffer<A>(std::min(band_blocks * kTile, stack.rows) * w_stride);
  for (int64_t first = 0; first < stack.count(); first += band_blocks) {
    const int64_t last = std::min(first + band_blocks, stack.count()), origin = stack.blocks[first].start;
    std::vector<std::array<int64_t, 2>> pairs;
    for (int64_t a = first; a < last; ++a) {
      for (int64_t b = symmetric ? a : 0; b < stack.count(); ++b) pairs.push_back({a, b});
    }
    at::parallel_for(0, static_cast<int64_t>(pairs.size()), 1, [&](int64_t begin, int64_t end) {
      const Buffer<A> space = buffer<A>(kTile * kTile);
      for (int64_t i = begin; i < end; ++i) {
        const auto [a, b] = pairs[i];
        const auto &left = stack.blocks[a], &right = stack.blocks[b];
        const Tile<A> tile = stack.tile(a, b, space.get());
        FASTEDIT_SIMD(kernel_weights, (A), tile, scales.view(), Upstream<A>{on_value, on_env, pull.factor(a, b)});
        if (a == b) {
          for (int64_t k = 0; k < left.rows; ++k) space[k * kTile + k] = 0;
        }
        A* to = weights.get() + (left.start - origin) * w_stride + right.start;
        for (int64_t k = 0; k < left.rows; ++k) {
          std::memcpy(to + k * w_stride, space.get() + k * kTile, right.rows * sizeof(A));
        }
        if (symmetric && a != b) {
          FASTEDIT_SIMD(transpose, (A), space.get(), kTile, left.rows, right.rows,
                        weights.get() + right.start * w_stride + left.start, w_stride);
        }
      }
    });
    at::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
      const Buffer<A> product = buffer<A>(kTile * padded(stack.d));
      for (int64_t b = begin; b < end; ++b) {
        const auto& block = stack.blocks[b];
        pull.rows(block, weights.get() + (block.start - origin) * w_stride, product.get());
      }
    });
  }
}

// The same from the parts that the forward kept: a block's weights are multiplied while they lie in the cache.
template <class T, class A>
void backward_kept(const Inputs<T, A>& in, A on_value, A on_env, const A* kept, T* const* out) {
  const Stack<T, A> stack(in, 0, false);
  const Pull<T, A> pull(stack, out);
  at::parallel_for(0, stack.count(), 1, [&](int64_t begin, int64_t end) {
    const Buffer<A> space = buffer<A>(kTile * kTile), weights = buffer<A>(kTile * pull.w_stride);
    const Buffer<A> product = buffer<A>(kTile * padded(stack.d));
    for (int64_t a = begin; a < end; ++a) {
      const auto& left = stack.blocks[a];
      for (int64_t b = 0; b < stack.count(); ++b) {
        const auto& right = stack.blocks[b];
        const Tile<A> tile{weights.get() + right.start, pull.w_stride, left.rows, right.rows, nullptr, nullptr};
        const Upstream<A> upstream{on_value, on_env, pull.factor(a, b)};
        weigh(kept, stack.rows, left.start, right.start, tile, upstream, space.get());
      }
      pull.rows(left, weights.get(), product.get());
    }
  });
}

// Checks the offsets and calls body.operator()<T, A>(inputs).
template <class Body>
void with_inputs(const Tensor& x_in, const Tensor& y_in, const Tensor& x_offsets_in, const Tensor& y_offsets_in,
                 const Tensor& bandwidths, bool unbiased, Body&& body) {
  const Tensor x_offsets_there = x_offsets_in.contiguous(), y_offsets_there = y_offsets_in.contiguous();
  const int64_t* x_offsets =
      checked_offsets(x_offsets_there, x_in.size(0), "mmd2", "x_offsets", "the rows of x", "rows");
  const int64_t* y_offsets =
      checked_offsets(y_offsets_there, y_in.size(0), "mmd2", "y_offsets", "the rows of y", "rows");
  const Tensor x = with_unit_stride(x_in), y = with_unit_stride(y_in);
  dispatch(x.scalar_type(), "mmd2", [&]<class T, class A>() {
    const Tensor sigma = bandwidths.to(c10::CppTypeToScalarType<A>::value).contiguous();
    const int64_t scales = sigma.size(-1);
    Inputs<T, A> inputs{x, y, sigma.template const_data_ptr<A>(), scales, sigma.dim() == 1 ? 0 : scales, unbiased, {}};
    for (int64_t g = 0; g + 1 < x_offsets_there.numel(); ++g) {
      inputs.groups.emplace_back(x_offsets, y_offsets, g, unbiased);
    }
    body.template operator()<T, A>(inputs);
  });
}

std::tuple<Tensor, Tensor> mmd2(const Tensor& x, const Tensor& y, const Tensor& x_offsets, const Tensor& y_offsets,
                                const Tensor& bandwidths, bool unbiased) {
  check_mmd2(x, y, x_offsets, y_offsets, bandwidths);
  Tensor value = at::zeros({x_offsets.numel() - 1}, x.options().dtype(accumulation_type(x.scalar_type())));
  Tensor env = at::zeros_like(value);
  with_inputs(x, y, x_offsets, y_offsets, bandwidths, unbiased, [&]<class T, class A>(const Inputs<T, A>& in) {
    A *value_data = value.mutable_data_ptr<A>(), *env_data = env.mutable_data_ptr<A>();
    for_groups<T, A>(
        in, [&](int64_t g) { forward_few(in, g, value_data, env_data); },
        [&](int64_t g) { forward_large(in, g, value_data, env_data, static_cast<A*>(nullptr)); });
  });
  return {value, env};
}

std::tuple<Tensor, Tensor, Tensor> mmd2_kept(const Tensor& x, const Tensor& y, const Tensor& x_offsets,
                                             const Tensor& y_offsets, const Tensor& bandwidths, bool unbiased) {
  check_mmd2_kept(x, y, x_offsets, y_offsets, bandwidths);
  const int64_t rows = x.size(0) + y.size(0);
  Tensor value = at::zeros({1}, x.options().dtype(accumulation_type(x.scalar_type())));
  Tensor env = at::zeros_like(value), pairs = recycled({rows, rows}, value.options());
  with_inputs(x, y, x_offsets, y_offsets, bandwidths, unbiased, [&]<class T, class A>(const Inputs<T, A>& in) {
    if (in.groups[0].empty()) {
      pairs.zero_();
      return;
    }
    forward_large(in, 0, value.mutable_data_ptr<A>(), env.mutable_data_ptr<A>(), pairs.mutable_data_ptr<A>());
  });
  return {value, env, pairs};
}

// pairs: what mmd2_kept left, or null.
std::tuple<Tensor, Tensor> gradients(const Tensor& grad_value_in, const Tensor& grad_env_in, const Tensor& x,
                                     const Tensor& y, const Tensor& x_offsets, const Tensor& y_offsets,
                                     const Tensor& bandwidths, const Tensor* pairs, bool unbiased) {
  Tensor grad_x = x.new_empty(x.sizes()), grad_y = y.new_empty(y.sizes());
  const at::ScalarType wide = accumulation_type(x.scalar_type());
  const Tensor grad_value = grad_value_in.to(wide).contiguous(), grad_env = grad_env_in.to(wide).contiguous();
  const Tensor kept = pairs == nullptr ? Tensor() : pairs->contiguous();
  with_inputs(x, y, x_offsets, y_offsets, bandwidths, unbiased, [&]<class T, class A>(const Inputs<T, A>& in) {
    const int64_t d = x.size(1);
    T *x_data = data<T>(grad_x), *y_data = data<T>(grad_y);
    const A *on_value = grad_value.const_data_ptr<A>(), *on_env = grad_env.const_data_ptr<A>();
    for (const Group& group : in.groups) {
      // nothing to compare: all bits zero is 0 in every dtype
      if (!group.empty()) continue;
      std::fill_n(reinterpret_cast<char*>(x_data + group.x * d), group.n * d * sizeof(T), 0);
      std::fill_n(reinterpret_cast<char*>(y_data + group.y * d), group.m * d * sizeof(T), 0);
    }
    const auto out = [&](int64_t g) {
      const Group& group = in.groups[g];
      std::vector<T*> rows(group.n + group.m);
      for (int64_t i = 0; i < group.n; ++i) rows[i] = x_data + (group.x + i) * d;
      for (int64_t i = 0; i < group.m; ++i) rows[group.n + i] = y_data + (group.y + i) * d;
      return rows;
    };
    if (pairs != nullptr) {
      if (!in.groups[0].empty()) backward_kept(in, *on_value, *on_env, kept.const_data_ptr<A>(), out(0).data());
      return;
    }
    for_groups<T, A>(
        in, [&](int64_t g) { backward_few(in, g, on_value[g], on_env[g], out(g).data()); },
        [&](int64_t g) { backward_large(in, g, on_value[g], on_env[g], out(g).data()); });
  });
  return {grad_x, grad_y};
}

std::tuple<Tensor, Tensor> mmd2_backward(const Tensor& grad_value, const Tensor& grad_env, const Tensor& x,
                                         const Tensor& y, const Tensor& x_offsets, const Tensor& y_offsets,
                                         const Tensor& bandwidths, bool unbiased) {
  check_mmd2(x, y, x_offsets, y_offsets, bandwidths);
  check_mmd2_upstream(grad_value, grad_env, x, x_offsets);
  return gradients(grad_value, grad_env, x, y, x_offsets, y_offsets, bandwidths, nullptr, unbiased);
}

std::tuple<Tensor, Tensor> mmd2_kept_backward(const Tensor& grad_value, const Tensor& grad_env, const Tensor& x,
                                              const Tensor& y, const Tensor& x_offsets, const Tensor& y_offsets,
                                              const Tensor& bandwidths, const Tensor& pairs, bool unbiased) {
  check_mmd2_kept(x, y, x_offsets, y_offsets, bandwidths);
  check_mmd2_upstream(grad_value, grad_env, x, x_offsets);
  check_mmd2_pairs(pairs, x, y);
  return gradients(grad_value, grad_env, x, y, x_offsets, y_offsets, bandwidths, &pairs, unbiased);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastedit, CPU, m) {
  if (best_isa() == Isa::none) return;
  m.impl("mmd2", mmd2);
  m.impl("mmd2_backward", mmd2_backward);
  m.impl("mmd2_kept", mmd2_kept);
  m.impl("mmd2_kept_backward", mmd2_kept_backward);
}

}  // namespace fastedit
