// The two passes of risk over one token's logits.
#pragma once

#include <cstdint>

namespace fastedit {

enum class RiskKind { ce, forward_kl, reverse_kl };

// What the first pass leaves of a token. max, sum and mean are those of the logits z: max z, sum e^(z - max), E_p[z].
// The last two are for forward_kl the max and sum of the reference logits r, for reverse_kl E_p[z - r] and
// h = Cov_p(z, z - r).
template <class A>
struct RiskStats {
  A max, sum, mean, fourth, fifth;
};

template <class A>
struct TokenRisk {
  RiskStats<A> stats;
  A value, env_grad;
};

#define FASTEDIT_DECLARE_RISK(isa)                                                                             \
  namespace isa {                                                                                              \
  /* z, r (V); r is not read for ce, label not elsewhere */                                                    \
  template <RiskKind kind, class T, class A>                                                                   \
  TokenRisk<A> token_risk(const T* z, const T* r, int64_t label, int64_t V);                                   \
  /* gradient (V) of on_value value + on_env env_grad; stream writes past the caches */                        \
  template <RiskKind kind, class T, class A>                                                                   \
  void token_gradient(const T* z, const T* r, int64_t label, int64_t V, const RiskStats<A>& stats, A on_value, \
                      A on_env, T* out, bool stream);                                                          \
  }

FASTEDIT_DECLARE_RISK(avx2)
FASTEDIT_DECLARE_RISK(avx512)
#undef FASTEDIT_DECLARE_RISK

}  // namespace fastedit
