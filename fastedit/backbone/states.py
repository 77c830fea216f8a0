"""What passes between the parts of a backbone: encoded rows, the state between prefix and tail, edit sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

STAGES: tuple[str, ...] = ("attention", "ffn")


@dataclass(frozen=True, slots=True)
class Site:
    """One linear map of one decoder layer that a delta can be added to.

    Args:
        layer: index of the decoder layer.
        name: "up", "gate", "down", "q", "k", "v" or "o".
        module_path: dotted path of the module inside the Hugging Face model.
        d_in, d_out: the module maps (..., d_in) to (..., d_out); its weight is (d_out, d_in).
    """

    layer: int
    name: str
    module_path: str
    d_in: int
    d_out: int


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """One preprocessed image, or all that a question is about: several in order, or a video.

    Args:
        key: content hash; equal keys mean equal pixels, and of several the same order.
        tensors: what the model's vision side takes, leading dimension as the processor returns it for one image. Of
            several that are prepared apart those of the parts, and none here.
        tokens: how many image tokens the decoder sees.
        expansion: tokens that the processor puts in the place of an image's placeholder, where it is asked for them.
        spelled: their text, where reading it gives those tokens again; else "".
        parts: of several images, one each in the order of their placeholders; () of one image and of a video.
        video: whether the tokens are those of a video. kind: what `mm_token_type_ids` are at them.
        features_id: of a video, the token that features replace: some processors put images' tokens for its frames.
    """

    key: str
    tensors: dict[str, Tensor]
    tokens: int
    expansion: tuple[int, ...] = ()
    spelled: str = ""
    parts: tuple[ImageInputs, ...] = ()
    video: bool = False
    kind: int = 1
    features_id: int = -1

    @property
    def each(self) -> tuple[ImageInputs, ...]:
        """What has a placeholder of its own in the prompt."""
        return self.parts or (self,)

    @property
    def looked_at(self) -> tuple[ImageInputs, ...]:
        """What the vision side is given, one after another: the parts, or all of them as one."""
        return self.parts if self.parts and not self.tensors else (self,)


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """What the decoder receives of one image.

    Args:
        tokens: (T, d). Embeddings at the image tokens.
        deep: one (T, d) per early decoder layer that adds visual features to its output; empty for most families.
    """

    tokens: Tensor
    deep: tuple[Tensor, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(part.numel() * part.element_size() for part in (self.tokens, *self.deep))

    @staticmethod
    def cat(parts: Sequence[ImageFeatures]) -> ImageFeatures:
        """Return the features of several images of one row, in order."""
        if len(parts) == 1:
            return parts[0]
        deep = zip(*(part.deep for part in parts), strict=True)
        return ImageFeatures(torch.cat([part.tokens for part in parts]), tuple(torch.cat(layer) for layer in deep))


@dataclass(slots=True)
class Encoded:
    """Right-padded rows of prompt and, where asked for, answer. Positions are those that the decoder sees.

    The end token is a label and never an input: nothing is predicted after it.

    Args:
        input_ids: (R, N), int64. Image tokens are expanded.
        attention_mask: (R, N), bool. True at tokens, False at padding.
        label_mask: (R, N), bool. True where the next token is an answer token, the end token included.
        labels: (R, N), int64. That next token; undefined where `label_mask` is False.
        last_prompt: (R,), int64. Index of the last prompt token.
        image_mask: (R, N), bool. True at image tokens.
        images: what each row is about, None for a question in text only.
        token_types: whether the stock model wants `mm_token_type_ids`.
        read: where the text model has an encoder, the tokens that it reads of each row, those of images among them. All
            else is of the decoder then, whose prompt is one token that begins every row. Else ().
    """

    input_ids: Tensor
    attention_mask: Tensor
    label_mask: Tensor
    labels: Tensor
    last_prompt: Tensor
    image_mask: Tensor
    images: tuple[ImageInputs | None, ...]
    token_types: bool = False
    read: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """(R,), int64: tokens of each row."""
        return self.attention_mask.sum(dim=1)

    def read_by_encoder(self, row: int) -> tuple[int, ...]:
        """The tokens of a row that an encoder reads; () without one."""
        return self.read[row] if self.read else ()

    @property
    def distinct_images(self) -> dict[str, ImageInputs]:
        """What the vision side has to look at for these rows, by content hash."""
        return {part.key: part for image in self.images if image is not None for part in image.looked_at}

    @property
    def model_inputs(self) -> dict[str, Tensor]:
        """Everything that the stock model's forward takes for these rows, as keyword arguments."""
        inputs: dict[str, Tensor] = {"input_ids": self.input_ids, "attention_mask": self.attention_mask.long()}
        if self.read:
            tokens = [torch.tensor([ids], device=self.input_ids.device) for ids in self.read]
            inputs = {f"decoder_{name}": tensor for name, tensor in inputs.items()}
            inputs["input_ids"] = join_padded(tokens)
            inputs["attention_mask"] = join_padded([torch.ones_like(ids) for ids in tokens])
        if self.token_types:
            kinds = torch.tensor([[1 if image is None else image.kind] for image in self.images])
            inputs["mm_token_type_ids"] = self.image_mask.int() * kinds.int().to(self.image_mask.device)
        present = [part for image in self.images if image is not None for part in image.looked_at]
        for name in dict.fromkeys(name for part in present for name in part.tensors):
            tensors = [part.tensors[name] for part in present if name in part.tensors]
            inputs[name] = join_padded(tensors).to(self.input_ids.device)
        return inputs

    def select(self, rows: Sequence[int] | Tensor) -> Encoded:
        """Return these rows, in this order, trimmed to the longest of them."""
        index = _row_index(rows, self.input_ids.device)
        kept = max(int(self.lengths[index].max()), 1) if index.numel() else 0
        parts = {
            name: getattr(self, name)[index, :kept]
            for name in ("input_ids", "attention_mask", "label_mask", "labels", "image_mask")
        }
        images = tuple(self.images[row] for row in index.tolist())
        read = tuple(self.read[row] for row in index.tolist()) if self.read else ()
        return replace(self, **parts, last_prompt=self.last_prompt[index], images=images, read=read)

    def to(self, device: torch.device | str) -> Encoded:
        """Return the rows with their token tensors on a device. Pixels stay where they are."""
        names = ("input_ids", "attention_mask", "label_mask", "labels", "last_prompt", "image_mask")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def label_positions(self) -> Tensor:
        """(R, M), int64: positions that carry a label, each row in order, -1 after its last one."""
        counts = self.label_mask.sum(dim=1)
        width = int(counts.max()) if len(self) else 0
        order = torch.argsort((~self.label_mask).long(), dim=1, stable=True)[:, :width]
        inside = torch.arange(width, device=order.device)[None, :] < counts[:, None]
        return torch.where(inside, order, torch.full_like(order, -1))


def join_padded(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first dimension, zero-padding the others to the largest of each."""
    joined = list(parts)
    for dim in range(1, joined[0].dim()):
        width = max(part.shape[dim] for part in joined)
        joined = [_pad_dim(part, dim, width) for part in joined]
    return torch.cat(joined)


def _pad_dim(part: Tensor, dim: int, width: int) -> Tensor:
    """Zero-pad one dimension at its end."""
    missing = width - part.shape[dim]
    if missing == 0:
        return part
    return functional.pad(part, [0, 0] * (part.dim() - 1 - dim) + [0, missing])


def _row_index(rows: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Row numbers, or a mask over rows, as an index."""
    index = torch.as_tensor(rows, device=device)
    if index.dtype == torch.bool:
        return index.nonzero().flatten()
    return index.long()
