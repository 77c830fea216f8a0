"""``fastedit compare``: several methods on the same edits."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import fastedit
from fastedit.backbone import EditableModel
from fastedit.cli.failures import STOPPED, Ended, reason, sentence, status_of
from fastedit.cli.figure import draw_comparison
from fastedit.cli.tables import print_scores
from fastedit.engine import Run, RunInterrupted, RunStopped
from fastedit.engine.run import plain
from fastedit.files import write_json
from fastedit.methods import resolve, setting_names
from fastedit.report import REPORT, comparison_page, write_page
from fastedit.requests import EditRequest
from fastedit.training import load_artifact


def settings_per_method(methods: Sequence[str], settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings that each method has a field for.

    Raises:
        ValueError: a method that does not exist, or a setting that none of them has.
    """
    known = {name: setting_names(resolve(name, {})) for name in methods}
    for key, value in settings.items():
        if not any(key in fields for fields in known.values()):
            resolve(methods[0], {key: value})
    chosen = {name: {k: v for k, v in settings.items() if k in known[name]} for name in methods}
    for name, each in chosen.items():
        resolve(name, each)
    return chosen


class Comparison:
    """Methods on the same edits.

    Args:
        edits: what every method makes. pool: records that may be learned from.
        settings: by method.
        data: name of the edits. out: folder for the runs, the table and the picture.
        artifacts: folder of trained parts; those that are not there are trained on the pool and put there.
    """

    def __init__(
        self,
        edits: Sequence[EditRequest],
        pool: Sequence[EditRequest] | None,
        settings: Mapping[str, Mapping[str, Any]],
        *,
        data: str,
        out: Path,
        artifacts: Path,
    ) -> None:
        self.edits, self.pool, self.settings = edits, pool, settings
        self.data, self.out, self.artifacts = data, out, artifacts

    def trained_part(self, method: str, model: str) -> tuple[str, Path] | None:
        """Kind and file of a method's trained parts; None for a method without any."""
        plan = resolve(method, self.settings[method])
        kind = plan.artifact_kind
        if kind is None:
            return None
        return kind, self.artifacts / f"{Path(model).name}-{Path(self.data).stem}-{kind}.safetensors"

    def check_artifacts(self, model: str) -> None:
        """Refuse trained parts that are of another kind, or neither there nor to be trained, before any method runs.

        Raises:
            ValueError: names the file and the command that makes it.
        """
        for method in self.settings:
            part = self.trained_part(method, model)
            if part is None:
                continue
            kind, path = part
            if path.exists():
                load_artifact(path, kind=kind)
            elif not self.pool:
                command = f"fastedit train --method {kind} --out {path}"
                raise ValueError(
                    f"compare: {method} has parts to train, and no records to train on; run {command}, or give --pool "
                    "(got no pool)"
                )

    def run(self, console: Console, model: EditableModel, **options: Any) -> dict[str, Run]:
        """Run every method; print tables and write ``comparison.json``, a picture, a page and the runs.

        Args:
            options: of ``fastedit.edit``, for every method.
        Raises:
            Ended: a run ended early; what was finished is saved and shown.
        """
        runs: dict[str, Run] = {}
        for method in self.settings:
            try:
                runs[method] = self._run_method(console, model, method, options)
            except (Exception, KeyboardInterrupt) as error:
                raise self._ended(console, model, runs, method, error, options["mode"]) from error
        self.finish(console, model, runs, options["mode"])
        return runs

    def _run_method(self, console: Console, model: EditableModel, method: str, options: Mapping[str, Any]) -> Run:
        settings, part = self.settings[method], self.trained_part(method, model.name)
        if part is not None and not part[1].exists():
            assert self.pool
            console.print(f"{method}: training on {len(self.pool)} records, once", markup=False)
            fastedit.train(model, part[0], self.pool, out=part[1], **settings)
        start = time.perf_counter()
        trained = None if part is None else part[1]
        run = fastedit.edit(model, self.edits, method, pool=self.pool, artifact=trained, **options, **settings)
        run.save(self.folder(method))
        console.print(f"{method}: {len(self.edits)} edits in {time.perf_counter() - start:.1f} s", markup=False)
        return run

    def folder(self, method: str) -> Path:
        """Where the run of a method is saved."""
        return self.out / method.replace("+", "-")

    def _ended(
        self,
        console: Console,
        model: EditableModel,
        runs: dict[str, Run],
        method: str,
        error: BaseException,
        mode: str,
    ) -> BaseException:
        """The sentence about a comparison that ended early, once what is finished is written and shown."""
        if not runs and not isinstance(error, RunInterrupted | RunStopped):
            return error
        status = status_of(error)
        why = f"{method} ended early" if status != STOPPED else f"stopped in {method}"
        if status != STOPPED:
            why += f": {sentence(reason(error))}"
        finished = dict(runs)
        try:
            if isinstance(error, RunInterrupted | RunStopped) and error.run is not None:
                finished[f"{method} ({len(error.run.deltas)})"] = error.run
                error.run.save(self.folder(method))
            self.finish(console, model, finished, mode)
        except (OSError, ValueError) as lost:
            return Ended(f"{why}; what was finished could not be saved: {sentence(lost)}", status)
        left = [name for name in self.settings if name not in runs]
        return Ended(
            f"{why}; what was finished is saved in {self.out}; to go on, compare --methods {','.join(left)} with "
            "another --out",
            status,
        )

    def finish(self, console: Console, model: EditableModel, runs: Mapping[str, Run], mode: str) -> None:
        """Print the tables, write the record, the picture and the page."""
        print_scores(console, runs)
        records = {name: run.record() for name, run in runs.items()}
        record = {
            "model": model.name,
            "data": self.data,
            "n_edits": len(self.edits),
            "mode": mode,
            "runs": {name: {k: v for k, v in run.items() if k != "edits"} for name, run in records.items()},
        }
        path = self.out / "comparison.json"
        write_json(path, plain(record))
        picture = draw_comparison(record, self.out / "comparison.png")
        links = {name: f"{self.folder(name.split(' ')[0]).name}/{REPORT}" for name in runs}
        page = write_page(self.out / REPORT, comparison_page(records, self.edits, links=links))
        console.print(
            f"table: {path}\npicture: {picture}\nruns: {self.out}\nreport, for a browser: {page}", soft_wrap=True,
            markup=False,
        )  # fmt: skip
