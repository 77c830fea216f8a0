"""What each of several processes trains, for tests: ``python -m torch.distributed.run ... distributed.py FOLDER``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

import fastedit
from fastedit.cli.main import app
from fastedit.training import processes
from fastedit.training.state import State
from tests.engine.conftest import make_edits

STEPS, WHOLE_BATCH, RECORDS = 3, 4, 8
#: Without dropout in SERAC's heads: what is drawn for it differs between processes.
METHODS: dict[str, dict[str, Any]] = {
    "mend": {"layers": 1, "rank": 4, "valid_records": 2},
    "odedit+mend": {"layers": 1, "rank": 4, "valid_records": 2},
    "ke": {"layers": 1, "valid_records": 2},
    "serac": {"valid_records": 2, "scope_dropout": 0.0},
    "unike": {},
    "ldke": {"valid_records": 2},
}


@contextmanager
def noted(losses: list[float]) -> Iterator[None]:
    """Inside the block every loss of a training is noted."""
    stock = State.note

    def note(self: State, loss: float) -> None:
        losses.append(loss)
        stock(self, loss)

    State.note = note  # type: ignore[method-assign]
    try:
        yield
    finally:
        State.note = stock  # type: ignore[method-assign]


def spread() -> Any:
    """A model of which a layer's weights are elsewhere; on this machine that is the disk."""
    return fastedit.load("pocket-llava", device_map={"": "cpu", "model.language_model.layers.0": "disk"})


def trained(
    model: Any, method: str, batch_size: int, out: Path | None = None, together: bool = True, **changed: Any
) -> dict[str, Any]:
    """Losses by step, validation scores, and the sum of each tensor's squares."""
    losses: list[float] = []
    trainer = {"steps": STEPS, "batch_size": batch_size, "valid_every": 2, "checkpoint_every": 2, "lr": 1e-2}
    trainer |= {"warmup": 0, **changed}
    with noted(losses):
        artifact = fastedit.train(
            model, method, make_edits(RECORDS), out=out, trainer=trainer, show_progress=False, together=together,
            **METHODS[method],
        )  # fmt: skip
    return {
        "losses": losses,
        "scores": [entry["score"] for entry in artifact.metrics["validation"]],
        "sizes": {name: float(tensor.double().square().sum()) for name, tensor in artifact.tensors.items()},
    }


def arguments(out: Path) -> list[str]:
    """Of ``fastedit``: a training of one step."""
    made = ["train", "--method", "ke", "--model", "random:llava-tiny", "--limit", "4", "--steps", "1"]
    return [*made, "--trainer", "batch_size=1", "--set", "layers=1", "--set", "valid_records=1", "--out", str(out)]


def command(out: Path) -> str:
    """What ``fastedit train`` prints."""
    with redirect_stdout(StringIO()) as printed, redirect_stderr(printed):
        app(arguments(out), standalone_mode=False)
    return printed.getvalue()


def refused(call: Any) -> str:
    """What a call that is refused says."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    model = fastedit.load("random:llava-tiny", dtype="float64")
    rank = int(os.environ["RANK"])
    told: dict[str, Any] = {}
    size = WHOLE_BATCH // int(os.environ["WORLD_SIZE"])
    for method in METHODS:
        told[method] = trained(model, method, size)
    # One process began this, see the test
    told["resumed"] = trained(model, "mend", size, folder / "mend.safetensors")
    told["own"] = list(processes.own(range(5)))
    told["different_rates"] = refused(lambda: trained(model, "mend", size, lr=0.1 * (1 + rank)))
    told["different_sizes"] = refused(lambda: trained(model, "mend", size + rank))
    # By one of them alone, which waits for nobody
    told["alone"] = trained(model, "ke", WHOLE_BATCH, together=False) if rank == 1 else None
    told["spread"] = trained(spread(), "ke", size)
    told["command"] = command(folder / "ke.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
