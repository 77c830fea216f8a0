"""Only the weights that edits change, bound to their base by checksums; and how to put them into it, and out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fastedit.backbone import EditableModel, load
from fastedit.backbone.fingerprint import architecture_fingerprint
from fastedit.backbone.settings import DTYPES
from fastedit.deltas import EditDelta
from fastedit.engine.apply import require_sequence
from fastedit.export import Exported
from fastedit.export.changed import changed_weights
from fastedit.export.checkpoint import size_bytes, write_checkpoint
from fastedit.export.placing import placing
from fastedit.export.weights import require_weights
from fastedit.files import open_tensors, require_finite, tensors_digest, write_tensors
from fastedit.requests import EditRequest

#: What the header of the file says it is; and the file's name.
FORMAT = "fastedit.changes/1"
FILE = "changes.safetensors"
_OWNER = "apply_delta"
_TEXTS = ("architecture", "model", "dtype")


def export_changes(
    model: EditableModel,
    deltas: Sequence[EditDelta],
    folder: Path,
    *,
    requests: Sequence[EditRequest] = (),
    check_sequence: bool = True,
    overwrite: bool = False,
) -> Exported:
    """Write the weights that deltas change, as they are with the change, in the type of the base.

    ``fastedit.apply_delta(base, folder)`` puts them into a model with the same base weights, to the bit those of
    ``export_merged``. Beside every weight stands the SHA-256 of what it replaces and of itself.

    Args:
        model: the base, not quantized. deltas: changes of weights, one or a sequence. folder: new or empty.
        requests: are not asked; ``export_merged`` does that.
        check_sequence: refuse edits that were not fitted on top of those before them.
        overwrite: an earlier export in the folder is replaced.
    Returns:
        Its report: the "edits", the "dtype", and by "weights" the site and the rounding of every weight.
    Raises:
        ValueError: no changes of weights, a quantized base, weights that others share, no room, or a folder in use.
        OSError: it cannot be written; nothing is left of it.
    """
    # Before their sequence: deltas that are no weights do not add up, whatever they were fitted on
    require_weights(deltas, "delta")
    if check_sequence:
        require_sequence(deltas)
    expected = sum(site.d_in * site.d_out for site in deltas[0].spec.sites) * model.dtype.itemsize
    with placing(folder, "delta", overwrite=overwrite, expected_bytes=expected) as placement:
        tensors, table, report = {}, {}, {}
        for each in changed_weights(model, deltas, "delta"):
            tensors[each.name] = each.value
            table[each.name] = {"base": _digest(each.base), "changed": _digest(each.value)}
            report[each.name] = {"site": each.site, "largest_rounding": each.largest_rounding}
        header = {
            "format": FORMAT,
            "model": model.name if not Path(model.name).is_absolute() else Path(model.name).name,
            "architecture": model.architecture,
            "dtype": str(model.dtype).removeprefix("torch."),
            "edits": [delta.request_id for delta in deltas],
            "tensors": table,
        }
        write_tensors(tensors, header, placement.path / FILE, "export")
        placement.report |= {"edits": header["edits"], "dtype": header["dtype"], "weights": report}
    return placement.exported


class AppliedChanges:
    """Changes that are in the weights of a model. As a context manager they are taken out at the end of the block.

    Args:
        hf: the stock model. before: name -> the weight that was there. changed: name -> what is there now.
    """

    def __init__(self, hf: Any, before: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> None:
        self._hf, self._before, self._changed = hf, dict(before), dict(changed)

    def __repr__(self) -> str:
        return f"<AppliedChanges: {len(self._changed)} weights{'' if self._before else ', undone'}>"

    def undo(self) -> None:
        """Put the weights back that were there before, to the bit. A second time does nothing.

        Raises:
            ValueError: a weight is no longer what was put in (trained since, or changed by another delta, which must be
                undone first); nothing is put back.
        """
        for name in self._before:
            now = self._hf.get_parameter(name)
            if not torch.equal(now.detach().cpu(), self._changed[name]):
                raise ValueError(
                    f"apply_delta: a weight is put back where it is still the one that was put in; undo later changes "
                    f"first (got another {name!r})"
                )
        _write(self._hf, self._before)
        self._before = {}

    def __enter__(self) -> AppliedChanges:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def apply_delta(
    base: Any,
    folder: str | Path,
    *,
    out: str | Path | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> AppliedChanges | Path:
    """Put the weights of an exported delta into the base that they were made for.

    Args:
        base: a stock model, whose weights are exchanged in place, or an ``EditableModel``, the same with its model;
            nobody else may use it meanwhile. Or a checkpoint: its folder or name, which stays as it is.
        folder: that ``export("delta", folder)`` wrote, from whomever: nothing in it is executed.
        out: folder of the new checkpoint, new or empty; where ``base`` is a checkpoint, and only there.
        max_shard_size, overwrite: of ``out``, as for ``export_merged``.
    Returns:
        What undoes it, by ``undo()`` or at the end of a ``with`` block; of a checkpoint the folder ``out``.
    Raises:
        FileNotFoundError: no such delta.
        ValueError: a damaged file, or a base with other weights, another architecture or another type: names what
            differs and the base that the delta is of. Nothing is changed.
    """
    changed, header = _read(Path(folder))
    is_model = isinstance(base, EditableModel) or hasattr(base, "get_parameter")
    if is_model == (out is not None):
        raise ValueError(
            f"apply_delta: out names the new folder where base is a checkpoint, and a model is changed in place (got "
            f"out={None if out is None else str(out)!r} with base of type {type(base).__name__})"
        )
    if is_model:
        hf = base.hf if isinstance(base, EditableModel) else base
        hf = hf.get_base_model() if hasattr(hf, "get_base_model") else hf
        _check_base(hf, changed, header)
        before = {name: hf.get_parameter(name).detach().cpu().clone() for name in changed}
        try:
            _write(hf, changed)
        except BaseException:
            _write(hf, before)
            raise
        return AppliedChanges(hf, before, changed)
    assert out is not None
    model = load(base, dtype=header["dtype"], device="cpu", linear="torch")
    _check_base(model.hf, changed, header)
    expected = size_bytes(model.hf, model.dtype, None)
    with placing(out, "merged", overwrite=overwrite, expected_bytes=expected) as placement:
        write_checkpoint(model, changed, placement.path, max_shard_size=max_shard_size)
        placement.report |= {"edits": header["edits"], "dtype": header["dtype"]}
    return Path(out)


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a delta and its header, everything in them checked against each other."""
    file = folder / FILE
    if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"apply_delta: the file lies in its folder (got a link out of folder={str(folder)!r})")
    got = f"in path={str(file)!r}"
    with open_tensors(file, _OWNER, FORMAT) as (opened, header, checksum):
        table = header.get("tensors")
        names = set(opened.keys())
        if not checksum:
            raise ValueError(f"apply_delta: the header has a checksum (got none {got})")
        if not isinstance(table, dict) or not table or set(table) != names:
            raise ValueError(f"apply_delta: the header lists the tensors of the file (got others {got})")
        if any(not isinstance(header.get(name), str) for name in _TEXTS) or header["dtype"] not in DTYPES:
            raise ValueError(f"apply_delta: the header names model, architecture and dtype (got a gap {got})")
        if not isinstance(header.get("edits"), list):
            raise ValueError(f"apply_delta: the header lists the edits (got none {got})")
        tensors = {name: opened.get_tensor(name) for name in sorted(names)}
    for name, tensor in tensors.items():
        entry = table[name]
        if not isinstance(entry, dict) or entry.get("changed") != _digest(tensor):
            raise ValueError(f"apply_delta: tensors are what was written (the checksum of {name!r} differs {got})")
    require_finite(tensors, _OWNER, str(file))
    return tensors, header


def _check_base(hf: Any, changed: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    made_for = f"the delta is of {header['model']!r} in {header['dtype']}"
    if architecture_fingerprint(hf) != header["architecture"]:
        raise ValueError(
            f"apply_delta: the base has the architecture that the delta was made for (got a {type(hf).__name__} with "
            f"linear maps of other names or shapes; {made_for})"
        )
    held = dict(hf.named_parameters(remove_duplicate=False))
    for name, value in changed.items():
        now = held.get(name)
        if now is None or now.is_meta or now.dtype != value.dtype or now.shape != value.shape:
            kind = "none" if now is None else f"{now.dtype} {tuple(now.shape)}{' elsewhere' if now.is_meta else ''}"
            raise ValueError(
                f"apply_delta: the base has the weights in memory that are changed, in their type and shape (got "
                f"{kind} for {name!r} of {value.dtype} {tuple(value.shape)}; {made_for})"
            )
        if _digest(now) != header["tensors"][name].get("base"):
            raise ValueError(
                f"apply_delta: the base has the weights that the delta was made for (got another {name!r}; {made_for})"
            )


def _write(hf: Any, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            hf.get_parameter(name).copy_(value)


def _digest(tensor: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes."""
    return tensors_digest({"": tensor})
