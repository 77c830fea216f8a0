"""Files that are there whole or not at all, say when they were changed, and belong to one writer at a time."""

from fastedit.files.atomic import clear_partial, json_text, read_json, replacing, write_json
from fastedit.files.claims import claim_file, claim_folder
from fastedit.files.tensors import open_tensors, read_tensors, require_finite, tensors_digest, write_tensors

__all__ = [
    "claim_file",
    "claim_folder",
    "clear_partial",
    "json_text",
    "open_tensors",
    "read_json",
    "read_tensors",
    "replacing",
    "require_finite",
    "tensors_digest",
    "write_json",
    "write_tensors",
]
