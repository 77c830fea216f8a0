"""Backbones: Hugging Face multimodal models behind one interface, split into prefix and tail at any layer."""

from .adapters import FAMILIES, Adapter
from .expansion import expanded_layers
from .fingerprint import weights_hash
from .hold import Held, held_inputs
from .loading import load
from .model import EditableModel
from .packed import PackedState
from .random_shapes import SHAPES
from .states import Encoded, ImageFeatures, ImageInputs, PrefixState, Site

__all__ = [
    "FAMILIES",
    "SHAPES",
    "Adapter",
    "EditableModel",
    "Encoded",
    "Held",
    "ImageFeatures",
    "ImageInputs",
    "PackedState",
    "PrefixState",
    "Site",
    "expanded_layers",
    "held_inputs",
    "load",
    "weights_hash",
]
