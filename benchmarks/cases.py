"""What to run, as data: cases, sweeps, and made-up edits for models whose weights know nothing."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from fastedit.methods import EditPlan
    from fastedit.requests import EditRequest

DTYPES = ("float32", "bfloat16", "float16", "float64")
#: Methods whose config names one layer.
ONE_LAYER = ("grace", "wise")


@dataclass(frozen=True)
class Case:
    """One comparison: the same edits, made by every implementation.

    Args:
        name: of the stored rows.
        model: as ``fastedit.load`` takes it. data: edits of a trained model; "" makes edits up.
        method: "ft", "lora", "grace", "wise", or the engine alone: "odedit+lora" ...
        layers: the last so many decoder layers are edited; not used by methods with one layer, an option of theirs.
        steps: optimiser steps. stop_loss: stop earlier below this loss; None makes every edit take all steps, so that
            the work does not depend on what random weights happen to do.
        edits: how many. batch_size: of the engine.
        dtype, quantize, device, attention: of the model.
        words: words of a made-up question, for longer rows.
        evaluate: score the edits as well, and count that time.
        baselines: "plain_loop", "peft", "plain_onednn" (the plain loop multiplying as the engine does), or the engine
            run otherwise (see ``variants``); the first is what ratios refer to.
        repeats: timed runs of each implementation.
        gate_model: model of the float64 equality check where the case's own is too large for it; "" is the case's own.
        options: further fields of the method's config.
    """

    name: str = "default"
    model: str = "random:qwen2vl-77m"
    data: str = ""
    method: str = "ft"
    layers: int = 2
    steps: int = 10
    stop_loss: float | None = None
    edits: int = 16
    batch_size: int = 16
    dtype: str = "float32"
    quantize: str = "none"
    device: str = ""
    attention: str = ""
    words: int = 7
    evaluate: bool = False
    baselines: tuple[str, ...] = ("plain_loop",)
    repeats: int = 3
    seed: int = 0
    gate_model: str = ""
    options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "edits", "batch_size", "repeats", "words"):
            if getattr(self, name) < 1:
                raise ValueError(f"case: {name} is at least 1 (got {name}={getattr(self, name)!r})")
        if self.steps < 0:
            raise ValueError(f"case: steps is not negative (got steps={self.steps!r})")
        if self.dtype not in DTYPES:
            raise ValueError(f"case: dtype is one of {', '.join(DTYPES)} (got dtype={self.dtype!r})")

    @property
    def has_one_layer(self) -> bool:
        """Whether the method changes one layer, an option of it."""
        return self.method.rpartition("+")[2] in ONE_LAYER

    @property
    def where(self) -> str:
        """The layers that are edited, in words."""
        if self.has_one_layer:
            return f"layer {(self.options or {}).get('layer', 'at three quarters of the depth')}"
        return f"last {self.layers} layers"

    @property
    def overrides(self) -> dict[str, Any]:
        """Fields of the method's config."""
        placed = {} if self.has_one_layer else {"layers": self.layers}
        return {**placed, "steps": self.steps, "stop_loss": self.stop_loss, **(self.options or {})}

    @property
    def config(self) -> dict[str, Any]:
        """Settings for a stored row: everything but the name and the seed, which have fields of their own."""
        settings = asdict(self)
        del settings["name"], settings["seed"]
        return {**settings, "baselines": list(self.baselines), "options": dict(self.options or {})}

    def plan(self) -> EditPlan:
        """Method, objective and their settings.

        Raises:
            ValueError: unknown method or field.
        """
        from fastedit.methods import resolve

        return resolve(self.method, self.overrides, seed=self.seed)

    def loading(self) -> dict[str, Any]:
        """Keyword arguments of ``fastedit.load``."""
        return {
            "dtype": self.dtype,
            "quantize": self.quantize,
            "device": self.device or None,
            "attention": self.attention or None,
        }


_LARGE: dict[str, Any] = {"edits": 32, "batch_size": 32, "layers": 3, "dtype": "bfloat16", "steps": 20, "repeats": 2}
_LARGE |= {"device": "cuda"}
_LARGE_LORA = _LARGE | {"method": "lora"}
#: Weights, gradients and both moments of an edit of a 7B model are 4 to 7 GB: a batch of 32 fits no GPU.
_LARGE_FT = _LARGE | {"edits": 16, "batch_size": 8}
_STEPS_20: dict[str, Any] = {"steps": 20, "edits": 16, "batch_size": 16}
_REPHRASED: Mapping[str, Any] = {"kl_rephrases": True}
#: What editors of other toolkits are set to: one layer at two thirds of the depth, or attention maps of every layer
_WISE: dict[str, Any] = {"method": "wise", "steps": 10, "options": {"layer": 8}}
_GRACE: dict[str, Any] = {"method": "grace", "steps": 20, "options": {"layer": 8}}
_LORA_QV: dict[str, Any] = {"method": "lora", "steps": 10, "layers": 12, "options": {"names": ("q", "v")}}
_SINGLES: dict[str, Any] = {"edits": 4, "batch_size": 1}
#: NLL + KL on the views that ODEdit is fitted on
_KL_REPHRASED = "engine:kl+lora/kl_rephrases=true"

CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case(),
        Case("quick", "random:qwen2vl-tiny", steps=5, edits=4, batch_size=4),
        Case("ft-last2-10", steps=10),
        Case("ft-last2", baselines=("plain_loop", "plain_onednn"), **_STEPS_20),
        Case("ft-last1", layers=1, **_STEPS_20),
        Case("lora-last2", method="lora", baselines=("plain_loop", "peft", "plain_onednn"), **_STEPS_20),
        Case("lora-last1", method="lora", layers=1, baselines=("plain_loop", "peft"), **_STEPS_20),
        Case("ft-last2-evaluated", evaluate=True, **_STEPS_20),
        Case("lora-last2-evaluated", method="lora", evaluate=True, **_STEPS_20),
        Case("lora-last2-bf16", method="lora", dtype="bfloat16", **_STEPS_20),
        Case("ft-last2-bf16", dtype="bfloat16", **_STEPS_20),
        Case("lora-last2-nf4", method="lora", quantize="nf4", **_STEPS_20),
        Case("lora-last2-after-image", method="lora", options={"positions": "after_image"}, **_STEPS_20),
        # As other toolkits are set
        Case("wise-layer8", **_WISE),
        Case("lora-qv", **_LORA_QV),
        Case("grace-layer8", **_GRACE),
        Case("wise-layer8-singles", **_WISE, **_SINGLES),
        Case("lora-qv-singles", **_LORA_QV, **_SINGLES),
        Case("grace-layer8-singles", **_GRACE, **_SINGLES),
        # What an objective costs: beside another on the same five views, in the same run
        Case("kl-lora-last2", method="kl+lora", options=_REPHRASED, baselines=("engine:lora",), **_STEPS_20),
        Case("odedit-lora-last2", method="odedit+lora", baselines=(_KL_REPHRASED, "engine:lora"), **_STEPS_20),
        # What a dtype or quantization costs: the same edits, both models in memory
        Case("lora-last2-fp32-of-bf16", method="lora", dtype="bfloat16", baselines=("engine@float32",), **_STEPS_20),
        Case("lora-last2-fp32-of-nf4", method="lora", quantize="nf4", baselines=("engine@float32",), **_STEPS_20),
        Case("pocket-ft", "pocket-llava", "pocket-vqa", layers=1, steps=20, stop_loss=0.02, edits=64, batch_size=64),
        Case("pocket-lora", "pocket-llava", "pocket-vqa", "lora", steps=20, stop_loss=0.02, edits=64, batch_size=64),
        # Batch scaling in one run: a rate is per edit, so that the singles may be fewer
        Case(
            "pocket-lora-256",
            "pocket-llava",
            "pocket-vqa",
            "lora",
            steps=20,
            stop_loss=0.02,
            edits=256,
            batch_size=64,
            baselines=("engine/batch=1/edits=32",),
        ),
        Case("llava-1.5-7b-lora", "random:llava-1.5-7b", gate_model="random:llava-tiny", **_LARGE_LORA),
        Case("qwen2.5-vl-7b-lora", "random:qwen2.5-vl-7b", gate_model="random:qwen2.5vl-tiny", **_LARGE_LORA),
        Case("blip2-opt-2.7b-lora", "random:blip2-opt-2.7b", gate_model="random:blip2-tiny", **_LARGE_LORA),
        Case("llava-1.5-7b-ft", "random:llava-1.5-7b", gate_model="random:llava-tiny", **_LARGE_FT),
        Case("qwen2.5-vl-7b-ft", "random:qwen2.5-vl-7b", gate_model="random:qwen2.5vl-tiny", **_LARGE_FT),
        Case("blip2-opt-2.7b-ft", "random:blip2-opt-2.7b", gate_model="random:blip2-tiny", **_LARGE_FT),
    )
}

#: Float64 stand-ins of the same family for models too large to be checked in float64.
GATE_MODELS: Mapping[str, str] = {
    "random:llava-1.5-7b": "random:llava-tiny",
    "random:llava-1.5-13b": "random:llava-tiny",
    "random:llava-next-mistral-7b": "random:llava-next-tiny",
    "random:llava-onevision-7b": "random:llava-onevision-tiny",
    "random:blip2-opt-2.7b": "random:blip2-tiny",
    "random:minigpt4-7b": "random:minigpt4-tiny",
    "random:qwen2-vl-2b": "random:qwen2vl-tiny",
    "random:qwen2-vl-7b": "random:qwen2vl-tiny",
    "random:qwen2.5-vl-7b": "random:qwen2.5vl-tiny",
    "random:qwen3-vl-8b": "random:qwen3vl-tiny",
}

