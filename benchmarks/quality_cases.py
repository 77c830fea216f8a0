"""What ``quality.py`` runs, as data: every method with and without ODEdit, in sequence, across tasks, ablated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastedit.published import Case

#: The five scores of the field; their mean over an edit is ``mean_of_five``.
FIVE = ("reliability", "text_generality", "image_generality", "text_locality", "image_locality")
#: What is shown beside them: same question about another image, same image with another question.
CLOSE = ("near", "same")
SCORES = (*FIVE, *CLOSE)

#: In the order of the tables.
METHODS = ("ft", "ft-vision", "lora", "ke", "tpatcher", "mend", "serac", "ike", "wise", "grace", "unike", "ldke")
#: Nothing is fitted or trained, so there is nothing to put another objective on.
UNFITTED = ("ike",)
MODELS = ("pocket-llava", "pocket-blip2", "pocket-qwen2vl")
DATA = ("pocket-vqa", "pocket-caption")
#: VQA and caption edits by turns.
MIXED = "pocket-vqa+pocket-caption"
GAPS = (1, 5, 10, 20, 100, 1000)

#: Real knowledge behind real pictures, from the packages of the extra "smol"; a model forty times as large.
SMOL, ICONS = "smol-llava", ("icon-entity", "icon-vqa", "icon-caption")
#: What is run on it: what `docs/results.md` shows side by side, plain fine-tuning, and what asks it in context.
ON_ICONS = ("ft", "lora", "kl+lora", "odedit+lora", "grace", "wise", "ldke", "unike", "serac", "ike")

#: UniKE's neurons in one layer, which learn for all their steps to keep quiet elsewhere; found on the train split.
LASTING = ("unike, quieter", {"layers": 1, "margin": 3.0, "stop_loss": None})


#: The LDKE-style editor fitted on three paraphrases, pictures and questions that must stay, where one is the default.
THREE_VIEWS = ("ldke, three views", {"n_views": 3})

#: ``kl+x`` that sees what ``odedit+x`` sees: what the two differ by is MMD, total variation and multiplier.
CONTROL: Mapping[str, Any] = {"kl_rephrases": True}


def controlled(base: str) -> list[tuple[str, Mapping[str, Any]]]:
    """A method, its control and the same under ODEdit, with their settings."""
    return [(base, {})] if base in UNFITTED else [(base, {}), (f"kl+{base}", CONTROL), (f"odedit+{base}", {})]


def single(edits: int) -> list[Case]:
    """Every method, its control and ODEdit on each, ``ldke`` on three views, on the embedded models and both sets."""
    plain = [(method, "", settings) for base in METHODS for method, settings in controlled(base)]
    return [
        Case("single", model, data, *variant, edits=edits)
        for data in DATA
        for model in MODELS
        for variant in [*plain, ("ldke", *THREE_VIEWS)]
    ]


def on_icons(edits: int) -> list[Case]:
    """Methods on smol-llava, on its three sets, the quickest methods first."""
    return [
        Case("single", SMOL, data, method, settings=CONTROL if method.startswith("kl+") else {}, edits=edits)
        for method in ON_ICONS
        for data in ICONS
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
    "R_gen as in equation (9)": {"weights": (1.0, 1.0, 1.0)},
    "without R_loc": {"weights": (1.0, 0.0, 0.01)},
    "frozen lambda": {"learn_dual": False},
    "lambda a network of phi": {"dual": "network"},
    "the same, not differentiated": {"dual": "network-detached"},
    "lambda a number": {"dual": "scalar"},
    "three views": {"n_views": 3},
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
    """Parts taken away, on the first model and set; of ODEdit all of them but the data as well."""
    tables = {"odedit": ("odedit+lora", ODEDIT), "unike": ("unike", UNIKE), "ldke": ("ldke", LDKE)}
    control = Case("ablation-odedit", MODELS[0], DATA[0], "kl+lora", "control, kl+lora", CONTROL, edits=edits)
    rows = [
        Case(f"ablation-{name}", MODELS[0], DATA[0], method, label, settings, edits=edits)
        for name, (method, rows) in tables.items()
        for label, settings in rows.items()
    ]
    return [control, *rows]
