// The kernels of adam_step_ and the order they run in. Rows are cut into pieces of fixed size, a block for each: sums
// of squares by pieces, a row's norm and scalars, the update of rows whose norm is finite. Pieces are added in order,
// so a norm has the same bits every time.
#pragma once

#include "cuda/adam_step_math.h"
#include "cuda/block.h"

namespace fastedit::gpu {

// Elements of a row that a block works on.
constexpr int64_t kPiece = 64 * kThreads;

template <class T, class G, class A>
struct AdamRows {
  T* params;
  const G* grads;
  A *first, *second;
  // strides between rows, in elements
  int64_t params_row, grads_row, first_row, second_row;
  int64_t rows, size, pieces;
  int64_t* step;
  const double* lr;
  const bool* active;
  int64_t step_row, lr_row, active_row;
  A* norm;                  // (B,)
  AdamScalars<A>* scalars;  // (B,), to work with
  double* squares;          // (B, pieces), to work with
};

// Elements of a thread at a time: 16 bytes of a moment.
template <class A>
constexpr int kAdamPack = kVectorBytes / sizeof(A);

template <class T, int N>
__device__ inline bool at_vector(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T, N>) == 0;
}

// A block's piece of a row, by groups of N neighbours. The same thread takes the same group whether it can be moved by
// one instruction or not, so that the sums are the same wherever the row lies.
template <class T, class G, class A>
struct AdamPiece {
  static constexpr int N = kAdamPack<A>;
  T* params;
  const G* grads;
  A *first, *second;
  int64_t size;
  bool aligned;

  __device__ AdamPiece(const AdamRows<T, G, A>& in, int64_t row, int64_t start)
      : params(in.params + row * in.params_row + start),
        grads(in.grads + row * in.grads_row + start),
        first(in.first + row * in.first_row + start),
        second(in.second + row * in.second_row + start),
        size(in.size - start < kPiece ? in.size - start : kPiece),
        aligned(at_vector<T, N>(params) && at_vector<G, N>(grads) && at_vector<A, N>(first) &&
                at_vector<A, N>(second)) {}

  // Sum of squares of the thread's gradients.
  __device__ A squares() const {
    A sum = 0;
    // alone they are read by 16 bytes
    constexpr int M = kVectorBytes / sizeof(G);
    walk<M>(
        at_vector<G, M>(grads),
        [&](auto whole, int64_t i) { add_squares(sum, get_constant<whole.value, M>(grads + i)); },
        [&](int64_t i) { add_squares(sum, Pack<G, 1>{grads[i]}); });
    return sum;
  }

  // Updates the thread's elements.
  __device__ void update(const AdamScalars<A>& scalars) const {
    walk<N>(
        aligned,
        [&](auto whole, int64_t i) {
          const Pack<G, N> g = get_constant<whole.value, N>(grads + i);
          Pack<A, N> m = get<whole.value, N>(first + i), v = get<whole.value, N>(second + i);
          Pack<T, N> p = get<whole.value, N>(params + i);
          step(scalars, p, g, m, v);
          put<whole.value>(params + i, p);
          put<whole.value>(first + i, m);
          put<whole.value>(second + i, v);
        },
        [&](int64_t i) {
          const Pack<G, 1> g{grads[i]};
          Pack<A, 1> m{first[i]}, v{second[i]};
          Pack<T, 1> p{params[i]};
          step(scalars, p, g, m, v);
          params[i] = p.at[0];
          first[i] = m.at[0];
          second[i] = v.at[0];
        });
  }

 private:
  template <bool yes>
  struct Bool {
    static constexpr bool value = yes;
  };

  // Calls group(whole?, first element) for the thread's groups of n and single(element) for the rest of a row.
  template <int n, class Group, class Single>
  __device__ void walk(bool whole, const Group& group, const Single& single) const {
    const int64_t groups = size / n;
    if (whole) {
      for (int64_t i = threadIdx.x; i < groups; i += kThreads) group(Bool<true>{}, i * n);
    } else {
      FASTEDIT_ROLLED
      for (int64_t i = threadIdx.x; i < groups; i += kThreads) group(Bool<false>{}, i * n);
    }
    const int64_t rest = groups * n + threadIdx.x;
    if (rest < size) single(rest);
  }

