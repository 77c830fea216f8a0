"""A ledger on the command line: found, opened, and the model that its edits belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastedit
from fastedit.backbone import EditableModel
from fastedit.backbone.prompts import IMAGE_FIELD
from fastedit.cli.app import messages, tell
from fastedit.cli.failures import STOPPED, Ended
from fastedit.cli.options import LEDGER_VARIABLE
from fastedit.data import EMBEDDED, fingerprint
from fastedit.ledger import Ledger
from fastedit.ledger.schema import FILE
from fastedit.pocket.names import MODELS
from fastedit.requests import EditRequest
from fastedit.smol.names import MODEL as SMOL


@dataclass(frozen=True)
class Loading:
    """How a model was asked for; None is as the ledger has it.

    Args:
        model: name or folder. dtype, quantize, template, device, device_map, offload_folder: of ``fastedit.load``.
    """

    model: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    template: str | None = None
    device: str | None = None
    device_map: str | None = None
    offload_folder: Path | None = None


def require_ledger(folder: Path) -> Path:
    """Refuse a folder that holds no ledger.

    Raises:
        FileNotFoundError: says how one is made.
    """
    if not (folder / FILE).is_file():
        raise FileNotFoundError(
            f"--ledger: a folder of edits, which fastedit edit --ledger makes; {LEDGER_VARIABLE} in the environment is "
            f"its default (got {str(folder)!r})"
        )
    return folder


@contextmanager
def reading(folder: Path) -> Iterator[Ledger]:
    """A ledger, without its model."""
    with fastedit.open_ledger(require_ledger(folder)) as opened:
        yield opened


@contextmanager
def with_model(folder: Path, loading: Loading) -> Iterator[Ledger]:
    """A ledger and the model that its edits belong to, loaded as it was when they were made."""
    with reading(folder) as opened:
        name, arguments = arguments_of(opened, loading)
    model = loaded(name, arguments)
    with fastedit.open_ledger(folder, model) as opened:
        yield opened


def arguments_of(opened: Ledger, loading: Loading) -> tuple[str, dict[str, Any]]:
    """The name of a ledger's model, and the arguments of ``fastedit.load`` that make it what it was.

    Raises:
        ValueError: the ledger names a model that is not here, or an argument that cannot be; before any weights.
    """
    from fastedit.cli.inputs import check_loading

    run = _newest_run(opened)
    stored: Mapping[str, Any] = {} if run is None else run["provenance"].get("model", {})
    prompts = json.loads(opened.contents.meta("prompts"))
    given = given_template(prompts)
    arguments = check_loading(
        loading.dtype or stored.get("dtype"),
        loading.quantize or stored.get("quantize") or "none",
        loading.device,
        given if loading.template is None else loading.template,
        loading.device_map,
        loading.offload_folder,
    )
    return loading.model or _model_of(opened), arguments


def given_template(prompts: Mapping[str, Any]) -> str | None:
    """The template that a model was loaded with, found among those that give its texts; None where none was given.

    Args:
        prompts: as ``fastedit.engine.provenance.prompts`` describes them.
    """
    if prompts["template_source"] != "given":
        return None
    text: str = prompts["text_template"]
    placed = (text[:place] + IMAGE_FIELD + text[place:] for place in range(len(text) + 1))
    for template in (text, *placed):
        if hashlib.sha256(template.encode()).hexdigest() == prompts["template_sha256"]:
            return template
    return None


def loaded(name: str, arguments: Mapping[str, Any]) -> EditableModel:
    """The model, once it is known that it can be had."""
    from fastedit.cli.inputs import open_model

    return open_model(messages, name, arguments)


def _newest_run(opened: Ledger) -> dict[str, Any] | None:
    row = opened.contents.database.one("SELECT max(id) FROM runs")
    return None if row is None or row[0] is None else opened.contents.run(row[0])


def _model_of(opened: Ledger) -> str:
    from fastedit.backbone.opening import RANDOM_PREFIX

    name = opened.contents.meta("name")
    if name in (*MODELS, SMOL) or name.startswith(RANDOM_PREFIX) or Path(name).is_dir():
        return name
    raise ValueError(f"--model: the ledger's model is no folder here; say where it is (got a ledger of {name!r})")


def pool_of(
    opened: Ledger, edits: Sequence[int], pool: str | None, format: str | None, images: Path | None
) -> Sequence[EditRequest] | None:
    """The records that edits were fitted with, which they need to be fitted again; None where they had none.

    Args:
        edits: numbers. pool: file or embedded set; None tries the embedded ones. format, images: as ``read_edits``.
    Raises:
        ValueError: records are needed that were not given, or others were given.
    """
    from fastedit.cli.options import require_known
    from fastedit.ledger.refit import checked_pool

    runs = dict.fromkeys(opened.contents.edit(edit)["run"] for edit in edits)
    pools = [opened.contents.run(number)["settings"]["pool"] for number in runs]
    wanted = {stored["fingerprint"]: stored for stored in pools if stored is not None}
    if not wanted:
        return None
    if len(wanted) > 1:
        raise ValueError(
            "--pool: edits that are fitted again together were fitted with the same records; --later keep needs none "
            f"(got {len(wanted)} sets of records)"
        )
    ((known, stored),) = wanted.items()
    if pool is not None:
        require_known(EMBEDDED[0], pool)
        records = _records(pool, format, images)
        checked_pool(stored, records)
        return records
    for name in EMBEDDED:
        tell(f"looking for the {stored['records']} records that edits were fitted with in {name}")
        try:
            records = _records(name, None, None)
        except ModuleNotFoundError:  # edits fitted with records of an extra were made where it is installed
            continue
        if records is not None and fingerprint(records) == known:
            return records
    raise ValueError(
        "--pool: edits are fitted again with the records that they were fitted with; --later keep needs none (got no "
        f"--pool, and they had {stored['records']} records, fingerprint {known[:12]})"
    )


def _records(pool: str, format: str | None, images: Path | None) -> Sequence[EditRequest] | None:
    if pool == "none":
        return None
    if pool in EMBEDDED:
        return fastedit.read_edits(pool, split="train")
    return fastedit.read_edits(pool, format=format, images=images)


@contextmanager
def one_change(opened: Ledger) -> Iterator[None]:
    """Inside the block a ledger is changed once; what a signal ends says whether it was.

    Raises:
        Ended: stopped by a signal.
    """
    before = opened.contents.newest_event()
    try:
        yield
    except KeyboardInterrupt as stopped:
        now = opened.contents.newest_event()
        done = f"what was asked for is done, event {now}" if now > before else "the ledger is as it was"
        raise Ended(f"stopped; {done}", STOPPED) from stopped
