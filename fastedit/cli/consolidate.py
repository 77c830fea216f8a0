"""``fastedit consolidate``: one change of weights for all edits of a ledger, written for other programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

import fastedit
from fastedit.cli.documents import print_document, print_lines, text_table
from fastedit.cli.ledger_model import Loading, one_change, require_ledger, with_model
from fastedit.evaluation import MUST_CHANGE, MUST_STAY

#: What one change of weights can be written as.
KINDS = ("delta", "merged", "peft")
#: Of ``fastedit.consolidate``, beside the fields of the method.
ARGUMENTS = ("batch_size", "views", "seed")


def consolidate_edits(
    console: Console,
    folder: Path,
    kind: str,
    out: Path,
    *,
    method: str,
    settings: Mapping[str, Any],
    overwrite: bool,
    loading: Loading,
    as_json: bool,
) -> None:
    """Fit the change, say which edits hold with it, and write it.

    Args:
        settings: of ``fastedit.consolidate``: batch_size, views, seed and the method's fields.
    """
    from fastedit.export import export_deltas
    from fastedit.export.placing import require_free
    from fastedit.methods import resolve

    if kind not in KINDS:
        raise ValueError(f"consolidate: kind is one of {', '.join(KINDS)} (got kind={kind!r})")
    if kind == "peft" and not method.endswith("lora"):
        raise ValueError(f"consolidate: adapters are of low rank, by method lora or kl+lora (got method={method!r})")
    resolve(method, {name: value for name, value in settings.items() if name not in ARGUMENTS})
    require_ledger(folder)
    require_free(out, overwrite)
    with with_model(folder, loading) as opened:
        assert opened.model is not None
        with one_change(opened):
            done = fastedit.consolidate(opened.model, opened, method, **settings)
        answers = {
            number: each.answers[0]["after"] for number, each in zip(done.edits, done.scores.edit_scores, strict=True)
        }
        lost = [(opened.show(number), answers[number]) for number in done.lost]
        written = export_deltas(kind, opened.model, [done.delta], out, overwrite=overwrite)
    strict = done.scores.scores["strict"]
    scores = {name: strict[name].mean for name in (*MUST_CHANGE, *MUST_STAY) if name in strict}
    if as_json:
        print_document(
            {
                "ledger": str(folder), "kind": kind, "folder": str(written.folder), "method": method,
                "edits": list(done.edits), "status": done.outcome.status, "steps": done.outcome.steps,
                "scores": scores, "event": done.event,
                "lost": [
                    {"edit": each.id, "prompt": each.prompt, "target": each.target, "answer": answer}
                    for each, answer in lost
                ],
            }
        )  # fmt: skip
        return
    print_lines(console, f"{done} ({done.outcome.steps} steps, event {done.event}); {kind}: {written.folder}")
    print_lines(console, ", ".join(f"{name} {value:.2f}" for name, value in scores.items()))
    if lost:
        rows = [(each.id, each.prompt, each.target, answer) for each, answer in lost]
        console.print(text_table("do not hold with the one change", ("id", "prompt", "target", "answer"), rows))
