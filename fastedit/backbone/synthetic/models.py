"""Models with random weights, drawn where and in the type they will be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .processors import made_up_processor
from .shapes import SHAPES, Shape

#: Replaces a linear module that has just been drawn, or returns it as it is: (path, module) -> module.
Convert = Callable[[str, nn.Module], nn.Module]


class EmptyOnMeta(TorchFunctionMode):
    """Inside, tensors of unspecified values take no memory: modules are made in no time, computed buffers are real."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Send `torch.empty`, which linear maps and embeddings make their weights with, to the meta device."""
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def make_random(
    shape_name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None,
    seed: int,
    convert: Convert | None = None,
) -> tuple[Any, Any]:
    """Return (model, processor) of a shape. The whole model is never held in another type or place than asked for."""
    from transformers import AutoModelForImageTextToText

    shape = SHAPES[shape_name]
    processor = made_up_processor(shape)
    config = make_config(shape, processor)
    options = {} if attention is None else {"attn_implementation": attention}
    with EmptyOnMeta():
        hf = AutoModelForImageTextToText.from_config(config, dtype=dtype, **options)
    source = WeightSource(shape.std, dtype, device, seed)
    for path, module in list(hf.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(source.draw(name, parameter), requires_grad=False))
        if convert is not None and type(module) is nn.Linear:
            converted = convert(path, module)
            if converted is not module:
                hf.set_submodule(path, converted)
    hf.tie_weights()
    for module in hf.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    return hf.eval(), processor


class WeightSource:
    """Draws parameters: normal around zero, norm weights around one.

    Large ones are filled from a pool, each from its own place: billions of normal numbers take minutes on a CPU. The
    pool's length shares no factor with usual widths, so that rows do not repeat within a matrix.

    Args:
        std: standard deviation. dtype, device: of the parameters. seed: equal seeds draw equal weights.
    """

    POOL = (1 << 24) + 43

    def __init__(self, std: float, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self._std = std
        self._options: dict[str, Any] = {"dtype": dtype, "device": device}
        self._generator = torch.Generator(device=device).manual_seed(seed)
        self._pool: Tensor | None = None

    def draw(self, name: str, like: Tensor) -> Tensor:
        """Return a new tensor of the shape of `like` for a parameter of this name."""
        if like.numel() > self.POOL:
            return self._from_pool(like.numel()).view(like.shape)
        drawn = self._normal(like.shape)
        is_norm = name == "weight" and like.dim() == 1
        return drawn.add_(1.0) if is_norm else drawn

    def _normal(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(shape, **self._options).normal_(0.0, self._std, generator=self._generator)

    def _from_pool(self, count: int) -> Tensor:
        if self._pool is None:
            self._pool = self._normal((self.POOL,))
        place = int(torch.randint(self.POOL, (), generator=self._generator, device=self._options["device"]))
        filled = torch.empty(count, **self._options)
        done = 0
        while done < count:
            part = self._pool[place : place + count - done]
            filled[done : done + len(part)] = part
            done, place = done + len(part), 0
        return filled


def make_config(shape: Shape, processor: Any) -> Any:
    """Return the transformers configuration of a shape, special tokens as the processor has them."""
    from transformers import AutoConfig

    tokenizer = processor.tokenizer
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    marked = shape.model_type.startswith("qwen")
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>" if marked else "<image>")
    entries: dict[str, Any] = dict(shape.top)
    if marked:
        entries |= {"image_token_id": image, "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>")}
        entries |= {
            "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
            "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        }
    else:
        entries["image_token_index"] = image
    if shape.qformer is not None:
        entries["qformer_config"] = shape.qformer | {"encoder_hidden_size": shape.vision["hidden_size"]}
    return AutoConfig.for_model(
        shape.model_type,
        text_config=shape.text | tokens | {"initializer_range": shape.std},
        vision_config=dict(shape.vision),
        **entries,
    )
