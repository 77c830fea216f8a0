// The kernels of adam_step_ and the order they run in. Rows are cut into pieces of fixed size, a block for each. With a
// clip: sums of squares by pieces, a row's norm and scalars, the update. Without, gradients are read once: scalars, the
// update that adds up squares by the way, norms. Pieces are added in order, so a norm has the same bits every time.
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
    walk([&](auto whole, int64_t i) { add_squares(sum, get_constant<whole.value>(grads + i)); },
         [&](int64_t i) { add_squares(sum, Pack<G, 1>{grads[i]}); });
    return sum;
  }

  // The same, and updates the thread's elements.
  __device__ A update(const AdamScalars<A>& scalars) const {
    A sum = 0;
    walk(
        [&](auto whole, int64_t i) {
          const Pack<G, N> g = get_constant<whole.value>(grads + i);
          Pack<A, N> m = get<whole.value>(first + i), v = get<whole.value>(second + i);
          Pack<T, N> p = get<whole.value>(params + i);
          add_squares(sum, g);
          step(scalars, p, g, m, v);
          put<whole.value>(params + i, p);
          put<whole.value>(first + i, m);
          put<whole.value>(second + i, v);
        },
        [&](int64_t i) {
          const Pack<G, 1> g{grads[i]};
          Pack<A, 1> m{first[i]}, v{second[i]};
          Pack<T, 1> p{params[i]};
          add_squares(sum, g);
          step(scalars, p, g, m, v);
          params[i] = p.at[0];
          first[i] = m.at[0];
          second[i] = v.at[0];
        });
    return sum;
  }

 private:
  template <bool yes>
  struct Bool {
    static constexpr bool value = yes;
  };

  // Calls group(aligned?, first element) for the thread's groups and single(element) for the rest of a row.
  template <class Group, class Single>
  __device__ void walk(const Group& group, const Single& single) const {
    const int64_t groups = size / N;
    if (aligned) {
      for (int64_t i = threadIdx.x; i < groups; i += kThreads) group(Bool<true>{}, i * N);
    } else {
      FASTEDIT_ROLLED
      for (int64_t i = threadIdx.x; i < groups; i += kThreads) group(Bool<false>{}, i * N);
    }
    const int64_t rest = groups * N + threadIdx.x;
    if (rest < size) single(rest);
  }

  template <bool whole, class X>
  __device__ static Pack<X, N> get(const X* p) {
    if constexpr (whole) {
      return load(reinterpret_cast<const Pack<X, N>*>(p));
    } else {
      Pack<X, N> pack;
      FASTEDIT_UNROLL
      for (int k = 0; k < N; ++k) pack.at[k] = p[k];
      return pack;
    }
  }
  template <bool whole, class X>
  __device__ static Pack<X, N> get_constant(const X* p) {
    if constexpr (whole) {
      return load_constant(reinterpret_cast<const Pack<X, N>*>(p));
    } else {
      return get<false>(p);
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

template <class T, class G, class A, bool squares>
__global__ void __launch_bounds__(kThreads) adam_pieces(AdamRows<T, G, A> in) {
  const int64_t row = blockIdx.x / in.pieces;
  if (!in.active[row * in.active_row]) return;
  const AdamScalars<A> scalars = in.scalars[row];
  double sum[1] = {AdamPiece<T, G, A>(in, row, blockIdx.x % in.pieces * kPiece).update(scalars)};
  if constexpr (squares) {
    block_sums(sum);
    if (threadIdx.x == 0) in.squares[blockIdx.x] = sum[0];
  }
}

// One block for every row: its norm, where its squares are there; its step and scalars, where they are not set yet.
template <class T, class G, class A, bool norm, bool scalars>
__global__ void __launch_bounds__(kThreads) adam_rows(AdamRows<T, G, A> in, AdamSettings settings) {
  const int64_t row = blockIdx.x;
  if (!in.active[row * in.active_row]) {
    if (norm && threadIdx.x == 0) in.norm[row] = 0;
    return;
  }
  double sum[1] = {0};
  if constexpr (norm) {
    for (int64_t i = threadIdx.x; i < in.pieces; i += kThreads) sum[0] += in.squares[row * in.pieces + i];
    block_sums(sum);
  }
  if (threadIdx.x != 0) return;
  const A length = static_cast<A>(::sqrt(sum[0]));
  if constexpr (norm) in.norm[row] = length;
  if constexpr (scalars) {
    const int64_t step = in.step[row * in.step_row] + 1;
    AdamScalars<A> set = adam_scalars<A>(settings, step, in.lr[row * in.lr_row]);
    if constexpr (norm) set.grad_scale = clip_scale(length, settings.clip);
    in.step[row * in.step_row] = step;
    in.scalars[row] = set;
  }
}

// launch(kernel, blocks, arguments...) runs blocks of kThreads.
template <class T, class G, class A, class Launch>
void run_adam_step(const AdamRows<T, G, A>& in, const AdamSettings& settings, bool clips, const Launch& launch) {
  if (in.rows == 0) return;
  const int64_t blocks = in.rows * in.pieces;
  if (clips) {
    if (blocks > 0) launch(adam_squares<T, G, A>, blocks, in);
    launch(adam_rows<T, G, A, true, true>, in.rows, in, settings);
    if (blocks > 0) launch(adam_pieces<T, G, A, false>, blocks, in);
  } else {
    launch(adam_rows<T, G, A, false, true>, in.rows, in, settings);
    if (blocks > 0) launch(adam_pieces<T, G, A, true>, blocks, in);
    launch(adam_rows<T, G, A, true, false>, in.rows, in, settings);
  }
}

}  // namespace fastedit::gpu
