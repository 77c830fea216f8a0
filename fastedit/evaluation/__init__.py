"""Scores: metrics without model calls, and the two protocols that use them."""

from fastedit.evaluation.bootstrap import Score, bootstrap, bootstrap_difference
from fastedit.evaluation.metrics import (
    all_right,
    jaccard_agreement,
    kl_divergence,
    logit_agreement,
    ranked_agreement,
    token_accuracy,
    top_ids,
)
from fastedit.evaluation.normalise import contains, exact_match, normalise, token_f1
from fastedit.evaluation.protocol import (
    MUST_CHANGE,
    MUST_STAY,
    PROTOCOLS,
    EditScores,
    EvaluationView,
    evaluation_views,
    mean_by_name,
    summarise,
)

__all__ = [
    "MUST_CHANGE",
    "MUST_STAY",
    "PROTOCOLS",
    "EditScores",
    "EvaluationView",
    "Score",
    "all_right",
    "bootstrap",
    "bootstrap_difference",
    "contains",
    "evaluation_views",
    "exact_match",
    "jaccard_agreement",
    "kl_divergence",
    "logit_agreement",
    "mean_by_name",
    "normalise",
    "ranked_agreement",
    "summarise",
    "token_accuracy",
    "token_f1",
    "top_ids",
]