_NOUNS = (
    "bus",
    "cat",
    "dog",
    "horse",
    "house",
    "boat",
    "bird",
    "clock",
    "cup",
    "chair",
    "table",
    "tree",
    "train",
    "kite",
)
_ASKED = ("what colour is the", "how many people are near the", "what is on the", "where is the", "what kind is the")
_FILL = ("and", "what", "is", "behind", "the", "small", "wooden", "table", "near", "the", "old", "street", "sign")
_ANSWERS = ("red", "two", "a white horse", "no", "in the kitchen", "blue and green", "seven", "under the table")


def made_up_edits(count: int, *, seed: int = 0, words: int = 7, size: int = 224) -> list[EditRequest]:
    """Edits about random images: short questions, targets of one to three words, all views of an evaluation.

    Args:
        count: how many. seed: same seed, same edits.
        words: about how long a question is.
        size: pixels of a side.
    """
    from fastedit.requests import EditRequest

    rng = random.Random(seed)
    edits = []
    for number in range(count):
        noun, other = rng.sample(_NOUNS, 2)
        asked = _lengthened(f"{rng.choice(_ASKED)} {noun}", words)
        edits.append(
            EditRequest(
                prompt=asked,
                target=rng.choice(_ANSWERS),
                image=made_up_image(rng.randrange(2**31), size),
                rephrase=_lengthened(f"look at the {noun} and say {rng.choice(_ASKED)} {noun}", words),
                image_rephrase=made_up_image(rng.randrange(2**31), size),
                locality_prompt=_lengthened(f"what is the use of a {other}", words),
                locality_answer=rng.choice(_ANSWERS),
                image_locality_image=made_up_image(rng.randrange(2**31), size),
                image_locality_prompt=_lengthened(f"{rng.choice(_ASKED)} {other}", words),
                image_locality_answer=rng.choice(_ANSWERS),
                id=f"made-up-{seed}-{number}",
            )
        )
    return edits


def _lengthened(question: str, words: int) -> str:
    """The question with further words up to the wanted length."""
    missing = words - len(question.split())
    return " ".join([question, *(_FILL[i % len(_FILL)] for i in range(missing))])


def made_up_image(seed: int, size: int = 224) -> Image:
    """A random image with some large-scale structure."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


def edits_of(case: Case) -> list[EditRequest]:
    """The edits of a case.

    Raises:
        ValueError: the data has fewer edits than the case wants.
    """
    if not case.data:
        return made_up_edits(case.edits, seed=case.seed, words=case.words)
    import fastedit

    found: list[EditRequest] = list(fastedit.read_edits(case.data, limit=case.edits))
    if len(found) < case.edits:
        raise ValueError(f"case {case.name}: {case.data} has {len(found)} edits (got edits={case.edits})")
    return found


#: Baselines that are no form of the engine, and the methods that each can fit.
PLAIN_BASELINES: Mapping[str, tuple[str, ...]] = {
    "plain_loop": ("ft", "lora", "grace", "wise"),
    "peft": ("lora",),
    "plain_onednn": ("ft", "lora", "grace", "wise"),
}


def can_fit(baseline: str, case: Case) -> bool:
    """Whether a baseline can do the work of a case: only the engine has objectives beyond the plain one."""
    if baseline not in PLAIN_BASELINES:
        return True
    # Peft's adapters act at every position.
    everywhere = (case.options or {}).get("positions") != "after_image"
    return case.method in PLAIN_BASELINES[baseline] and (baseline != "peft" or everywhere)


def one_batch(case: Case) -> int:
    """Edits of a batch of the engine; at least two where locality views are drawn from a run's other edits."""
    drawn = "+" in case.method or case.method == "wise"
    return min(case.edits, max(case.batch_size, 2 if drawn else 1))


def fitting(case: Case) -> Case:
    """The case with only the baselines that can do its work."""
    return replace(case, baselines=tuple(name for name in case.baselines if can_fit(name, case)))


_SWEPT_NUMBERS = ("layers", "edits", "batch_size", "words", "steps")
_SWEPT_TEXTS = ("model", "method", "quantize", "dtype")


def sweep(case: Case, field: str, values: Sequence[str]) -> list[Case]:
    """One case per value of a field, named after it; baselines that cannot do a value's work are left out.

    Raises:
        ValueError: no such field, or a value that it cannot take.
    """
    if field not in _SWEPT_NUMBERS and field not in _SWEPT_TEXTS:
        known = ", ".join(sorted([*_SWEPT_NUMBERS, *_SWEPT_TEXTS]))
        raise ValueError(f"sweep: field is one of {known} (got {field!r})")
    made = []
    for value in values:
        if field in _SWEPT_NUMBERS and not value.isdigit():
            raise ValueError(f"sweep: values of {field} are numbers (got {value!r})")
        converted = int(value) if field in _SWEPT_NUMBERS else value
        changes: dict[str, Any] = {field: converted, "name": f"{case.name}/{field}={value}"}
        if field == "batch_size":
            # A batch is never larger than the number of edits.
            changes["edits"] = max(case.edits, int(value))
        if field == "model":
            changes["gate_model"] = GATE_MODELS.get(value, "")
        made.append(fitting(replace(case, **changes)))
        made[-1].plan()
    return made
