"""A Qwen2.5-VL processor without video, which stock transformers cannot build where torchvision is missing.

Qwen2_5_VLProcessor insists on a video processor and that on torchvision, for models that never see a video. The class
here leaves it out and is otherwise the stock one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AutoProcessor, ProcessorMixin, Qwen2_5_VLConfig, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fastedit.pocket.world import IMAGE_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class PocketQwenProcessor(Qwen2_5_VLProcessor):  # type: ignore[misc]
    """Qwen2_5_VLProcessor for images and text only; same calls, same outputs."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **_: Any
    ) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        """Return the names of the inputs that the model takes from this processor."""
        return ["input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids"]


class _PocketQwenConfig(Qwen2_5_VLConfig):  # type: ignore[misc]
    """Only a key: AutoProcessor finds registered classes by their config, and the stock config must keep its own."""

    model_type = "fastedit_pocket_qwen"


def register() -> None:
    """Let AutoProcessor load folders saved with PocketQwenProcessor; changes nothing for any other model."""
    AutoProcessor.register(_PocketQwenConfig, PocketQwenProcessor, exist_ok=True)


def make_qwen_processor(tokenizer: PreTrainedTokenizerFast, scaling: dict[str, Any]) -> PocketQwenProcessor:
    """Return the processor for images of one fixed size: 64 patches, 16 image tokens."""
    area = IMAGE_SIZE * IMAGE_SIZE
    images = Qwen2VLImageProcessorPil(
        patch_size=8, temporal_patch_size=2, merge_size=2, size={"shortest_edge": area, "longest_edge": area}, **scaling
    )
    return PocketQwenProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
