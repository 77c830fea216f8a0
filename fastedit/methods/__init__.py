"""Editing methods: which delta, which objective, which solver. ``METHODS`` and ``OBJECTIVES`` are all there are."""

from fastedit.methods.base import EditPlan, Method
from fastedit.methods.ft import FT, FTConfig
from fastedit.methods.lora import LoRA, LoRAConfig
from fastedit.methods.registry import METHODS, OBJECTIVES, method_names, resolve, setting_names

__all__ = [
    "FT",
    "METHODS",
    "OBJECTIVES",
    "EditPlan",
    "FTConfig",
    "LoRA",
    "LoRAConfig",
    "Method",
    "method_names",
    "resolve",
    "setting_names",
]
