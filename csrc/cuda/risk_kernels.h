// The kernels of risk and the order they run in. Forward: a block adds up one part of a token's row, then parts are
// merged and tokens averaged. Backward: a block writes one part of a token's row. Row starts may lie anywhere: what is
// before and behind the 16-byte vectors is read one by one, as is everything where the columns have a stride.
#pragma once

#include "cuda/block.h"
#include "cuda/risk_math.h"

namespace fastedit::gpu {

// Labels and segments are trusted, as nobody waits for the device to look at them: a label outside of the vocabulary
// gives NaN, a segment that does not exist is ignored like a negative one.
template <class T>
struct RiskInput {
  const T *z, *r;
  // strides in elements
  int64_t z_row, z_column, r_row, r_column;
  const int64_t *labels, *segments;
  int64_t tokens, vocabulary, n_segments;
  int parts;

  __device__ bool used(int64_t segment) const { return segment >= 0 && segment < n_segments; }
};

template <class A>
struct RiskOutput {
  A *value, *env_grad;     // (S,)
  RiskStats<A>* stats;     // (T,)
  TokenRisk<A>* of_token;  // (T,)
  double* parts;           // (T, parts, kRecord), where a row has several
  int* ranges;             // (S, 2), zeros before: T less a segment's first token, and one more than its last
};
// The largest logits of a part, its centre and its sums.
constexpr int kRecord = 10;

// Parts that a row is cut into: blocks for eight rounds of four on every multiprocessor, none for less than fewest
// logits. It depends on the number of tokens, so the last bits of a token's risk do as well.
inline int risk_parts(int64_t tokens, int64_t vocabulary, int multiprocessors, int64_t fewest) {
  const int64_t wanted = tokens > 0 ? (int64_t{32} * multiprocessors + tokens / 2) / tokens : 1;
  const int64_t most = vocabulary / fewest;
  return static_cast<int>(wanted < most ? (wanted > 1 ? wanted : 1) : (most > 1 ? most : 1));
}

// A block's part of a row: vectors [begin, end) of those behind head, and edges elements around them; or without
// vectors elements [begin, end).
struct Span {
  int64_t begin, end, behind;
  int head, edges, width;
  bool vectors;

  // first is where vectors are aligned, agree says that all rows of the token are aligned alike
  template <class T>
  __device__ Span(const T* first, bool agree, int64_t size, int part, int parts) : head(0), edges(0), vectors(agree) {
    constexpr int n = kVectorBytes / sizeof(T);
    int64_t count = size;
    behind = 0;
    if (vectors) {
      const int past = static_cast<int>(reinterpret_cast<uintptr_t>(first) / sizeof(T) % n);
      head = past ? n - past : 0;
      if (head > size) head = static_cast<int>(size);
      count = (size - head) / n;
      behind = count * n;
      if (part == 0) edges = static_cast<int>(size - behind);
    }
    begin = count * part / parts;
    end = count * (part + 1) / parts;
    width = vectors ? n : 1;
  }

  __device__ bool holds(int64_t i) const {
    const int64_t inner = i - head;
    return (inner >= begin * width && inner < end * width) || (edges > 0 && (inner < 0 || inner >= behind));
  }
};

template <class T>
__device__ inline bool aligned_alike(const T* a, const T* b) {
  return (reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) % kVectorBytes == 0;
}

// Calls body.vectors<U>(i), U vectors from element i on, a block's width apart, and body.single<N>(i), N elements.
template <class T, int U, class Body>
__device__ inline void walk(const Span& span, Body& body) {
  constexpr int n = kVectorBytes / sizeof(T);
  int64_t i = span.begin + threadIdx.x;
  if (span.vectors) {
    FASTEDIT_ROLLED
    for (; i + (U - 1) * kThreads < span.end; i += U * kThreads) body.template vectors<U>(span.head + i * n);
    FASTEDIT_ROLLED
    for (; i < span.end; i += kThreads) body.template vectors<1>(span.head + i * n);
    const int edge = static_cast<int>(threadIdx.x);
    if (edge < span.edges) body.template single<1>(edge < span.head ? edge : span.behind + edge);
  } else {
    FASTEDIT_ROLLED
    for (; i + (n - 1) * kThreads < span.end; i += n * kThreads) body.template single<n>(i);
    FASTEDIT_ROLLED
    for (; i < span.end; i += kThreads) body.template single<1>(i);
  }
}

// Vectors a block's width apart, widened and lifted to the floor. Returns the largest.
template <int U, class T, class A, int N>
__device__ inline A load_vectors(const T* from, A (&to)[N]) {
  constexpr int n = kVectorBytes / sizeof(T);
  static_assert(N == U * n);
  Pack<T, n> packs[U];
  FASTEDIT_UNROLL
  for (int j = 0; j < U; ++j) packs[j] = load_constant(reinterpret_cast<const Pack<T, n>*>(from) + j * kThreads);
  A largest = kLogitFloor<A>;
  FASTEDIT_UNROLL
  for (int j = 0; j < U; ++j) widen(packs[j], kLogitFloor<A>, to + j * n, largest);
  return largest;
}
template <class T, class A, int N>
__device__ inline A load_single(const T* from, int64_t stride, A (&to)[N]) {
  A largest = kLogitFloor<A>;
  FASTEDIT_UNROLL
  for (int i = 0; i < N; ++i) {
    to[i] = at_least(A(widen(from[i * kThreads * stride])), kLogitFloor<A>);
    largest = larger(largest, to[i]);
  }
  return largest;
}

template <RiskKind kind, class T, class A>
struct RiskForward {
  static constexpr bool kDiverges = kind != RiskKind::ce;
  const T *z, *r;
  int64_t z_column, r_column;
  RiskSums<kind, A> sums;

