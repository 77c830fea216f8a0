// risk of one token: its sums over the logits, and what follows from them.
//
// A divergence KL(softmax(x) || softmax(y)) is x = z, y = r for reverse_kl and x = r, y = z for forward_kl. Under the
// weights softmax(x), for a constant c close to the drift y - x, it is with u = y - x - c and w = e^u - 1
//   close  log1p(E[w]) - E[u]: of the size of the drift, nothing cancels
//   far    lse(y) - lse(x) - E[u] - c: where e^u overflows, or nearly all of softmax(y) lies where softmax(x) is tiny
// The derivative by the scale is E_p[z] - z_y for ce, Cov_p(z, z - r) for reverse_kl, E_p[z] - E_q[z] for forward_kl.
#pragma once

#include "cuda/device.h"

namespace fastedit::gpu {

enum class RiskKind { ce, forward_kl, reverse_kl };

// Logits below are taken for it: probability zero, and products of two of them stay finite. In float32 -1e15, as
// bfloat16 has it: a logit may be lifted before or after it is widened.
template <class A>
constexpr A kLogitFloor = sizeof(A) == 8 ? A(-1e100) : A(-0x1.c6p49);

// What the forward pass leaves of a token. max, sum and mean are those of the logits z: max z, sum e^(z - max), E_p[z].
// The last two are for forward_kl the max and sum of the reference logits r, for reverse_kl E_p[z - r] and
// h = Cov_p(z, z - r).
template <class A>
struct RiskStats {
  A max, sum, mean, fourth, fifth;
};

template <class A>
struct TokenRisk {
  A value, env_grad;
};

// Sums over logits, with the weights e_z = e^(z - shift_z), e_r alike, b = e_x and a = log2(e) (z - shift_z).
enum RiskSum {
  kSumZ,   // e_z
  kMeanZ,  // e_z a
  kU,      // b u
  kW,      // b w
  kMixed,  // reverse_kl: b u a; forward_kl: b w a
  kSumR,   // e_r
  kMeanR   // forward_kl: e_r a
};
template <RiskKind kind>
constexpr int kRiskSums = kind == RiskKind::ce           ? 2
                          : kind == RiskKind::reverse_kl ? 6
                                                         : 7;

// b (e^u - 1), where other is b e^u: by their difference, or where that would cancel by a polynomial, whose relative
// error is below 1e-7.
__device__ inline float weighted_expm1(float b, float u, float other) {
  float p = 0.00833333005f;
  p = p * u + 0.0417751508f;
  p = p * u + 0.166667393f;
  p = p * u + 0.499998308f;
  p = p * u + 1.0f;
  return ::fabsf(u) < 0.25f ? (b * u) * p : other - b;
}
__device__ inline double weighted_expm1(double b, double u, double) {
  return b * ::expm1(u);
}

template <RiskKind kind, class A>
struct RiskSums {
  static constexpr bool kDiverges = kind != RiskKind::ce;
  static constexpr bool kForward = kind == RiskKind::forward_kl;
  // Exponents are taken about shifts, which follow the largest logits at this distance: they move once or twice a row.
  static constexpr A kSlack = 8;

  A sum[kRiskSums<kind>];
  A top_z, top_r;  // the largest logits
  A shift_z, shift_r;
  A centre;  // c
  A ratio;   // e_y ratio = e_x e^u

  __device__ explicit RiskSums(A c = 0)
      : top_z(kLogitFloor<A>),
        top_r(kLogitFloor<A>),
        shift_z(kLogitFloor<A>),
        shift_r(kLogitFloor<A>),
        centre(c),
        ratio(1) {
    FASTEDIT_UNROLL
    for (A& one : sum) one = 0;
  }

  // Logits z and r (N), lifted to the floor, and the largest of each. r is not read for ce.
  template <int N>
  __device__ void add(const A (&z)[N], A largest_z, const A (&r)[N], A largest_r) {
    top_z = larger(top_z, largest_z);
    top_r = larger(top_r, largest_r);
    if (largest_z > shift_z + kSlack || (kDiverges && largest_r > shift_r + kSlack)) {
      move(larger(shift_z, largest_z), larger(shift_r, largest_r));
    }
    FASTEDIT_UNROLL
    for (int i = 0; i < N; ++i) add_one(z[i], kDiverges ? r[i] : z[i]);
  }

