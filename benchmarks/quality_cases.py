"""What ``quality.py`` runs, as data: every method with and without ODEdit, in sequence, across tasks, ablated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: The five scores of the field; their mean over an edit is ``mean_of_five``.
FIVE = ("reliability", "text_generality", "image_generality", "text_locality", "image_locality")
#: What is shown beside them: same question about another image, same image with another question.
CLOSE = ("near", "same")
SCORES = (*FIVE, *CLOSE)

#: In the order of the tables.
METHODS = ("ft", "ft-vision", "lora", "ke", "tpatcher", "mend", "serac", "ike", "wise", "grace", "unike", "ldke")
#: Nothing is fitted or trained, so there is nothing to put another objective on.
UNFITTED = ("ike",)
MODELS = ("pocket-llava", "pocket-blip2")
DATA = ("pocket-vqa", "pocket-caption")
#: VQA and caption edits by turns.
MIXED = "pocket-vqa+pocket-caption"
GAPS = (1, 5, 10, 20, 100, 1000)

#: UniKE's neurons act a little everywhere, and that adds up; found on the train split.
LASTING = ("unike, few neurons", {"layers": 1, "n": 3, "margin": 3.0})


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        table: "single", "sequential", "cross-task", or "ablation-<of what>".
        model, data: embedded names.
        method: as ``fastedit.edit`` takes it.
        label: how it is told from others of its table; the method's name by default.
        settings: overrides. training: overrides of ``fastedit.train`` for the method's trained parts.
        edits: how many. score_at: gaps of a sequence.
    """

    table: str
    model: str
    data: str
    method: str
    label: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    edits: int = 1000
    score_at: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Unique among the cases."""
        return "/".join((self.table, self.model, self.data, self.label or self.method))

    @property
    def mode(self) -> str:
        """Of ``fastedit.edit``."""
        return "sequential" if self.table in ("sequential", "cross-task") else "single"


def single(edits: int) -> list[Case]:
    """Every method and ODEdit on each, on both models and both sets."""
    return [
        Case("single", model, data, method, edits=edits)
        for data in DATA
        for model in MODELS
        for base in METHODS
        for method in ((base,) if base in UNFITTED else (base, f"odedit+{base}"))
    ]


def sequential(edits: int, methods: Sequence[str]) -> list[Case]:
    """Edits that stay while others follow, scored at gaps."""
    gaps = tuple(gap for gap in GAPS if gap < edits)
    variants = [(method, "", {}) for method in methods] + ([("unike", *LASTING)] if "unike" in methods else [])
    return [Case("sequential", MODELS[0], DATA[0], *variant, edits=edits, score_at=gaps) for variant in variants]


def cross_task(edits: int, methods: Sequence[str]) -> list[Case]:
    """VQA and caption edits by turns in one sequence."""
    gaps = tuple(gap for gap in GAPS if gap < edits)
    return [Case("cross-task", MODELS[0], MIXED, method, edits=edits, score_at=gaps) for method in methods]


#: The rows of UniKE's ablation table (arXiv 2409.19872, table 4) and of its figures on the direction and on alpha.
UNIKE: Mapping[str, Mapping[str, Any]] = {
    "full": {},
    "intrinsic only": {"extrinsic": "none", "zeta": "none"},
    "Latent-IKE only": {"intrinsic": False},
    "intrinsic + prompt IKE": {"extrinsic": "prompt", "zeta": "none"},
    "without collaboration": {"zeta": "none", "alpha": 0.5},
    "zeta none": {"zeta": "none"},
    "zeta random": {"zeta": "random"},
    "zeta semantic": {"zeta": "semantic"},
    "alpha 0.1": {"alpha": 0.1},
    "alpha 0.5": {"alpha": 0.5},
    "alpha 0.9": {"alpha": 0.9},
}

#: ODEdit's parts (arXiv 2601.19700), on low-rank deltas.
ODEDIT: Mapping[str, Mapping[str, Any]] = {
    "odedit, prompt_env": {},
    "paper": {"penalty": "paper"},
    "risk_env": {"penalty": "risk_env"},
    "token": {"penalty": "token"},
    "without TV": {"scale": 0.0},
    "without R_gen": {"weights": (1.0, 1.0, 0.0)},
    "without R_loc": {"weights": (1.0, 0.0, 1.0)},
    "frozen lambda": {"learn_dual": False},
}

#: Which two of three candidate layers the LDKE-style editor changes, and what the classifier is worth.
LDKE: Mapping[str, Mapping[str, Any]] = {
    "as it is": {},
    "without classifier": {"route": False},
    "localized 2": {"route": False, "top": 2},
    "localized 2, by weight gradients": {"route": False, "top": 2, "score": "weight"},
    "localized 2, neighbours": {"route": False, "top": 2, "window": True},
    "voted 2": {"route": False, "top": 2, "layers": "voted"},
    "random 2": {"route": False, "top": 2, "layers": "random"},
    "last 2": {"route": False, "layers": 2},
    "layers 1 and 2": {"route": False, "layers": (1, 2)},
    "layers 1 and 3": {"route": False, "layers": (1, 3)},
}
#: All sets of two of the three candidates: what the best of them is for an edit, brute force finds.
EVERY_SET = ("last 2", "layers 1 and 2", "layers 1 and 3")


def ablations(edits: int) -> list[Case]:
    """Parts taken away, on the first model and set."""
    tables = {"odedit": ("odedit+lora", ODEDIT), "unike": ("unike", UNIKE), "ldke": ("ldke", LDKE)}
    return [
        Case(f"ablation-{name}", MODELS[0], DATA[0], method, label, settings, edits=edits)
        for name, (method, rows) in tables.items()
        for label, settings in rows.items()
    ]