  template <int U>
  __device__ void vectors(int64_t i) {
    A own[U * kVectorBytes / sizeof(T)], other[U * kVectorBytes / sizeof(T)];
    const A largest = load_vectors<U>(z + i, own);
    A largest_other = kLogitFloor<A>;
    if constexpr (kDiverges) largest_other = load_vectors<U>(r + i, other);
    sums.add(own, largest, other, largest_other);
  }
  template <int N>
  __device__ void single(int64_t i) {
    A own[N], other[N];
    const A largest = load_single(z + i * z_column, z_column, own);
    A largest_other = kLogitFloor<A>;
    if constexpr (kDiverges) largest_other = load_single(r + i * r_column, r_column, other);
    sums.add(own, largest, other, largest_other);
  }

  // c: the difference of the largest logits among the first few. All warps and all parts of a row find the same.
  __device__ void take_centre(int64_t size) {
    constexpr int kLook = 8;
    A top_z = kLogitFloor<A>, top_r = kLogitFloor<A>;
    FASTEDIT_UNROLL
    for (int j = 0; j < kLook; ++j) {
      const int64_t i = threadIdx.x % kWarp + j * kWarp;
      if (i < size) {
        top_z = larger(top_z, A(widen(z[i * z_column])));
        top_r = larger(top_r, A(widen(r[i * r_column])));
      }
    }
    top_z = warp_max(top_z);
    top_r = warp_max(top_r);
    const A c = kind == RiskKind::forward_kl ? top_z - top_r : top_r - top_z;
    sums.centre = c < A(1e4) && c > A(-1e4) ? c : 0;
  }
};

// The logit of a token's label.
template <class A, class T>
__device__ inline double label_logit(const RiskInput<T>& in, int64_t token) {
  const int64_t label = in.labels[token];
  if (label < 0 || label >= in.vocabulary) return ::nan("");
  return A(widen(in.z[token * in.z_row + label * in.z_column]));
}

template <RiskKind kind, class T, class A>
__device__ inline void write_token(const RiskInput<T>& in, const RiskOutput<A>& out, int64_t token,
                                   const RiskSums<kind, double>& total) {
  double label = 0;
  if constexpr (kind == RiskKind::ce) label = label_logit<A>(in, token);
  RiskStats<A> stats;
  out.of_token[token] = finish_risk(total, label, stats);
  out.stats[token] = stats;
}

// One block for every part of every token.
template <RiskKind kind, class T, class A>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 8 ? 2 : 4) risk_sums(RiskInput<T> in, RiskOutput<A> out) {
  constexpr bool diverges = kind != RiskKind::ce;
  const int64_t token = blockIdx.x / in.parts;
  const int part = static_cast<int>(blockIdx.x % in.parts);
  if (!in.used(in.segments[token])) {
    if (part == 0 && threadIdx.x == 0) out.stats[token] = RiskStats<A>{};
    return;
  }
  if (part == 0 && threadIdx.x == 0) {
    // the largest numbers are the same in any order
    int* range = out.ranges + 2 * in.segments[token];
    atomicMax(range, static_cast<int>(in.tokens - token));
    atomicMax(range + 1, static_cast<int>(token + 1));
  }
  RiskForward<kind, T, A> body{in.z + token * in.z_row, diverges ? in.r + token * in.r_row : nullptr, in.z_column,
                               in.r_column, RiskSums<kind, A>()};
  bool agree = in.z_column == 1;
  if constexpr (diverges) {
    agree = agree && in.r_column == 1 && aligned_alike(body.z, body.r);
    body.take_centre(in.vocabulary);
  }
  walk<T, diverges ? 2 : 4>(Span(body.z, agree, in.vocabulary, part, in.parts), body);

  RiskSums<kind, A>& own = body.sums;
  RiskSums<kind, double> total(own.centre);
  total.top_z = block_max(own.top_z);
  if constexpr (diverges) total.top_r = block_max(own.top_r);
  own.move(static_cast<A>(total.top_z), static_cast<A>(total.top_r));
  FASTEDIT_UNROLL
  for (int k = 0; k < kRiskSums<kind>; ++k) total.sum[k] = own.sum[k];
  block_sums(total.sum);
  if (threadIdx.x != 0) return;
  if (in.parts == 1) return write_token(in, out, token, total);
  double* record = out.parts + static_cast<int64_t>(blockIdx.x) * kRecord;
  record[0] = total.top_z;
  record[1] = total.top_r;
  record[2] = total.centre;
  FASTEDIT_UNROLL
  for (int k = 0; k < kRiskSums<kind>; ++k) record[3 + k] = total.sum[k];
}