  // The same sums about other shifts.
  __device__ void move(A to_z, A to_r) {
    const A by_z = (shift_z - to_z) * kLog2E<A>, factor_z = power2(by_z);
    if constexpr (kDiverges) {
      const A factor_r = power2((shift_r - to_r) * kLog2E<A>), factor = kForward ? factor_r : factor_z;
      sum[kMixed] = factor * (sum[kMixed] + by_z * sum[kForward ? kW : kU]);
      sum[kU] *= factor;
      sum[kW] *= factor;
      if constexpr (kForward) sum[kMeanR] = factor_r * (sum[kMeanR] + by_z * sum[kSumR]);
      sum[kSumR] *= factor_r;
      ratio = power2((kForward ? to_z - to_r - centre : to_r - to_z - centre) * kLog2E<A>);
    }
    sum[kMeanZ] = factor_z * (sum[kMeanZ] + by_z * sum[kSumZ]);
    sum[kSumZ] *= factor_z;
    shift_z = to_z;
    shift_r = to_r;
  }

 private:
  __device__ void add_one(A z, A r) {
    const A a = (z - shift_z) * kLog2E<A>, e_z = power2(a);
    sum[kSumZ] += e_z;
    sum[kMeanZ] += e_z * a;
    if constexpr (kDiverges) {
      const A e_r = power2((r - shift_r) * kLog2E<A>), b = kForward ? e_r : e_z;
      const A u = (kForward ? z - r : r - z) - centre;
      const A bu = b * u, bw = weighted_expm1(b, u, ratio * (kForward ? e_z : e_r));
      sum[kSumR] += e_r;
      sum[kU] += bu;
      sum[kW] += bw;
      sum[kMixed] += (kForward ? bw : bu) * a;
      if constexpr (kForward) sum[kMeanR] += e_r * a;
    }
  }
};

// From the sums of a whole row about its largest logits. label is the logit of ce's label.
template <RiskKind kind, class A>
__device__ TokenRisk<A> finish_risk(const RiskSums<kind, double>& s, double label, RiskStats<A>& stats) {
  const double log_sum = ::log(s.sum[kSumZ]), mean = kLn2 * s.sum[kMeanZ] / s.sum[kSumZ];  // about the largest
  stats.max = static_cast<A>(s.top_z);
  stats.sum = static_cast<A>(s.sum[kSumZ]);
  stats.mean = static_cast<A>(s.top_z + mean);
  stats.fourth = stats.fifth = 0;
  if constexpr (kind == RiskKind::ce) {
    // a label of probability zero has an infinite risk, save where every logit is -inf and all are alike
    const double lead = s.top_z <= kLogitFloor<A> && label == label ? 0 : s.top_z - label;
    return {static_cast<A>(lead + log_sum), static_cast<A>(lead + mean)};
  } else {
    constexpr bool forward = kind == RiskKind::forward_kl;
    const double own = s.sum[forward ? kSumR : kSumZ];
    const double u = s.sum[kU] / own, w = s.sum[kW] / own, mixed = kLn2 * s.sum[kMixed] / own;
    const double lse_z = s.top_z + log_sum, lse_r = s.top_r + ::log(s.sum[kSumR]);
    // a NaN is far, and stays one
    const bool close = w > -0.9 && w < 1e18;
    const double value =
        close ? ::log1p(w) - u : (forward ? lse_z - lse_r : lse_r - lse_z) - u - static_cast<double>(s.centre);
    double env_grad;
    if constexpr (forward) {
      const double mean_r = kLn2 * s.sum[kMeanR] / own;
      env_grad = close ? (mixed - w * mean_r) / (1 + w) : mean - mean_r;
      stats.fourth = static_cast<A>(s.top_r);
      stats.fifth = static_cast<A>(own);
    } else {
      env_grad = mean * u - mixed;
      stats.fourth = static_cast<A>(-(s.centre + u));
      stats.fifth = static_cast<A>(env_grad);
    }
    return {static_cast<A>(value), static_cast<A>(env_grad)};
  }
}

// Gradient of on_value value + on_env env_grad by a token's logits.
template <RiskKind kind, class A>
struct RiskGradient {
  A max, inverse, mean, fourth, fifth, on_env, both;

  __device__ RiskGradient(const RiskStats<A>& s, A on_value, A on_env_grad)
      : max(s.max),
        inverse(1 / s.sum),
        mean(s.mean),
        fourth(s.fourth),
        fifth(kind == RiskKind::forward_kl ? 1 / s.fifth : s.fifth),
        on_env(on_env_grad),
        both(on_value + on_env_grad) {}

  // Of ce without its label's term, which takes both away.
  __device__ A at(A z, A r) const {
    const A p = power2((z - max) * kLog2E<A>) * inverse, a = z - mean;
    if constexpr (kind == RiskKind::ce) {
      return p * (on_env * a + both);
    } else if constexpr (kind == RiskKind::forward_kl) {
      const A q = power2((r - fourth) * kLog2E<A>) * fifth;
      return (p - q) * both + p * (on_env * a);
    } else {
      const A b = (z - r) - fourth;
      return p * (b * (on_env * a + both) + on_env * (a - fifth));
    }
  }
};

}  // namespace fastedit::gpu
