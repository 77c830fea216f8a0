"""The files of a checkpoint, looked at before anything is built of them: whole, plain, inside their folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .headers import StoredTensor, read_header
from .json_files import read_object

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_IMAGES = "an image processor (processor_config.json or preprocessor_config.json)"
_PARTS = {
    CONFIG: (CONFIG,),
    "weights (*.safetensors)": ("*.safetensors",),
    _IMAGES: (
        "processor_config.json",
        "preprocessor_config.json",
    ),
    "a tokenizer (tokenizer.json, tokenizer.model or vocab.json)": (
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
    ),
}
#: JSON files that the library reads besides, where they are there.
_OTHER_FILES = (
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
)
#: Names of configuration entries that say how many layers the library builds, one by one.
_COUNTS = frozenset({"num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth"})
_NUMBERED = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h)\.(\d{1,9})\.")
#: More layers than this no checkpoint has; and so many are built without asking whether the weights have as many.
_PLAUSIBLE, _FEW = 1024, 128
#: Entries that the library makes a table of, and its largest size.
_LABELS, _MOST_LABELS = frozenset({"num_labels", "_num_labels"}), 100_000
_SHARDED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A folder or Hugging Face id.

    Args:
        name: as it was given. source: folder or id. local: whether it is a folder.
    """

    name: str
    source: str
    local: bool

    def file(self, name: str) -> Path | None:
        """The path of a file by name, downloaded where the source is an id; None where it has none such."""
        if self.local:
            path = Path(self.source) / name
            return path if path.is_file() else None
        from transformers.utils.hub import cached_file

        found = cached_file(
            self.source,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)


def open_checkpoint(name: str, source: str) -> Checkpoint:
    """Return a checkpoint whose small files are in order; its weights are not looked at.

    Raises:
        FileNotFoundError: a folder lacks parts. ValueError: a file breaks a rule; says which.
    """
    local = Path(source).is_dir()
    checkpoint = Checkpoint(name, source, local)
    if local:
        _check_parts(Path(source))
        _check_links(Path(source))
    config = checkpoint.file(CONFIG)
    if config is not None:
        try:
            entries = read_object(config, plain_numbers=True)
        except ValueError as error:
            reason = str(error).removeprefix("load: ")
            raise ValueError(f"load: no readable configuration (got name_or_path={name!r}): {reason}") from None
        _check_counts(config, entries, _PLAUSIBLE)
    for other in _OTHER_FILES if local else ():
        path = checkpoint.file(other)
        if path is not None:
            read_object(path)
    return checkpoint


def stored_tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Return what the files of a checkpoint hold by name, from their headers. An id's files are downloaded for it.

    Raises:
        FileNotFoundError, ValueError: a file is absent or breaks a rule, or the configuration asks for more layers.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(checkpoint):
        tensors |= read_header(file)
    config = checkpoint.file(CONFIG)
    if config is not None:
        numbers = [int(match[1]) for key in tensors for match in _NUMBERED.finditer(key)]
        limit = max(_FEW, 1 + max(numbers, default=0))
        _check_counts(config, read_object(config), limit, f"; the weights have {1 + max(numbers, default=-1)} layers")
    return tensors


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever the library raises inside the block into one sentence that begins with `what`.

    What is absent (FileNotFoundError, ImportError), memory that ran out, and our own sentences pass as they are.

    Raises:
        ValueError: "load: <what> (got <error>)".
    """
    import torch

    try:
        yield
    except (FileNotFoundError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # A panic of a tokenizer written in Rust is no Exception
        foreign = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not foreign or (isinstance(error, ValueError) and str(error).startswith("load: ")):
            raise
        text = " ".join(str(error).split())
        raise ValueError(f"load: {what} (got {type(error).__name__}: {text:.400})") from error


def _check_parts(folder: Path) -> None:
    """Refuse a folder without all parts of a checkpoint, naming every part that is absent."""
    absent = [label for label, patterns in _PARTS.items() if not any(any(folder.glob(p)) for p in patterns)]
    if _IMAGES in absent and (folder / CONFIG).is_file() and not _sees(folder / CONFIG):
        absent.remove(_IMAGES)
    if (folder / INDEX).is_file():
        absent += sorted(shard for shard in _shards(folder / INDEX) if not (folder / shard).is_file())
    if absent:
        raise FileNotFoundError(f"load: the folder {str(folder)!r} lacks {', '.join(absent)}")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"load: a checkpoint must be a whole model (got {str(folder)!r}, an adapter on another one)")


def _sees(config: Path) -> bool:
    """Whether a configuration may be that of a model that takes images; one that cannot be read is asked later."""
    try:
        entries = read_object(config)
    except ValueError:
        return True
    return "vision_config" in entries or not str(entries.get("architectures")).endswith("ForCausalLM']")


def _weight_files(checkpoint: Checkpoint) -> list[Path]:
    """The files that the library reads weights from, in the order in which it looks for them."""
    source = checkpoint.source
    if checkpoint.local and any(_SHARDED.fullmatch(path.name) for path in Path(source).glob("shard-*.safetensors")):
        raise ValueError(f"load: weights must lie in {WEIGHTS} or in the shards of {INDEX} (got {source!r})")
    whole = checkpoint.file(WEIGHTS)
    if whole is not None:
        return [whole]
    index = checkpoint.file(INDEX)
    if index is None:
        raise FileNotFoundError(f"load: {source!r} lacks {WEIGHTS} or {INDEX}")
    metadata = read_object(index).get("metadata")
    if not isinstance(metadata, dict):
        raise ValueError(f"load: {index}: metadata must be an object (got metadata={metadata!r:.80})")
    files = {shard: checkpoint.file(shard) for shard in _shards(index)}
    absent = [shard for shard, file in files.items() if file is None]
    if absent:
        raise FileNotFoundError(f"load: {source!r} lacks {', '.join(absent)}")
    return [file for file in files.values() if file is not None]


def _shards(index: Path) -> list[str]:
    """Names of the files that an index lists, each once."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"load: {index}: weight_map must be an object (got weight_map={places!r:.80})")
    for key, shard in places.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w][\w.-]*\.safetensors", shard):
            rule = "weight_map must name safetensors files of the same folder"
            raise ValueError(f"load: {index}: {rule} (got {key!r:.80}: {shard!r:.80})")
    return sorted(set(places.values()))


def _check_links(folder: Path) -> None:
    """Refuse links that lead out of the folder; in the library's own download cache they lead to its blobs."""
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parents[1] / "blobs")
    for path in folder.iterdir():
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in allowed):
            raise ValueError(f"load: files of a checkpoint must lie in its folder (got {path}, a link out of it)")


def _check_counts(path: Path, entries: Mapping[str, Any], limit: int, known: str = "") -> None:
    """Refuse numbers of layers, and of labels, that no checkpoint has: each would be built."""
    waiting: list[tuple[str, Any]] = [("", entries)]
    while waiting:
        place, value = waiting.pop()
        for key, part in value.items():
            name = f"{place}.{key}" if place else key
            if isinstance(part, dict):
                waiting.append((name, part))
            elif key in _COUNTS | _LABELS and isinstance(part, (int, float)):
                most = limit if key in _COUNTS else _MOST_LABELS
                if part > most:
                    raise ValueError(f"load: {path}: {name} must be at most {most} (got {name}={part!r}{known})")