// One warp for every token in several parts.
template <RiskKind kind, class T, class A>
__global__ void __launch_bounds__(kThreads) risk_merge(RiskInput<T> in, RiskOutput<A> out) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  if (token >= in.tokens || !in.used(in.segments[token])) return;
  const double* records = out.parts + token * in.parts * kRecord;
  RiskSums<kind, double> total(records[2]);
  for (int i = lane; i < in.parts; i += kWarp) {
    total.top_z = larger(total.top_z, records[i * kRecord]);
    total.top_r = larger(total.top_r, records[i * kRecord + 1]);
  }
  total.top_z = warp_max(total.top_z);
  total.top_r = warp_max(total.top_r);
  for (int i = lane; i < in.parts; i += kWarp) {
    const double* record = records + i * kRecord;
    RiskSums<kind, double> one(record[2]);
    one.shift_z = record[0];
    one.shift_r = record[1];
    FASTEDIT_UNROLL
    for (int k = 0; k < kRiskSums<kind>; ++k) one.sum[k] = record[3 + k];
    one.move(total.top_z, total.top_r);
    FASTEDIT_UNROLL
    for (int k = 0; k < kRiskSums<kind>; ++k) total.sum[k] += one.sum[k];
  }
  FASTEDIT_UNROLL
  for (int k = 0; k < kRiskSums<kind>; ++k) total.sum[k] = warp_sum(total.sum[k]);
  if (lane == 0) write_token(in, out, token, total);
}

// One block for every segment, which looks at the tokens from its first to its last.
template <class A>
__global__ void __launch_bounds__(kThreads) risk_means(const int64_t* segments, int64_t tokens, RiskOutput<A> out) {
  const int* range = out.ranges + 2 * blockIdx.x;
  const int64_t last = range[1];
  double sums[3] = {0, 0, 0};
  // several on their way at once
  constexpr int kAhead = 4;
  for (int64_t first = tokens - range[0] + threadIdx.x; first < last; first += kAhead * kThreads) {
    int64_t of[kAhead];
    FASTEDIT_UNROLL
    for (int j = 0; j < kAhead; ++j) {
      const int64_t t = first + j * kThreads;
      of[j] = t < last ? segments[t] : -1;
    }
    FASTEDIT_UNROLL
    for (int j = 0; j < kAhead; ++j) {
      if (of[j] != blockIdx.x) continue;
      const TokenRisk<A> risk = out.of_token[first + j * kThreads];
      sums[0] += risk.value;
      sums[1] += risk.env_grad;
      sums[2] += 1;
    }
  }
  block_sums(sums);
  if (threadIdx.x != 0) return;
  const double count = sums[2] > 1 ? sums[2] : 1;
  out.value[blockIdx.x] = static_cast<A>(sums[0] / count);
  out.env_grad[blockIdx.x] = static_cast<A>(sums[1] / count);
}

// launch(kernel, blocks, arguments...) runs blocks of kThreads.
template <RiskKind kind, class T, class A, class Launch>
void run_risk(const RiskInput<T>& in, const RiskOutput<A>& out, const Launch& launch) {
  if (in.tokens > 0) {
    launch(risk_sums<kind, T, A>, in.tokens * in.parts, in, out);
    if (in.parts > 1) launch(risk_merge<kind, T, A>, (in.tokens + kWarps - 1) / kWarps, in, out);
  }
  if (in.n_segments > 0) launch(risk_means<A>, in.n_segments, in.segments, in.tokens, out);
}

template <class T, class A>
struct RiskUpstream {
  const A *grad_value, *grad_env;  // (S,)
  const RiskStats<A>* stats;       // (T,)
  int* counts;                     // (S,), zeros before: tokens of a segment
  T* out;                          // (T, V)
};

