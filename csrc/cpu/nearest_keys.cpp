// nearest_keys on the CPU: blocks of keys times all queries, whose scores are compared with every query's k-th best
// while they lie in the cache. Queries are packed once; keys are read once by every thread that needs them.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <string_view>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "cpu/dispatch.h"
#include "cpu/isa.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/low_rank.h"
#include "cpu/simd/nearest_keys.h"

namespace fastedit {
namespace {

using at::Tensor;

constexpr int64_t kKeys = 128;      // keys of a block
constexpr int64_t kQueries = 256;   // queries scored at a time
constexpr int64_t kFewQueries = 8;  // up to so many, products run along the features: packing would cost more

enum class Metric { dot, cosine, l2 };

// The best keys of all queries among some of the keys.
template <class A>
struct Found {
  std::vector<A> scores, last;
  std::vector<int64_t> keys;

  Found(int64_t queries, int64_t k)
      : scores(queries * k, -std::numeric_limits<A>::infinity()),
        last(queries, -std::numeric_limits<A>::infinity()),
        keys(queries * k, -1) {}
  Best<A> from(int64_t query, int64_t k) {
    return {k, scores.data() + query * k, keys.data() + query * k, last.data() + query};
  }
};

template <class T, class A>
struct Search {
  const T *queries, *keys;
  int64_t query_stride, key_stride, Q, K, d, k;
  Metric metric;
  std::vector<A> rows;           // queries, widened (and of length one)
  std::vector<A> query_squares;  // squared lengths
  std::unique_ptr<A[]> packed;

  Search(const Tensor& q, const Tensor& all, int64_t count, Metric by)
      : queries(data<const T>(q)),
        keys(data<const T>(all)),
        query_stride(q.stride(0)),
        key_stride(all.stride(0)),
        Q(q.size(0)),
        K(all.size(0)),
        d(q.size(1)),
        k(count),
        metric(by),
        rows(Q * d),
        query_squares(Q) {
    for (int64_t i = 0; i < Q; ++i) {
      A* row = rows.data() + i * d;
      query_squares[i] = FASTEDIT_SIMD(widened, (T, A), queries + i * query_stride, d, row);
      if (metric == Metric::cosine) {
        const A factor = inverse_length(query_squares[i]);
        for (int64_t j = 0; j < d; ++j) row[j] *= factor;
      }
    }
    if (Q <= kFewQueries) return;
    packed.reset(new A[padded(Q) * d]);
    FASTEDIT_SIMD(pack_transposed, (A), rows.data(), d, Q, d, packed.get());
  }

  // A NaN length stays one.
  static A inverse_length(A square) {
    const A length = std::sqrt(square);
    return 1 / (length < A(1e-12) ? A(1e-12) : length);
  }

  // factor * product - shift ranks the keys of a block: inner product, cosine, or 2 <q, k> - |k|^2.
  void block_factors(const A* squares, int64_t count, A* factor, A* shift) const {
    for (int64_t i = 0; i < count; ++i) {
      factor[i] = metric == Metric::cosine ? inverse_length(squares[i]) : metric == Metric::l2 ? A(2) : A(1);
      shift[i] = metric == Metric::l2 ? squares[i] : A(0);
    }
  }

  // Keys [begin, end) for queries [first, last).
  void scan(int64_t begin, int64_t end, int64_t first, int64_t last, Found<A>& found) const {
    const int64_t tile = std::min(padded(last - first), kQueries);
    const std::unique_ptr<A[]> wide(new A[kKeys * (d + 16)]), products(new A[kKeys * tile]);
    A squares[kKeys], factor[kKeys], shift[kKeys];
    for (int64_t key = begin; key < end; key += kKeys) {
      const int64_t count = std::min(kKeys, end - key);
      for (int64_t i = 0; i < count; ++i) {
        squares[i] = FASTEDIT_SIMD(widened, (T, A), keys + (key + i) * key_stride, d, wide.get() + i * (d + 16));
      }
      block_factors(squares, count, factor, shift);
      for (int64_t query = first; query < last; query += tile) {
        const int64_t columns = std::min(tile, last - query);
        const int64_t stride = packed == nullptr ? columns : tile;
        product(wide.get(), count, query, columns, products.get(), stride);
        FASTEDIT_SIMD(take_better, (A), products.get(), stride, count, columns, key, factor, shift,
                      found.from(query, k));
      }
    }
  }

  void product(const A* wide, int64_t count, int64_t query, int64_t columns, A* out, int64_t stride) const {
    if (packed == nullptr) {
      FASTEDIT_SIMD(dots, (A, A), wide, d + 16, count, rows.data() + query * d, columns, d, out);
    } else {
      FASTEDIT_SIMD(gemm, (A), wide, d + 16, count, packed.get() + query * d, columns, d, out, stride);
    }
  }

