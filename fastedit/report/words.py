"""What scores, phases and methods are called on a page: in words, each with what it means."""

from __future__ import annotations

from dataclasses import dataclass

from fastedit.evaluation import UNSEEN


@dataclass(frozen=True)
class Meaning:
    """A title, and a sentence about it."""

    title: str
    text: str


_SCORES = {
    "reliability": Meaning("Reliability", "the edit's own question gets the new answer"),
    "text_generality": Meaning("Text generality", "the question in other words gets the new answer"),
    "image_generality": Meaning("Image generality", "the question about another picture of the thing gets it"),
    "polite": Meaning("Polite wording", "the question politely or carelessly put gets the new answer"),
    "portability": Meaning("Portability", "questions whose answer follows from the edit are answered so"),
    "text_locality": Meaning("Text locality", "an unrelated question without a picture is answered as before"),
    "image_locality": Meaning("Image locality", "an unrelated question about another picture is answered as before"),
    "near": Meaning("Other picture", "the same question about another picture is answered as before"),
    "blind": Meaning("No picture", "the same question without any picture is answered as before"),
    "same": Meaning("Other question", "another question about the same picture is answered as before"),
    "sibling": Meaning("Other object", "the question about another object in the picture is answered as before"),
    "negated": Meaning("Negated question", "the question with a \"not\" in it is answered as before"),
    "contrary": Meaning("False claim", "a false claim about the picture is answered as before"),
}  # fmt: skip

_PHASES = {
    "setup": Meaning("Setting up", "what the method makes once for all edits"),
    "encode": Meaning("Reading the records", "text and pictures become tokens"),
    "prefix": Meaning("Frozen layers", "layers below the edited ones, once per question"),
    "reference": Meaning("Reference answers", "what the unedited model says, where the objective wants it kept"),
    "tail_forward": Meaning("Edited layers", "forward pass of the layers from the first edited one on"),
    "objective": Meaning("Loss", "the objective and its derivatives at the final hidden states"),
    "backward": Meaning("Gradients", "backward pass through the edited layers"),
    "optimiser": Meaning("Optimiser", "steps of the deltas"),
    "compute": Meaning("Computing deltas", "deltas that a method gives at once, without steps"),
    "replay": Meaning("Replayed steps", "forward, backward and optimiser as a recorded graph on the GPU"),
    "retain": Meaning("Keeping earlier edits", "what a sequence does so that earlier edits still hold"),
    "store": Meaning("Storing deltas", "to host memory, and to the ledger where there is one"),
    "evaluation": Meaning("Scoring", "every question asked before and after; not editing"),
}

#: By base editor; a prefix says under which objective.
METHODS = {
    "ft": "fine-tuning (FT): the whole weights of chosen layers change",
    "ft-vision": "fine-tuning of the part between vision and language: the projector or the Q-Former",
    "lora": "low-rank adaptation (LoRA): a low-rank change beside chosen weights",
    "tpatcher": "Transformer-Patcher: one more neuron in the last feed-forward block for every wrong token",
    "unike": "UniKE, unified multimodal editing: more feed-forward neurons, and a memory in attention",
    "ldke": "LDKE: low-rank changes in the layers that localization finds, let through by a classifier",
    "wise": "WISE: a side copy of one feed-forward weight, chosen by how it is activated",
    "grace": "GRACE: a codebook of values, chosen by the nearest key",
    "mend": "MEND, Model Editor Networks with Gradient Decomposition: a trained network turns gradients into changes",
    "ke": "KE, KnowledgeEditor: a trained network gates the gradient",
    "serac": "SERAC: a trained counterfactual model answers in the scope of stored edits",
    "ike": "IKE, in-context knowledge editing: demonstrations before the question, nothing is fitted",
}
OBJECTIVES = {
    "kl": "with a Kullback-Leibler (KL) term that keeps other answers near those of the unedited model",
    "odedit": "under ODEdit's objective: three risks, a total-variation penalty, a multiplier",
}
STATUSES = {
    "converged": "stopped as soon as it held",
    "max_steps": "took all steps",
    "diverging": "took all steps and was going nowhere",
    "diverged": "failed: a value was not finite",
    "computed": "computed at once",
}
UNEDITED = "unedited model"
NFU = "necessary-FLOP utilisation (NFU)"
NFU_MEANING = "arithmetic that the edits cannot do without, over the time, over this machine's matrix-multiply peak"
#: Parameters below which the time goes to overhead and not to arithmetic.
LARGE_MODEL = 1_000_000_000


def score_meaning(name: str) -> Meaning:
    """What a score is called, and what it asks."""
    seen = next((first for first, twin in UNSEEN.items() if twin == name), name)
    meaning = _SCORES.get(seen) or Meaning(seen.replace("_", " ").capitalize(), "")
    if seen == name:
        return meaning
    return Meaning(f"{meaning.title}, new words", f"{meaning.text}; in words that nothing was trained on")


def phase_meaning(name: str) -> Meaning:
    """What a phase of a run is called, and what it does."""
    return _PHASES.get(name) or Meaning(name.replace("_", " ").capitalize(), "")


def method_words(method: str) -> str:
    """A method's name in words: "odedit+lora" is low-rank adaptation under ODEdit's objective."""
    objective, _, base = method.rpartition("+")
    words = METHODS.get(base, base)
    return f"{words}, {OBJECTIVES.get(objective, objective)}" if objective else words


def nfu_words(value: float | None, parameters: int | None) -> str:
    """The utilisation as per cent, or why none is shown."""
    if parameters is not None and parameters < LARGE_MODEL:
        return "not shown: on a model this small the time is overhead, and its share of the peak says nothing"
    return "not measured in this run" if value is None else f"{100 * value:.1f} %"


def count_of(number: int, noun: str) -> str:
    """ "1 edit", "1,200 edits"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def seconds_words(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def machine_words(machine: dict[str, object]) -> str:
    """The machine in a phrase: its GPU, else its processor."""
    if machine.get("gpu"):
        return str(machine["gpu"])
    threads = machine.get("threads")
    on = f" ({count_of(threads, 'thread')})" if isinstance(threads, int) else ""
    return f"{machine.get('cpu', 'an unknown processor')}{on}"