// One thread for every token.
template <class T, class A>
__global__ void __launch_bounds__(kThreads) risk_counts(RiskInput<T> in, RiskUpstream<T, A> up) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token >= in.tokens) return;
  const int64_t segment = in.segments[token];
  if (in.used(segment)) atomicAdd(up.counts + segment, 1);
}

template <RiskKind kind, class T, class A>
struct RiskBackward {
  static constexpr bool kDiverges = kind != RiskKind::ce;
  static constexpr int kPack = kVectorBytes / sizeof(T);
  const T *z, *r;
  int64_t z_column, r_column;
  T* out;
  RiskGradient<kind, A> gradient;

  template <int U>
  __device__ void vectors(int64_t i) {
    A own[U * kPack], other[U * kPack];
    load_vectors<U>(z + i, own);
    if constexpr (kDiverges) load_vectors<U>(r + i, other);
    FASTEDIT_UNROLL
    for (int j = 0; j < U; ++j) {
      Pack<T, kPack> pack;
      FASTEDIT_UNROLL
      for (int k = 0; k < kPack; ++k) {
        const A z_k = own[j * kPack + k];
        pack.at[k] = Narrow<T>::from(gradient.at(z_k, kDiverges ? other[j * kPack + k] : z_k));
      }
      store(reinterpret_cast<Pack<T, kPack>*>(out + i) + j * kThreads, pack);
    }
  }
  template <int N>
  __device__ void single(int64_t i) {
    A own[N], other[N];
    load_single(z + i * z_column, z_column, own);
    if constexpr (kDiverges) load_single(r + i * r_column, r_column, other);
    FASTEDIT_UNROLL
    for (int k = 0; k < N; ++k) {
      out[i + k * kThreads] = Narrow<T>::from(gradient.at(own[k], kDiverges ? other[k] : own[k]));
    }
  }
};

template <class T>
struct RiskZeros {
  static constexpr int kPack = kVectorBytes / sizeof(T);
  T* out;

  template <int U>
  __device__ void vectors(int64_t i) {
    FASTEDIT_UNROLL
    for (int j = 0; j < U; ++j) store(reinterpret_cast<Pack<T, kPack>*>(out + i) + j * kThreads, Pack<T, kPack>{});
  }
  template <int N>
  __device__ void single(int64_t i) {
    FASTEDIT_UNROLL
    for (int k = 0; k < N; ++k) out[i + k * kThreads] = T{};
  }
};

// One block for every part of every token.
template <RiskKind kind, class T, class A>
__global__ void __launch_bounds__(kThreads, sizeof(A) == 8 ? 2 : 4)
    risk_gradient(RiskInput<T> in, RiskUpstream<T, A> up) {
  constexpr bool diverges = kind != RiskKind::ce;
  constexpr int unroll = diverges ? 2 : 4;
  const int64_t token = blockIdx.x / in.parts, segment = in.segments[token];
  const int part = static_cast<int>(blockIdx.x % in.parts);
  T* out = up.out + token * in.vocabulary;
  if (!in.used(segment)) {
    RiskZeros<T> zeros{out};
    return walk<T, unroll>(Span(out, true, in.vocabulary, part, in.parts), zeros);
  }
  const T* z = in.z + token * in.z_row;
  const T* r = diverges ? in.r + token * in.r_row : nullptr;
  bool agree = in.z_column == 1 && aligned_alike<T>(z, out);
  if constexpr (diverges) agree = agree && in.r_column == 1 && aligned_alike(z, r);
  const Span span(z, agree, in.vocabulary, part, in.parts);
  const A count = static_cast<A>(up.counts[segment]);
  const RiskGradient<kind, A> gradient(up.stats[token], up.grad_value[segment] / count, up.grad_env[segment] / count);
  RiskBackward<kind, T, A> body{z, r, in.z_column, in.r_column, out, gradient};
  walk<T, unroll>(span, body);
  if constexpr (kind == RiskKind::ce) {
    // over what a thread of this block wrote there
    __syncthreads();
    const int64_t label = in.labels[token];
    if (threadIdx.x == 0 && label >= 0 && label < in.vocabulary && span.holds(label)) {
      A own[1];
      load_single(z + label * in.z_column, in.z_column, own);
      out[label] = Narrow<T>::from(gradient.at(own[0], own[0]) - gradient.both);
    }
  }
}

template <RiskKind kind, class T, class A, class Launch>
void run_risk_backward(const RiskInput<T>& in, const RiskUpstream<T, A>& up, const Launch& launch) {
  if (in.tokens == 0) return;
  launch(risk_counts<T, A>, (in.tokens + kThreads - 1) / kThreads, in, up);
  launch(risk_gradient<kind, T, A>, in.tokens * in.parts, in, up);
}

}  // namespace fastedit::gpu
