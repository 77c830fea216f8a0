"""4-bit and 8-bit bases through bitsandbytes, with its traps taken out; and 4-bit weights written out while a fit
reads the same ones at every step."""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapters import COMPUTE_DTYPES
from .cpu_linear import frozen_product
from .families import FAMILIES
from .placement import calls_its_class

if TYPE_CHECKING:
    from .model import EditableModel

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


@contextmanager
def expanded_layers(model: EditableModel, first_layer: int) -> Iterator[int]:
    """Inside the block, 4-bit maps of the decoder layers from one on multiply by weights that are dequantized once.

    bitsandbytes dequantizes a weight at every forward and again at every backward. Values and gradients are those of
    the dequantized weights in the type that the maps multiply in; the stored weights are not touched. Modules, their
    hooks and an overridden ``forward`` stay as they are. 8-bit maps, which round their inputs too, are left alone, and
    so are maps that an outer block has expanded.

    Args:
        model: frozen; unquantized models pass through.
        first_layer: 0 to n_layers - 1.
    Yields:
        Bytes of the weights written out here.
    Raises:
        ValueError: no such layer.
    """
    if not 0 <= first_layer < model.n_layers:
        raise ValueError(f"expanded_layers: first_layer is 0 to {model.n_layers - 1} (got first_layer={first_layer})")
    if model.quantize != "nf4":
        yield 0
        return
    used: list[Any] = []
    total = 0
    try:
        for layer in list(model.adapter.text.layers)[first_layer:]:
            for module in layer.modules():
                if isinstance(module, library().nn.Linear4bit) and calls_its_class(module):
                    total += _expand(module, model)
                    used.append(module)
        yield total
    finally:
        for module in used:
            _contract(module)


#: Blocks, also of several threads, that use a map's expanded weight; the last one takes it away.
_LOCK = threading.Lock()


def _expand(module: Any, model: EditableModel) -> int:
    """One more block uses the expanded weight of a map; return the bytes that were written out for it."""
    with _LOCK:
        if type(module) is not library().nn.Linear4bit:
            module.expanded_users += 1
            return 0
        weight = _dequantized(module, model.dtype)
        module.expanded_weight, module.expanded_by, module.expanded_users = weight, model.linear, 1
        module.__class__ = _expanded_class()
        return weight.numel() * weight.element_size()


def _contract(module: Any) -> None:
    """One block less uses the expanded weight of a map."""
    with _LOCK:
        module.expanded_users -= 1
        if not module.expanded_users:
            module.__class__ = library().nn.Linear4bit
            del module.expanded_weight, module.expanded_by, module.expanded_users


@torch.no_grad()
def _dequantized(module: Any, dtype: torch.dtype) -> Tensor:
    """The weight (d_out, d_in) in the type that the module multiplies in."""
    state = module.weight.quant_state
    weight: Tensor = library().functional.dequantize_4bit(module.weight.data, state)
    return weight.to(module.compute_dtype or dtype)


@functools.cache
def _expanded_class() -> type[nn.Module]:
    """A 4-bit map that multiplies by its expanded weight. Made at use: its base comes from an optional package."""

    class Expanded4bit(library().nn.Linear4bit):  # type: ignore[misc]
        """`expanded_weight` (d_out, d_in); `expanded_by`, "torch" or "onednn", multiplies."""

        def forward(self, x: Tensor) -> Tensor:
            """Return x (..., d_in) times the weight: (..., d_out), in the type of x."""
            weight: Tensor | None = self.__dict__.get("expanded_weight")
            if weight is None:
                # Taken away by another thread since the call began
                result: Tensor = library().nn.Linear4bit.forward(self, x)
                return result
            bias = None if self.bias is None else self.bias.to(weight.dtype)
            return frozen_product(x.to(weight.dtype), weight, bias, self.expanded_by).to(x.dtype)

    return Expanded4bit
