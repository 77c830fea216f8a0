"""Backbones: Hugging Face multimodal models behind one interface, split into prefix and tail at any layer."""

from .adapters import Adapter
from .constant_cache import Held, held_inputs
from .families import FAMILIES
from .fingerprint import weights_hash
from .loading import load
from .model import EditableModel
from .packed import PackedState
from .quantization import expanded_layers
from .states import Encoded, ImageFeatures, ImageInputs, Site
from .synthetic.shapes import SHAPES

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
    "Site",
    "expanded_layers",
    "held_inputs",
    "load",
    "weights_hash",
]
