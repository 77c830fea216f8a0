"""Scores: metrics without model calls, and the two protocols that use them."""

from fastedit.evaluation.bootstrap import Score, bootstrap, bootstrap_difference, bootstrap_over_groups
from fastedit.evaluation.normalise import contains, exact_match, normalise, token_f1
from fastedit.evaluation.protocol import (
    HELD_OUT,
    MUST_CHANGE,
    MUST_STAY,
    PROTOCOLS,
    UNSEEN,
    EditScores,
    EvaluationView,
    evaluation_views,
    mean_by_name,
    summarise,
)

__all__ = [
    "HELD_OUT",
    "MUST_CHANGE",
    "MUST_STAY",
    "PROTOCOLS",
    "UNSEEN",
    "EditScores",
    "EvaluationView",
    "Score",
    "bootstrap",
    "bootstrap_difference",
    "bootstrap_over_groups",
    "contains",
    "evaluation_views",
    "exact_match",
    "mean_by_name",
    "normalise",
    "summarise",
    "token_f1",
]
