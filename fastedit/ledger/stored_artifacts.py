"""Trained parts that edits of a ledger do not act without, kept beside them."""

from __future__ import annotations

from fastedit.backbone import EditableModel
from fastedit.ledger.contents import Contents
from fastedit.ledger.database import DamagedLedger, Transaction, sync_folder
from fastedit.ledger.schema import ARTIFACTS
from fastedit.ledger.segments import file_checksum
from fastedit.training import Artifact, load_artifact, save_artifact


def keep_artifact(contents: Contents, transaction: Transaction, artifact: Artifact | None) -> None:
    """Write trained parts into the ledger, where it does not have them."""
    if artifact is None or transaction.rows("SELECT 1 FROM artifacts WHERE id = ?", (artifact.id,)):
        return
    folder = contents.folder / ARTIFACTS
    path = save_artifact(artifact, folder / f"{artifact.id}.safetensors")
    sync_folder(folder)
    sync_folder(contents.folder)
    transaction.insert(
        "artifacts", id=artifact.id, file=path.name, sha256=file_checksum(path), kind=artifact.kind
    )  # fmt: skip


def offer_artifacts(contents: Contents, model: EditableModel) -> None:
    """Put every trained part at the model's disposal.

    Raises:
        DamagedLedger: a file is missing, or not what was written.
    """
    for row in contents.database.checked_rows("artifacts"):
        if row["id"] not in model.artifacts:
            model.artifacts[row["id"]] = read_artifact(contents, row["id"])


def read_artifact(contents: Contents, number: str) -> Artifact:
    """Trained parts by their id."""
    path = contents.folder / ARTIFACTS / f"{number}.safetensors"
    try:
        artifact = load_artifact(path)
    except (FileNotFoundError, ValueError) as error:
        raise DamagedLedger(f"ledger: {error}") from error
    if artifact.id != number:
        raise DamagedLedger(f"ledger: {ARTIFACTS}/{path.name} holds trained part {number} (got another)")
    return artifact


def artifact_problem(contents: Contents, row: dict[str, str]) -> str:
    """What is wrong with the file of trained parts; "" where nothing is."""
    name = f"{ARTIFACTS}/{row['file']}"
    try:
        found = file_checksum(contents.folder / ARTIFACTS / f"{row['id']}.safetensors")
    except OSError as error:
        return f"{name}: cannot be read, {error.strerror}"
    return "" if found == row["sha256"] else f"{name}: is not what was written (its checksum differs)"