  template <bool whole, int n, class X>
  __device__ static Pack<X, n> get(const X* p) {
    if constexpr (whole) {
      return load(reinterpret_cast<const Pack<X, n>*>(p));
    } else {
      Pack<X, n> pack;
      FASTEDIT_UNROLL
      for (int k = 0; k < n; ++k) pack.at[k] = p[k];
      return pack;
    }
  }
  template <bool whole, int n, class X>
  __device__ static Pack<X, n> get_constant(const X* p) {
    if constexpr (whole) {
      return load_constant(reinterpret_cast<const Pack<X, n>*>(p));
    } else {
      return get<false, n>(p);
    }
  }
  template <bool whole, class X>
  __device__ static void put(X* p, const Pack<X, N>& pack) {
    if constexpr (whole) {
      store(reinterpret_cast<Pack<X, N>*>(p), pack);
    } else {
      FASTEDIT_UNROLL
      for (int k = 0; k < N; ++k) p[k] = pack.at[k];
    }
  }

  template <int n>
  __device__ static void add_squares(A& sum, const Pack<G, n>& g) {
    FASTEDIT_UNROLL
    for (int k = 0; k < n; ++k) sum = fused(A(widen(g.at[k])), A(widen(g.at[k])), sum);
  }
  template <int n>
  __device__ static void step(const AdamScalars<A>& scalars, Pack<T, n>& p, const Pack<G, n>& g, Pack<A, n>& m,
                              Pack<A, n>& v) {
    FASTEDIT_UNROLL
    for (int k = 0; k < n; ++k) {
      A value = widen(p.at[k]);
      adam_update(scalars, value, A(widen(g.at[k])), m.at[k], v.at[k]);
      p.at[k] = Narrow<T>::from(value);
    }
  }
};

// One block for every piece of every row.
template <class T, class G, class A>
__global__ void __launch_bounds__(kThreads) adam_squares(AdamRows<T, G, A> in) {
  const int64_t row = blockIdx.x / in.pieces;
  if (!in.active[row * in.active_row]) return;
  double sum[1] = {AdamPiece<T, G, A>(in, row, blockIdx.x % in.pieces * kPiece).squares()};
  block_sums(sum);
  if (threadIdx.x == 0) in.squares[blockIdx.x] = sum[0];
}

template <class A>
__device__ inline bool is_finite(A x) {
  return x - x == A(0);
}

template <class T, class G, class A>
__global__ void __launch_bounds__(kThreads) adam_pieces(AdamRows<T, G, A> in) {
  const int64_t row = blockIdx.x / in.pieces;
  if (!in.active[row * in.active_row] || !is_finite(in.norm[row])) return;
  const AdamScalars<A> scalars = in.scalars[row];
  AdamPiece<T, G, A>(in, row, blockIdx.x % in.pieces * kPiece).update(scalars);
}

// One block for every row: its norm; its step and scalars, where it makes a step.
template <class T, class G, class A>
__global__ void __launch_bounds__(kThreads) adam_rows(AdamRows<T, G, A> in, AdamSettings settings) {
  const int64_t row = blockIdx.x;
  if (!in.active[row * in.active_row]) {
    if (threadIdx.x == 0) in.norm[row] = 0;
    return;
  }
  double sum[1] = {0};
  for (int64_t i = threadIdx.x; i < in.pieces; i += kThreads) sum[0] += in.squares[row * in.pieces + i];
  block_sums(sum);
  if (threadIdx.x != 0) return;
  const A length = static_cast<A>(::sqrt(sum[0]));
  in.norm[row] = length;
  if (!is_finite(length)) return;
  const int64_t step = in.step[row * in.step_row] + 1;
  AdamScalars<A> set = adam_scalars<A>(settings, step, in.lr[row * in.lr_row]);
  set.grad_scale = clip_scale(length, settings.clip);
  in.step[row * in.step_row] = step;
  in.scalars[row] = set;
}

// launch(kernel, blocks, arguments...) runs blocks of kThreads.
template <class T, class G, class A, class Launch>
void run_adam_step(const AdamRows<T, G, A>& in, const AdamSettings& settings, const Launch& launch) {
  if (in.rows == 0) return;
  const int64_t blocks = in.rows * in.pieces;
  if (blocks > 0) launch(adam_squares<T, G, A>, blocks, in);
  launch(adam_rows<T, G, A>, in.rows, in, settings);
  if (blocks > 0) launch(adam_pieces<T, G, A>, blocks, in);
}

}  // namespace fastedit::gpu
