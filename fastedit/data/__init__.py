"""Records and readers: files of edits in, checked `EditRequest`s out."""

from fastedit.data.check import check_images
from fastedit.data.detect import Detection, detect
from fastedit.data.images import image_digest, open_image
from fastedit.data.jsonl import write_jsonl
from fastedit.data.mmedit import without_prefix, write_mmedit
from fastedit.data.problems import ImageError, MissingImageError, Problem, RecordErrors
from fastedit.data.provenance import fingerprint
from fastedit.data.reader import EMBEDDED, EditList, read_edits
from fastedit.data.report import Conflict, Duplicate, Leakage, Report, leakage, report

__all__ = [
    "EMBEDDED",
    "Conflict",
    "Detection",
    "Duplicate",
    "EditList",
    "ImageError",
    "Leakage",
    "MissingImageError",
    "Problem",
    "RecordErrors",
    "Report",
    "check_images",
    "detect",
    "fingerprint",
    "image_digest",
    "leakage",
    "open_image",
    "read_edits",
    "report",
    "without_prefix",
    "write_jsonl",
    "write_mmedit",
]