  // The best of all parts, which hold rising keys.
  void merge(const std::vector<Found<A>*>& parts, int64_t query, A* values, int64_t* indices) const {
    std::vector<std::tuple<A, int64_t>> all;
    for (const Found<A>* part : parts) {
      for (int64_t i = query * k; i < (query + 1) * k; ++i) {
        if (part->keys[i] >= 0) all.emplace_back(part->scores[i], part->keys[i]);
      }
    }
    if (static_cast<int64_t>(all.size()) < k) return rank_all(query, values, indices);
    std::stable_sort(all.begin(), all.end(),
                     [](const auto& a, const auto& b) { return std::get<0>(a) > std::get<0>(b); });
    for (int64_t i = 0; i < k; ++i) std::tie(values[i], indices[i]) = all[i];
    if (metric == Metric::l2) measure(query, values, indices);
  }

  // Distances of those chosen from their differences, exact where the squares would cancel, and ordered by them.
  void measure(int64_t query, A* values, int64_t* indices) const {
    std::vector<std::tuple<A, int64_t>> found(k);
    for (int64_t i = 0; i < k; ++i) {
      const A value =
          FASTEDIT_SIMD(squared_distance, (T, A), queries + query * query_stride, keys + indices[i] * key_stride, d);
      found[i] = {value, indices[i]};
    }
    if (std::none_of(found.begin(), found.end(), [](const auto& f) { return std::isnan(std::get<0>(f)); })) {
      std::sort(found.begin(), found.end());
    }
    for (int64_t i = 0; i < k; ++i) std::tie(values[i], indices[i]) = found[i];
  }

  // Where fewer than k keys have a score above minus infinity: rank every key of this query, NaN behind all numbers.
  void rank_all(int64_t query, A* values, int64_t* indices) const {
    std::vector<A> wide(d), score(K);
    for (int64_t key = 0; key < K; ++key) {
      A square = FASTEDIT_SIMD(widened, (T, A), keys + key * key_stride, d, wide.data()), factor, shift, product;
      if (metric == Metric::l2) {
        score[key] =
            -FASTEDIT_SIMD(squared_distance, (T, A), queries + query * query_stride, keys + key * key_stride, d);
        continue;
      }
      block_factors(&square, 1, &factor, &shift);
      FASTEDIT_SIMD(dots, (A, A), wide.data(), d, 1, rows.data() + query * d, 1, d, &product);
      score[key] = factor * product;
    }
    std::vector<int64_t> order(K);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return std::isnan(score[a]) ? false : std::isnan(score[b]) ? true : score[a] > score[b];
    });
    for (int64_t i = 0; i < k; ++i) {
      indices[i] = order[i];
      values[i] = metric == Metric::l2 ? -score[order[i]] : score[order[i]];
    }
  }

  // Threads share the keys where there are many, else the queries.
  void run(A* values, int64_t* indices) const {
    const int64_t threads = at::get_num_threads();
    const int64_t parts = K >= 8 * kKeys * threads ? threads : 1;
    const int64_t shares = parts == 1 ? std::clamp<int64_t>(Q / kPanelPadding, 1, threads) : 1;
    const int64_t part = (K + parts - 1) / parts;
    // shares begin where a panel of packed queries does
    const int64_t share = padded((Q + shares - 1) / shares);
    std::vector<std::unique_ptr<Found<A>>> found;
    for (int64_t i = 0; i < parts; ++i) found.push_back(std::make_unique<Found<A>>(Q, k));
    at::parallel_for(0, parts * shares, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t own = i / shares, first = (i % shares) * share;
        if (first < Q) {
          scan(own * part, std::min((own + 1) * part, K), first, std::min(first + share, Q), *found[own]);
        }
      }
    });
    std::vector<Found<A>*> all;
    for (const auto& each : found) all.push_back(each.get());
    at::parallel_for(0, Q, 64, [&](int64_t begin, int64_t end) {
      for (int64_t query = begin; query < end; ++query) merge(all, query, values + query * k, indices + query * k);
    });
  }
};

std::tuple<Tensor, Tensor> nearest_keys(const Tensor& queries_in, const Tensor& keys_in, int64_t k,
                                        std::string_view metric) {
  check_nearest_keys(queries_in, keys_in, k, metric);
  const Tensor queries = with_unit_stride(queries_in), keys = with_unit_stride(keys_in);
  const Metric by = metric == "cosine" ? Metric::cosine : metric == "l2" ? Metric::l2 : Metric::dot;
  const bool wide = queries.scalar_type() == at::kDouble;
  Tensor values = at::empty({queries.size(0), k}, queries.options().dtype(wide ? at::kDouble : at::kFloat));
  Tensor indices = at::empty({queries.size(0), k}, queries.options().dtype(at::kLong));
  if (queries.size(0) == 0) return {values, indices};
  dispatch(queries.scalar_type(), "nearest_keys", [&]<class T, class A>() {
    const Search<T, A> search(queries, keys, k, by);
    search.run(values.mutable_data_ptr<A>(), indices.mutable_data_ptr<int64_t>());
  });
  return {values, indices};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastedit, CPU, m) {
  if (best_isa() == Isa::none) return;
  m.impl("nearest_keys", nearest_keys);
}

}  // namespace fastedit
