"""Settings of ``unike``."""

from __future__ import annotations

from dataclasses import dataclass

from fastedit.deltas.attention_memory import READINGS, SEARCHES
from fastedit.methods.tpatcher import check_activation, check_places
from fastedit.settings import check_fit, check_ranges

TRUTHS = ("prediction", "target")
KEYS = ("tokens", "random")
EXTRINSIC = ("latent", "prompt", "none")
ZETAS = ("truthfulness", "semantic", "random", "none")


@dataclass(frozen=True)
class UniKEConfig:
    """Settings of ``unike`` (arXiv 2409.19872); what the paper leaves open was found on a train split.

    Every row of the paper's ablation is one: intrinsic only is ``extrinsic="none", zeta="none"``; Latent-IKE only is
    ``intrinsic=False``; intrinsic with in-context text is ``extrinsic="prompt", zeta="none"``; both without
    collaboration is ``zeta="none"`` and a number for ``alpha``. The figure on zeta is ``zeta``.

    Args:
        layers: an int n for the last n decoder layers, or layer numbers; None is the paper's last four, but at most
            half of the model's.
        intrinsic: extra neurons. n: how many in every layer.
        keys: what the neurons start from: "tokens", the edit's own inputs in turn, as T-Patcher's; "random", as the
            paper's code.
        activation: of the neurons: "relu", "gelu", "silu"; None is the model's own, as the paper has it. Only "relu" is
            silent where a neuron is not asked: what the others let through adds up in a sequence.
        activation_weight, memory_weight, margin, most, memory: of T-Patcher's losses on the neurons, see
            ``TPatcherConfig``; the first goes with "tokens". The paper's code has them and leaves them off.
        extrinsic: "latent", what attention finds in a memory; "prompt", the edit as text before every question; "none".
        top_k: states that a query finds, the paper's 40 being of its 15,000; an edit's own entry counts where it is
            nearer than the last of them. reading, search, rescale: see
            ``AttentionMemoryDelta``.
        alpha: inclusion of knowledge: "dynamic", or a number.
        own: most entries that an edit has in the memory of a layer, one for each token of its target from the first; 0
            is the paper's, where knowledge is mixed in everywhere.
        gain: factor on shares and states of knowledge, which move by the rate of the neurons.
        zeta: direction that is added to values: "truthfulness", "semantic", "random" or "none". beta: its factor.
        demonstrations: in-context ones of "prompt", from a pool.
        steps: most optimiser steps. lr: of AdamW; None is 2.6 / hidden size (2e-2 at 128).
        clip: largest gradient norm of an edit; None is off. weight_decay: on what is fitted.
        positions: "all", "after_image" or "answer" (from the last token of the prompt on): where the delta acts.
        stop_loss: stop an edit when its NLL is below this and every target token is the argmax; None never stops.
        check_every: the host asks every so many steps which edits have ended; the deltas are the same.
        capture: replay steps as CUDA graphs (``SolverConfig``); off, as no GPU has run it yet.
        seed: of first keys, the same for every edit, and of a random direction.
        truth: which answer of a record is right: "prediction" where edits are counterfactual, "target" where they
            correct the model. triplets: most that the memory has. width: of codes. temperature: of their losses.
            valid_records: triplets that are kept from training the encoders.
    """

    layers: int | tuple[int, ...] | None = None
    intrinsic: bool = True
    n: int = 10
    keys: str = "tokens"
    activation: str | None = "relu"
    activation_weight: float = 1.0
    memory_weight: float = 1.0
    margin: float = 1.0
    most: int = 1000
    memory: int = 2048
    extrinsic: str = "latent"
    top_k: int = 1
    reading: str = "raw"
    search: str = "codes"
    rescale: bool = True
    alpha: str | float = "dynamic"
    own: int = 4
    gain: float = 5.0
    zeta: str = "truthfulness"
    beta: float = 0.1
    demonstrations: int = 16
    steps: int = 60
    lr: float | None = None
    clip: float | None = 1.0
    weight_decay: float = 0.0
    positions: str = "answer"
    stop_loss: float | None = 0.02
    check_every: int = 1
    capture: bool = False
    seed: int = 0
    truth: str = "prediction"
    triplets: int = 4000
    width: int = 256
    temperature: float = 0.07
    valid_records: int = 200

    def __post_init__(self) -> None:
        choices = {"extrinsic": EXTRINSIC, "reading": READINGS, "search": SEARCHES, "zeta": ZETAS}
        for name, known in {**choices, "truth": TRUTHS, "keys": KEYS}.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unike: {name} is one of {list(known)} (got {name}={getattr(self, name)!r})")
        check_fit("unike", self)
        least = {"n": 1, "top_k": 1, "most": 1, "width": 1, "triplets": 2, "memory": 0, "own": 0, "valid_records": 1}
        check_ranges(
            "unike",
            self,
            at_least={**least, "demonstrations": 0},
            positive=("temperature", "gain"),
            not_negative=("activation_weight", "memory_weight", "margin", "alpha"),
        )
        if self.alpha != "dynamic" and not isinstance(self.alpha, (int, float)):
            raise ValueError(f"unike: alpha is 'dynamic' or a number (got alpha={self.alpha!r})")
        if not self.intrinsic and self.extrinsic != "latent":
            raise ValueError(f"unike: without neurons extrinsic is 'latent' (got extrinsic={self.extrinsic!r})")
        check_activation("unike", self.activation)
        check_places("unike", self.positions)

    @property
    def steers(self) -> bool:
        """Whether a direction is added to the values."""
        return self.intrinsic and self.zeta != "none"

    @property
    def learns(self) -> bool:
        """Whether anything of the trained part is used."""
        return self.extrinsic == "latent" or (self.intrinsic and self.zeta in ("truthfulness", "semantic"))
