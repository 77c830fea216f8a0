"""Settings of ODEdit's objective."""

from __future__ import annotations

from dataclasses import dataclass

from fastedit.objectives.base import Direction
from fastedit.settings import check_ranges

#: Which environments the total variation runs over.
PENALTY_MODES = ("prompt_env", "risk_env", "paper", "token")
#: What λ is: a network of φ that the primal step differentiates, one that it does not, a number per edit, or constant.
DUALS = ("network", "network-detached", "scalar", "constant")


@dataclass(frozen=True)
class InvariantConfig:
    """Settings of the tripartite risk and the penalty.

    Args:
        penalty: which environments the total variation runs over: "prompt_env" (every view and the generality risk,
            mean), "risk_env" (reliability, locality, generality, sum), "paper" (their sum is one environment, equation
            (9) read literally), "token" (every label token).
        direction: of the locality KL; "reverse_kl" is KL(edited || unedited), equation (3).
        weights: of reliability, locality and generality; all 1 in equation (9). MMD² of weight 1 costs four points in
            the mean and thirteen on one model, of weight 0.01 nothing (docs/methods.md), hence the default.
        n_views: views of every role but the edit's own: so many paraphrases, pictures and questions that must stay.
            They are fitted on, and an environment's Γ is the mean over its views; of one view it is noise.
        dual: what λ is: "network", a network of φ that the primal step differentiates; "network-detached", one that it
            does not; "scalar", a number per edit; "constant". All but the last ascend. Measured, a λ that climbs costs
            more than it gains (docs/methods.md), hence the default.
        dual_lr: γ2, what an ascent step adds to log λ where T is at its running mean.
        learn_dual: False keeps λ at its calibrated value, whatever ``dual`` is (an ablation).
        scale: penalty size relative to the risk, by their running means when λ is calibrated.
        calibration: steps over which λ is calibrated, from the first with a penalty on; more than the fit has keep the
            penalty at its share of the risk all along.
        max_ratio: λ is capped at this many times its calibrated scale.
        backoff: what λ is multiplied by, for good, at each step before which an edit no longer says its target; below 1
            an edit also has no penalty before it says its target. 1: λ does not regard that.
        warmup: share of the steps before the penalty is switched on; from the first step on it holds some edits where
            the target is not yet said (docs/methods.md).
        smoothing: ε of the smoothed |Γ| = sqrt(Γ² + ε²) - ε.
        hidden: width of the multiplier's network.
        sketch: length of the count-sketch of φ that the network reads when φ is longer.
        unbiased: MMD² without its diagonal. Off: an edit has a handful of label tokens, and the unbiased form of so
            few is minimised below zero by pushing the edit's own tokens apart.
        seed: of the network and the sketch.
    """

    penalty: str = "prompt_env"
    direction: Direction = "reverse_kl"
    weights: tuple[float, float, float] = (1.0, 1.0, 0.01)
    n_views: int = 1
    dual: str = "constant"
    dual_lr: float = 0.1
    learn_dual: bool = True
    scale: float = 0.1
    calibration: int = 5
    max_ratio: float = 10.0
    backoff: float = 0.5
    warmup: float = 0.2
    smoothing: float = 1e-3
    hidden: int = 32
    sketch: int = 4096
    unbiased: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.penalty not in PENALTY_MODES:
            raise ValueError(f"odedit: penalty is one of {list(PENALTY_MODES)} (got penalty={self.penalty!r})")
        if self.direction not in ("reverse_kl", "forward_kl"):
            raise ValueError(f"odedit: direction is reverse_kl or forward_kl (got direction={self.direction!r})")
        if self.dual not in DUALS:
            raise ValueError(f"odedit: dual is one of {list(DUALS)} (got dual={self.dual!r})")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"odedit: warmup is a share of the steps, 0 to 1 (got warmup={self.warmup!r})")
        if not 0 <= self.backoff <= 1:
            raise ValueError(f"odedit: backoff is a factor from 0 to 1 (got backoff={self.backoff!r})")
        numbers = ("dual_lr", "scale", "max_ratio", "smoothing")
        whole = ("hidden", "sketch", "n_views", "calibration")
        check_ranges("odedit", self, at_least=dict.fromkeys(whole, 1), not_negative=numbers)
        if len(self.weights) != 3 or min(self.weights) < 0:
            raise ValueError(f"odedit: weights are three numbers >= 0 (got weights={self.weights!r})")
