"""4-bit and 8-bit bases through bitsandbytes, with its traps taken out."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .adapters import COMPUTE_DTYPES
from .families import FAMILIES

QUANTIZATIONS: tuple[str, ...] = ("none", "nf4", "int8")


def library() -> Any:
    """Import bitsandbytes, or say what to install."""
    # On import it warns about a kernel package that it would fetch from the network and does not need.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError("load: quantize needs bitsandbytes: pip install 'bitsandbytes>=0.48' accelerate") from error
    return bitsandbytes


class Quantizer:
    """Decides which linear maps of a model are quantized, and how.

    Args:
        kind: "none", "nf4" or "int8".
        model_type: of the whole model; names the parts that are never quantized.
        keep: decoder layers by number and modules by dotted path that stay unquantized besides.
        compute: type in which the quantized layers multiply.
        stored: quantization configuration of a checkpoint that is already quantized.
    Raises:
        ValueError: `kind` contradicts the checkpoint's own quantization. ImportError: bitsandbytes is absent.
    """

    def __init__(
        self, kind: str, model_type: str, keep: Sequence[int | str], compute: torch.dtype, stored: Any = None
    ) -> None:
        stored_kind = _stored_kind(stored)
        if stored_kind is not None and kind not in ("none", stored_kind):
            raise ValueError(
                f"load: quantize must be 'none' or the checkpoint's own {stored_kind!r} (got quantize={kind!r})"
            )
        self.kind = stored_kind or kind
        #: Whether the checkpoint was quantized when it was stored.
        self.is_stored = stored_kind is not None
        self.compute = compute
        #: Paths; of a model without a family they are added when its modules are known.
        self.skipped = list(FAMILIES[model_type].unquantized) if model_type in FAMILIES else []
        self._kept_layers = {entry for entry in keep if isinstance(entry, int)}
        self.skipped += [entry for entry in keep if isinstance(entry, str)]
        if self.active:
            self._library = library()

    @property
    def active(self) -> bool:
        """Whether anything is quantized."""
        return self.kind != "none"

    def skips(self, path: str) -> bool:
        """Whether the module at a path stays as it is."""
        if any(path == part or path.startswith(part + ".") for part in self.skipped):
            return True
        pieces = path.split(".")
        return any(
            piece == "layers" and number.isdigit() and int(number) in self._kept_layers
            for piece, number in itertools.pairwise(pieces)
        )

    def config(self, skeleton: nn.Module) -> Any:
        """Return the configuration that transformers quantizes a checkpoint by.

        The modules to skip are listed one by one by full path: the loader matches suffixes and patterns too, and short
        names match the wrong ones or none.

        Args:
            skeleton: the model, with or without weights.
        """
        from transformers import BitsAndBytesConfig

        skip = [path for path, module in skeleton.named_modules() if isinstance(module, nn.Linear) and self.skips(path)]
        if self.kind == "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=self.compute,
            llm_int8_skip_modules=skip,
        )

    def convert(self, path: str, module: nn.Module) -> nn.Module:
        """Return the quantized form of a linear module, or the module itself where it is skipped."""
        if self.skips(path) or not isinstance(module, nn.Linear):
            return module
        layers = self._library.nn
        d_in, d_out, has_bias = module.in_features, module.out_features, module.bias is not None
        weight = module.weight.detach()
        with torch.device("meta"):
            if self.kind == "int8":
                new = layers.Linear8bitLt(d_in, d_out, has_bias, has_fp16_weights=False, threshold=6.0)
            else:
                new = layers.Linear4bit(d_in, d_out, has_bias, self.compute, quant_type="nf4")
        if self.kind == "int8":
            new.weight = layers.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
        else:
            new.weight = layers.Params4bit(
                weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=False, module=new
            ).to(weight.device)
        new.bias = module.bias
        quantized: nn.Module = new
        return quantized

    def check(self, hf: nn.Module) -> None:
        """Refuse a model that was quantized when it was stored, and some of whose maps were not.

        Raises:
            ValueError: names one of them.
        """
        if not self.active:
            return
        layers = self._library.nn
        for path, module in hf.named_modules():
            weight = getattr(module, "weight", None)
            plain = (isinstance(module, layers.Linear4bit) and getattr(weight, "quant_state", None) is None) or (
                isinstance(module, layers.Linear8bitLt) and getattr(weight, "dtype", None) != torch.int8
            )
            if plain:
                rule = "quantization_config must name among llm_int8_skip_modules what is not quantized"
                raise ValueError(f"load: {rule} (got {path} of type {getattr(weight, 'dtype', None)})")

    def settle(self, hf: nn.Module, stored: torch.dtype) -> None:
        """Bring what a quantized checkpoint stores unquantized to the type it is to compute in."""
        if not self.active or self.compute == stored:
            return
        keep_in_float32(hf, self.compute)
        kept = {id(parameter) for parameter in _float32_parts(hf, self.compute)}
        for parameter in hf.parameters():
            if parameter.dtype in COMPUTE_DTYPES and id(parameter) not in kept:
                parameter.data = parameter.data.to(self.compute)
        for module in hf.modules():
            if isinstance(module, self._library.nn.Linear4bit):
                module.compute_dtype, module.compute_type_is_set = self.compute, True
                module.weight.quant_state.dtype = self.compute

    def cure(self, hf: nn.Module) -> None:
        """Take out what makes gradients wrong or logs unreadable. Must run before the first forward.

        On processors with AVX512-BF16 an eval-mode forward without gradient repacks a 4-bit weight for a kernel that
        has no backward, and every later gradient through the layer is dropped with no more than a warning.
        """
        if not self.active:
            return
        for module in hf.modules():
            if isinstance(module, self._library.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False
        # Otherwise every call of every 8-bit layer logs that its input is cast.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def keep_in_float32(hf: Any, dtype: torch.dtype) -> None:
    """Give the parts that a checkpoint's loader leaves in float32 that type."""
    for parameter in _float32_parts(hf, dtype):
        parameter.data = parameter.data.float()


def _float32_parts(hf: Any, dtype: torch.dtype) -> list[nn.Parameter]:
    """Parameters that a checkpoint's loader leaves in float32 where the others are of a type."""
    words = set(hf._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else set()
    if dtype == torch.float16:
        words |= set(hf._keep_in_fp32_modules or ())
    return [
        parameter
        for name, parameter in hf.named_parameters()
        if words & set(name.split(".")) and parameter.dtype in COMPUTE_DTYPES
    ]


def _stored_kind(stored: Any) -> str | None:
    """Name the quantization that a checkpoint was stored with."""
    if stored is None:
        return None
    entries = stored if isinstance(stored, dict) else stored.to_dict()
    if entries.get("load_in_8bit"):
        return "int8"
    if entries.get("load_in_4bit"):
        kind = str(entries.get("bnb_4bit_quant_type", "fp4"))
        if kind == "nf4":
            return kind
        raise ValueError(f"load: a 4-bit checkpoint must be of type nf4 (got bnb_4bit_quant_type={kind!r})")
    method = entries.get("quant_method", "unknown")
    raise ValueError(f"load: a quantized checkpoint must be of bitsandbytes (got quant_method={method!r})")
