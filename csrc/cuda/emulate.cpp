// The CUDA kernels behind C functions, compiled with FASTEDIT_EMULATE: for tests/ops/test_cuda_emulated.py. Not part of
// the library. Every function returns 0, or 1 when threads of a block met at different barriers.
#include <limits>
#include <vector>

#include "cuda/adam_step_kernels.h"
#include "cuda/risk_kernels.h"

namespace fastedit::gpu {
namespace {

struct EmulatedLaunch {
  mutable bool fine = true;

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, const Arguments&... arguments) const {
    for (int64_t b = 0; b < blocks; ++b) {
      blockIdx.x = static_cast<unsigned>(emulator.backwards ? blocks - 1 - b : b);
      fine = emulator.run(kThreads, [&] { kernel(arguments...); }) && fine;
    }
  }
};

// 0 float32, 1 bfloat16, 2 float64
template <class Body>
void with_dtype(int dtype, Body&& body) {
  if (dtype == 0) return body.template operator()<float, float>();
  if (dtype == 1) return body.template operator()<BFloat16, float>();
  return body.template operator()<double, double>();
}

template <class Body>
void with_kind(int kind, Body&& body) {
  if (kind == 0) return body.template operator()<RiskKind::ce>();
  if (kind == 1) return body.template operator()<RiskKind::forward_kl>();
  return body.template operator()<RiskKind::reverse_kl>();
}

// Of two-dimensional memory: strides in elements.
struct Matrix {
  const void* data;
  int64_t row, column;
};

template <class T>
RiskInput<T> input(const Matrix& z, const Matrix& r, const int64_t* labels, const int64_t* segments,
                   const int64_t* sizes) {
  return {static_cast<const T*>(z.data),
          static_cast<const T*>(r.data),
          z.row,
          z.column,
          r.row,
          r.column,
          labels,
          segments,
          sizes[0],
          sizes[1],
          sizes[2],
          static_cast<int>(sizes[3])};
}

// Memory to work with holds NaN until it is written.
template <class A>
std::vector<A> unwritten(int64_t size) {
  return std::vector<A>(size, std::numeric_limits<A>::quiet_NaN());
}

}  // namespace

extern "C" {

// Whether threads and blocks run in their order or the other way around: the results are the same bits.
void emulate_backwards(int yes) {
  emulator.backwards = yes != 0;
}

int emulate_threads() {
  return kThreads;
}

int emulate_risk_parts(int64_t tokens, int64_t vocabulary, int multiprocessors, int64_t fewest) {
  return risk_parts(tokens, vocabulary, multiprocessors, fewest);
}

// sizes: tokens, vocabulary, segments, parts of a row
int emulate_risk(int kind, int dtype, const Matrix* z, const Matrix* r, const int64_t* labels, const int64_t* segments,
                 const int64_t* sizes, void* value, void* env_grad, void* stats) {
  const EmulatedLaunch launch;
  with_dtype(dtype, [&]<class T, class A>() {
    std::vector<A> of_token = unwritten<A>(2 * sizes[0]);
    std::vector<double> parts = unwritten<double>(sizes[0] * sizes[3] * kRecord);
    std::vector<int> ranges(2 * sizes[2]);
    const RiskOutput<A> out{static_cast<A*>(value),
                            static_cast<A*>(env_grad),
                            static_cast<RiskStats<A>*>(stats),
                            reinterpret_cast<TokenRisk<A>*>(of_token.data()),
                            parts.data(),
                            ranges.data()};
    with_kind(kind, [&]<RiskKind k>() { run_risk<k>(input<T>(*z, *r, labels, segments, sizes), out, launch); });
  });
  return launch.fine ? 0 : 1;
}

int emulate_risk_backward(int kind, int dtype, const Matrix* z, const Matrix* r, const int64_t* labels,
                          const int64_t* segments, const int64_t* sizes, const void* grad_value, const void* grad_env,
                          const void* stats, void* grad) {
  const EmulatedLaunch launch;
  with_dtype(dtype, [&]<class T, class A>() {
    std::vector<int> counts(sizes[2]);
    const RiskUpstream<T, A> up{static_cast<const A*>(grad_value), static_cast<const A*>(grad_env),
                                static_cast<const RiskStats<A>*>(stats), counts.data(), static_cast<T*>(grad)};
    with_kind(kind, [&]<RiskKind k>() { run_risk_backward<k>(input<T>(*z, *r, labels, segments, sizes), up, launch); });
  });
  return launch.fine ? 0 : 1;
}

// matrices: params, grads, both moments; sizes: rows, elements of a row; settings: beta1, beta2, eps, weight decay,
// clip, radius, the last two infinite where there is none
int emulate_adam_step(int dtype, int wide_grads, const Matrix* matrices, const int64_t* sizes, int64_t* step,
                      const double* lr, const bool* active, const double* settings, void* norm) {
  const EmulatedLaunch launch;
  with_dtype(dtype, [&]<class T, class A>() {
    const auto go = [&]<class G>() {
      AdamRows<T, G, A> in{};
      in.params = static_cast<T*>(const_cast<void*>(matrices[0].data));
      in.grads = static_cast<const G*>(matrices[1].data);
      in.first = static_cast<A*>(const_cast<void*>(matrices[2].data));
      in.second = static_cast<A*>(const_cast<void*>(matrices[3].data));
      in.params_row = matrices[0].row;
      in.grads_row = matrices[1].row;
      in.first_row = matrices[2].row;
      in.second_row = matrices[3].row;
      in.rows = sizes[0];
      in.size = sizes[1];
      in.pieces = (in.size + kPiece - 1) / kPiece;
      in.step = step;
      in.lr = lr;
      in.active = active;
      in.step_row = sizes[2];
      in.lr_row = sizes[3];
      in.active_row = sizes[4];
      in.norm = static_cast<A*>(norm);
      std::vector<A> scalars = unwritten<A>(in.rows * (sizeof(AdamScalars<A>) / sizeof(A)));
      std::vector<double> squares = unwritten<double>(in.rows * in.pieces);
      in.scalars = reinterpret_cast<AdamScalars<A>*>(scalars.data());
      in.squares = squares.data();
      const AdamSettings s{settings[0], settings[1], settings[2], settings[3], settings[4], settings[5]};
      run_adam_step(in, s, launch);
    };
    wide_grads ? go.template operator()<A>() : go.template operator()<T>();
  });
  return launch.fine ? 0 : 1;
}

}  // extern "C"
}  // namespace fastedit::gpu
