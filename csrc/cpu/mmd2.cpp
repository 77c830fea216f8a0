// mmd2 on the CPU. A group of few rows is done by one thread from its features' differences, no copy made. A larger one
// is centred, stacked (x above y) and packed once; its Gram matrix is made in tiles, of which only those on and above
// the diagonal are needed, and every tile gets its epilogue while it lies in the cache.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/dispatch.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/mmd2.h"

namespace fastedit {
namespace {

using at::Tensor;

constexpr int64_t kFew = 40;                // rows of a group done from differences
constexpr int64_t kTile = 128;              // rows and columns of a Gram tile
constexpr int64_t kChain = 5;               // terms from one exponential: every squaring doubles its relative error
constexpr int64_t kBandBytes = 64LL << 20;  // weights kept at a time

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

  Stack(const Inputs<T, A>& in, int64_t g)
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
    packed = buffer<A>(size * d);
    std::vector<A> centre(d, A(0));
    for (int64_t i = 0; i < rows; ++i) FASTEDIT_SIMD(add_row, (T, A), in.row(group, i), d, centre.data());
    for (A& value : centre) value /= static_cast<A>(rows);
    at::parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const Block& block = blocks[b];
        for (int64_t i = block.start; i < block.start + block.rows; ++i) {
          norms[i] = FASTEDIT_SIMD(centred, (T, A), in.row(group, i), centre.data(), d, z.get() + i * stride);
        }
        FASTEDIT_SIMD(pack_transposed, (A), z.get() + block.start * stride, stride, block.rows, d,
                      packed.get() + block.packed);
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

template <class T, class A>
void forward_large(const Inputs<T, A>& in, int64_t g, A* value, A* env) {
  const Stack<T, A> stack(in, g);
  const OwnScales<A> scales = in.scales_of(g);
  std::vector<std::array<int64_t, 2>> pairs;
  for (int64_t a = 0; a < stack.count(); ++a) {
    for (int64_t b = a; b < stack.count(); ++b) pairs.push_back({a, b});
  }
  std::vector<std::array<double, 2>> sums(pairs.size(), {0, 0});
  at::parallel_for(0, static_cast<int64_t>(pairs.size()), 1, [&](int64_t begin, int64_t end) {
    const Buffer<A> space = buffer<A>(kTile * kTile);
    for (int64_t i = begin; i < end; ++i) {
      const auto [a, b] = pairs[i];
      FASTEDIT_SIMD(kernel_sums, (A), stack.tile(a, b, space.get()), scales.view(), sums[i].data());
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

// Gradients of one group: weights of all pairs of rows band by band, then one product with the features.
template <class T, class A>
void backward_large(const Inputs<T, A>& in, int64_t g, A on_value, A on_env, T* const* out) {
  const Stack<T, A> stack(in, g);
  const OwnScales<A> scales = in.scales_of(g);
  const int64_t rows = stack.rows, d = stack.d, w_stride = padded(rows) + 16;
  const Buffer<A> columns = buffer<A>(rows * padded(d));
  at::parallel_for(0, stack.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const auto& block = stack.blocks[b];
      FASTEDIT_SIMD(pack_columns, (A), stack.z.get() + block.start * stack.stride, stack.stride, block.start,
                    block.rows, rows, d, columns.get());
    }
  });
  // in a band of all rows a tile above the diagonal gives the one below too
  const int64_t fitting = kBandBytes / (w_stride * kTile * static_cast<int64_t>(sizeof(A)));
  const int64_t band_blocks = std::clamp<int64_t>(fitting, 1, stack.count());
  const bool symmetric = band_blocks == stack.count();
  const Buffer<A> weights = buffer<A>(std::min(band_blocks * kTile, rows) * w_stride);
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
        const A factor = static_cast<A>((left.is_y == right.is_y ? 4 : 2) * stack.group.pair(left.is_y, right.is_y));
        FASTEDIT_SIMD(kernel_weights, (A), tile, scales.view(), Upstream<A>{on_value, on_env, factor});
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
      const Buffer<A> product = buffer<A>(kTile * padded(d));
      for (int64_t b = begin; b < end; ++b) {
        const auto& block = stack.blocks[b];
        const A* w = weights.get() + (block.start - origin) * w_stride;
        FASTEDIT_SIMD(gemm, (A), w, w_stride, block.rows, columns.get(), d, rows, product.get(), padded(d));
        for (int64_t i = 0; i < block.rows; ++i) {
          FASTEDIT_SIMD(finish, (T, A), stack.z.get() + (block.start + i) * stack.stride, w + i * w_stride, rows,
                        product.get() + i * padded(d), d, out[block.start + i]);
        }
      }
    });
  }
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
        [&](int64_t g) { forward_large(in, g, value_data, env_data); });
  });
  return {value, env};
}

std::tuple<Tensor, Tensor> mmd2_backward(const Tensor& grad_value_in, const Tensor& grad_env_in, const Tensor& x,
                                         const Tensor& y, const Tensor& x_offsets, const Tensor& y_offsets,
                                         const Tensor& bandwidths, bool unbiased) {
  check_mmd2(x, y, x_offsets, y_offsets, bandwidths);
  check_mmd2_upstream(grad_value_in, grad_env_in, x, x_offsets);
  Tensor grad_x = x.new_empty(x.sizes()), grad_y = y.new_empty(y.sizes());
  const at::ScalarType wide = accumulation_type(x.scalar_type());
  const Tensor grad_value = grad_value_in.to(wide).contiguous(), grad_env = grad_env_in.to(wide).contiguous();
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
    for_groups<T, A>(
        in, [&](int64_t g) { backward_few(in, g, on_value[g], on_env[g], out(g).data()); },
        [&](int64_t g) { backward_large(in, g, on_value[g], on_env[g], out(g).data()); });
  });
  return {grad_x, grad_y};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastedit, CPU, m) {
  if (best_isa() == Isa::none) return;
  m.impl("mmd2", mmd2);
  m.impl("mmd2_backward", mmd2_backward);
}

}  // namespace fastedit
