#include "cpu/simd/risk.h"

#include "cpu/simd/math.h"
#include "cpu/simd/vec.h"

// Closed forms: with p = softmax(z), a = z - E_p[z], v = z - r:
//   ce          value lse - z_y               env_grad E_p[z] - z_y
//   forward_kl  KL(q || p), q = softmax(r)    env_grad E_p[z] - E_q[z]
//   reverse_kl  KL(p || q)                    env_grad h = Cov_p(z, v)
// Both divergences are taken about u = c - v for a constant c close to the drift, through w = e^u - 1: with
// e = E_p[w], q = p (1 + w) / (1 + e), so nothing cancels when p and q are close.
namespace fastedit::FASTEDIT_ISA {

namespace {

// Logits at a time: both rows of a block stay in the first cache between the search for the maximum and the sums.
constexpr int64_t kBlock = 1024;
// Sums per token; which, says Sums.
constexpr int kSums = 5;

// Logits below are taken for it: probability zero, and products of two of them stay finite.
template <class A>
constexpr A kLogitFloor = sizeof(A) == 8 ? A(-1e100) : A(-1e15);
// Exponents beyond it leave the short way for two log-sum-exps.
template <class A>
constexpr A kFar = A(60);

template <class A, class T>
FASTEDIT_INLINE Vec<A> load(const T* p) {
  return max(Vec<A>::set(kLogitFloor<A>), Vec<A>::load(p));
}
// Lanes from n on hold the floor: they weigh nothing.
template <class A, class T>
FASTEDIT_INLINE Vec<A> load(const T* p, int64_t n) {
  const Vec<A> floor = Vec<A>::set(kLogitFloor<A>);
  return first(floor, max(floor, Vec<A>::load(p, n)), n);
}

template <class A, class T>
FASTEDIT_INLINE A block_max(const T* p, int64_t n) {
  using V = Vec<A>;
  const V floor = V::set(kLogitFloor<A>);
  V top[4] = {floor, floor, floor, floor};
  int64_t i = 0;
  // a NaN on the left is passed over
  for (; i + 4 * V::width <= n; i += 4 * V::width) {
    for (int j = 0; j < 4; ++j) top[j] = max(V::load(p + i + j * V::width), top[j]);
  }
  for (; i < n; i += V::width) top[0] = max(first(floor, V::load(p + i, n - i), n - i), top[0]);
  return largest(max(max(top[0], top[1]), max(top[2], top[3])));
}

template <class A>
FASTEDIT_INLINE double wide_sum(Vec<A> v) {
  A lanes[Vec<A>::width];
  v.store(lanes);
  double total = 0;
  for (A lane : lanes) total += static_cast<double>(lane);
  return total;
}

// Sums over the logits, e = exp(z - max):
//   all         0: e             1: e (z - max)
//   reverse_kl  2: e u           3: e u (z - max)   4: e w
//   forward_kl  2: e (1 + w) u   3: e w (z - max)   4: e w
template <RiskKind kind, class A>
struct Sums {
  using V = Vec<A>;
  V sum[kSums];
  V top;  // largest u

  static Sums zero() {
    Sums s;
    for (V& one : s.sum) one = V::zero();
    s.top = V::set(-kFar<A>);
    return s;
  }

  FASTEDIT_INLINE void add(Sums& s, V z, V r, V max_z, V c) {
    const V a = z - max_z, e = exp(a);
    s.sum[0] = s.sum[0] + e;
    s.sum[1] = fma(e, a, s.sum[1]);
    if constexpr (kind != RiskKind::ce) {
      const V u = (r - z) + c;
      s.top = max(u, s.top);
      const V w = expm1(min(V::set(kFar<A>), u)), ew = e * w;
      s.sum[4] = s.sum[4] + ew;
      if constexpr (kind == RiskKind::reverse_kl) {
        const V eu = e * u;
        s.sum[2] = s.sum[2] + eu;
        s.sum[3] = fma(eu, a, s.sum[3]);
      } else {
        s.sum[2] = fma(e + ew, u, s.sum[2]);
        s.sum[3] = fma(ew, a, s.sum[3]);
      }
    }
  }

  // From one maximum to a larger one: by the factor e^shift, and z - max gains the shift.
  void rescale(A shift) {
    const V d = V::set(shift), f = V::set(static_cast<A>(__builtin_exp(static_cast<double>(shift))));
    sum[1] = fma(d, sum[0], sum[1]);
    sum[3] = fma(d, sum[kind == RiskKind::reverse_kl ? 2 : 4], sum[3]);
    for (V& one : sum) one = one * f;
  }

