"""What a launch asks a device for."""

import torch

#: Multiprocessors of an H200, for calls on tensors without memory, which only compile.
COMPILED_FOR = 132


def processors(device: torch.device) -> int:
    """Return the multiprocessors of a GPU; 1 where Triton interprets."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return COMPILED_FOR if device.type == "meta" else 1
