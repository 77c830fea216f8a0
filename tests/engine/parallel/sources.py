"""Models whose workers fail or die at a question, for tests; workers import this."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastedit.backbone import EditableModel, Encoded
from fastedit.engine.parallel.source import ModelSource
from fastedit.requests import Query


@dataclass(frozen=True)
class Failing:
    """Opens a model that fails where it is asked a question with some word in it.

    Args:
        source: of the model. word: in the question. kill: end the process instead of raising.
        once: a file that is made at the first failure, after which there is none; None fails each time.
    """

    source: ModelSource
    word: str
    kill: bool = False
    once: Path | None = None

    def open(self, device: str | None) -> EditableModel:
        model = self.source.open(device)
        stock: Any = model.encode

        def encode(queries: Sequence[Query], *, answers: bool) -> Encoded:
            if any(self.word in query.prompt for query in queries) and not (self.once and self.once.exists()):
                if self.once:
                    self.once.touch()
                if self.kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError(f"cannot be asked about {self.word}")
            encoded: Encoded = stock(queries, answers=answers)
            return encoded

        model.encode = encode  # type: ignore[method-assign]
        return model