  void merge(const Sums& block) {
    for (int j = 0; j < kSums; ++j) sum[j] = sum[j] + block.sum[j];
    top = max(block.top, top);
  }
};

// Two plain log-sum-exps, for logits too far from their reference for the short way.
template <RiskKind kind, class T, class A>
void far_risk(const T* z, const T* r, int64_t V, TokenRisk<A>& token) {
  using Lanes = Vec<A>;
  A max_r = kLogitFloor<A>;
  for (int64_t k = 0; k < V; k += kBlock) {
    const A top = block_max<A>(r + k, V - k < kBlock ? V - k : kBlock);
    max_r = top > max_r ? top : max_r;
  }
  double sum_r = 0, drift = 0, q_z = 0;
  for (int64_t k = 0; k < V; k += kBlock) {
    Lanes part_sum = Lanes::zero(), part_drift = Lanes::zero(), part_z = Lanes::zero();
    for (int64_t i = k; i < V && i < k + kBlock; i += Lanes::width) {
      const Lanes own = load<A>(z + i, V - i), other = load<A>(r + i, V - i);
      const Lanes e_r = exp(other - Lanes::set(max_r));
      part_sum = part_sum + e_r;
      if constexpr (kind == RiskKind::forward_kl) {
        part_drift = fma(e_r, other - own, part_drift);
        part_z = fma(e_r, own - Lanes::set(token.stats.max), part_z);
      } else {
        part_drift = fma(exp(own - Lanes::set(token.stats.max)), own - other, part_drift);
      }
    }
    sum_r += wide_sum(part_sum);
    drift += wide_sum(part_drift);
    q_z += wide_sum(part_z);
  }
  const double lse = token.stats.max + __builtin_log(static_cast<double>(token.stats.sum));
  const double lse_r = max_r + __builtin_log(sum_r);
  if constexpr (kind == RiskKind::forward_kl) {
    token.value = static_cast<A>(drift / sum_r + lse - lse_r);
    token.env_grad = static_cast<A>(token.stats.mean - token.stats.max - q_z / sum_r);
    token.stats.fourth = max_r;
    token.stats.fifth = static_cast<A>(sum_r);
  } else {
    token.value = static_cast<A>(drift / token.stats.sum - lse + lse_r);
  }
}

}  // namespace

template <RiskKind kind, class T, class A>
TokenRisk<A> token_risk(const T* z, const T* r, int64_t label, int64_t V) {
  using Lanes = Vec<A>;
  auto total = Sums<kind, A>::zero();
  A max_z = kLogitFloor<A>, c = 0;
  for (int64_t k = 0; k < V; k += kBlock) {
    const int64_t n = V - k < kBlock ? V - k : kBlock;
    const A top = block_max<A>(z + k, n);
    if (kind != RiskKind::ce && k == 0) {
      c = top - block_max<A>(r, n);
      if (!(c < A(1e4) && c > A(-1e4))) c = 0;
    }
    if (top > max_z) {
      if (k > 0) total.rescale(max_z - top);
      max_z = top;
    }
    const Lanes max_lanes = Lanes::set(max_z), c_lanes = Lanes::set(c);
    auto block = Sums<kind, A>::zero();
    int64_t i = 0;
    for (; i + Lanes::width <= n; i += Lanes::width) {
      // of the next block, which the search for its maximum would wait for
      _mm_prefetch(reinterpret_cast<const char*>(z + k + i + kBlock), _MM_HINT_T0);
      if constexpr (kind != RiskKind::ce) {
        _mm_prefetch(reinterpret_cast<const char*>(r + k + i + kBlock), _MM_HINT_T0);
      }
      const Lanes own = load<A>(z + k + i);
      Sums<kind, A>::add(block, own, kind == RiskKind::ce ? own : load<A>(r + k + i), max_lanes, c_lanes);
    }
    if (i < n) {
      const Lanes own = load<A>(z + k + i, n - i);
      Sums<kind, A>::add(block, own, kind == RiskKind::ce ? own : load<A>(r + k + i, n - i), max_lanes, c_lanes);
    }
    total.merge(block);
  }

  double sum = wide_sum(total.sum[0]);
  // where every logit is -inf the lanes behind the last one weigh as much
  if (max_z <= kLogitFloor<A> && sum == sum) sum = static_cast<double>(V);
  const double mean = wide_sum(total.sum[1]) / sum;  // about the maximum
  TokenRisk<A> token{};
  token.stats.max = max_z;
  token.stats.sum = static_cast<A>(sum);
  token.stats.mean = static_cast<A>(max_z + mean);
  if constexpr (kind == RiskKind::ce) {
    A lanes[Lanes::width];
    Lanes::load(z + label, 1).store(lanes);
    // as it is: a label of probability zero has an infinite risk, save where every logit is -inf and all are alike
    const double lead = max_z > kLogitFloor<A> ? static_cast<double>(max_z) - static_cast<double>(lanes[0]) : 0;
    token.value = static_cast<A>(lead + __builtin_log(sum));
    token.env_grad = static_cast<A>(lead + mean);
    return token;
  }
  const double e_u = wide_sum(total.sum[2]) / sum, e_w = wide_sum(total.sum[4]) / sum;
  const double mixed = wide_sum(total.sum[3]) / sum;
  if constexpr (kind == RiskKind::reverse_kl) {
    token.value = static_cast<A>(__builtin_log1p(e_w) - e_u);
    token.env_grad = static_cast<A>(mean * e_u - mixed);
    token.stats.fourth = static_cast<A>(c - e_u);
    token.stats.fifth = token.env_grad;
  } else {
    token.value = static_cast<A>(e_u / (1 + e_w) - __builtin_log1p(e_w));
    token.env_grad = static_cast<A>((mean * e_w - mixed) / (1 + e_w));
    token.stats.fourth = max_z - c;
    token.stats.fifth = static_cast<A>(sum * (1 + e_w));
  }
  if (largest(total.top) > kFar<A> || e_w < -0.9) far_risk<kind>(z, r, V, token);
  return token;
}

namespace {

template <RiskKind kind, class A>
struct Gradient {
  using V = Vec<A>;
  V max_z, inverse, mean, fourth, fifth, on_value, on_env, both;

  Gradient(const RiskStats<A>& s, A value, A env)
      : max_z(V::set(s.max)),
        inverse(V::set(1 / s.sum)),
        mean(V::set(s.mean)),
        fourth(V::set(s.fourth)),
        fifth(V::set(kind == RiskKind::forward_kl ? 1 / s.fifth : s.fifth)),
        on_value(V::set(value)),
        on_env(V::set(env)),
        both(V::set(value + env)) {}

  // Of ce without its label's term.
  FASTEDIT_INLINE V at(const Gradient& g, V z, V r) {
    const V p = exp(z - g.max_z) * g.inverse, a = z - g.mean;
    if constexpr (kind == RiskKind::ce) {
      return p * fma(g.on_env, a, g.both);
    } else if constexpr (kind == RiskKind::forward_kl) {
      const V q = exp(r - g.fourth) * g.fifth;
      return fma(p - q, g.both, p * (g.on_env * a));
    } else {
      const V b = (z - r) - g.fourth;
      return p * fma(b, fma(g.on_env, a, g.both), g.on_env * (a - g.fifth));
    }
  }
};

}  // namespace

template <RiskKind kind, class T, class A>
void token_gradient(const T* z, const T* r, int64_t label, int64_t V, const RiskStats<A>& stats, A on_value, A on_env,
                    T* out, bool stream) {
  using Lanes = Vec<A>;
  using G = Gradient<kind, A>;
  const G g(stats, on_value, on_env);
  const auto partial = [&](int64_t i, int64_t n) {
    const Lanes own = load<A>(z + i, n);
    G::at(g, own, kind == RiskKind::ce ? own : load<A>(r + i, n)).store(out + i, n);
  };
  int64_t i = 0;
  if (stream) {
    // up to the first aligned vector
    constexpr int64_t bytes = Lanes::width * sizeof(T);
    const int64_t past = reinterpret_cast<uintptr_t>(out) % bytes;
    i = past ? (bytes - past) / static_cast<int64_t>(sizeof(T)) : 0;
    i = i < V ? i : V;
    if (i > 0) partial(0, i);
    for (; i + Lanes::width <= V; i += Lanes::width) {
      _mm_prefetch(reinterpret_cast<const char*>(z + i + kBlock), _MM_HINT_T0);
      if constexpr (kind != RiskKind::ce) _mm_prefetch(reinterpret_cast<const char*>(r + i + kBlock), _MM_HINT_T0);
      const Lanes own = load<A>(z + i);
      G::at(g, own, kind == RiskKind::ce ? own : load<A>(r + i)).stream(out + i);
    }
  } else {
    for (; i + Lanes::width <= V; i += Lanes::width) {
      const Lanes own = load<A>(z + i);
      G::at(g, own, kind == RiskKind::ce ? own : load<A>(r + i)).store(out + i);
    }
  }
  if (i < V) partial(i, V - i);
  if (stream) _mm_sfence();
  if constexpr (kind == RiskKind::ce) {
    const Lanes own = load<A>(z + label, 1);
    (G::at(g, own, own) - g.both).store(out + label, 1);
  }
}

#define FASTEDIT_INSTANTIATE_KIND(kind, T, A)                                                                         \
  template TokenRisk<A> token_risk<RiskKind::kind, T, A>(const T*, const T*, int64_t, int64_t);                       \
  template void token_gradient<RiskKind::kind, T, A>(const T*, const T*, int64_t, int64_t, const RiskStats<A>&, A, A, \
                                                     T*, bool);
#define FASTEDIT_INSTANTIATE(T, A)            \
  FASTEDIT_INSTANTIATE_KIND(ce, T, A)         \
  FASTEDIT_INSTANTIATE_KIND(forward_kl, T, A) \
  FASTEDIT_INSTANTIATE_KIND(reverse_kl, T, A)
FASTEDIT_INSTANTIATE(float, float)
FASTEDIT_INSTANTIATE(BFloat16, float)
FASTEDIT_INSTANTIATE(Float16, float)
FASTEDIT_INSTANTIATE(double, double)
#undef FASTEDIT_INSTANTIATE
#undef FASTEDIT_INSTANTIATE_KIND

}  // namespace fastedit::FASTEDIT_ISA
