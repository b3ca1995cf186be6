"""Choices that depend on the device: how the loss is computed, and how much of it at a time."""

from __future__ import annotations

import torch

# Elements of a chunk's mixed logits. A CPU's chunk stays in its cache. An accelerator's chunk keeps it busy for longer
# than the next kernel takes to launch, within a fraction of its free memory.
CPU_CHUNK_ELEMENTS = 1 << 20
ACCELERATOR_CHUNK_ELEMENTS = 1 << 25
# About 8 tensors of 4 bytes are alive at a time, and a chunk takes an eighth of the free memory.
BYTES_PER_CHUNK_ELEMENT = 256


def is_accelerator(device: torch.device) -> bool:
    """Return True for all devices but a CPU."""
    return device.type != "cpu"


def chunk_elements(device: torch.device) -> int:
    """Return the number of mixed logits to compute at a time on a device.

    2^20 on a CPU. On a CUDA, XPU or MPS device up to 2^25, limited by the memory that is free or cached by PyTorch's
    allocator and rounded down to a power of two, so that small changes of the free memory change nothing. The query
    does not synchronize with the device.
    """
    available = _available_bytes(device)
    if available is None:
        return CPU_CHUNK_ELEMENTS
    elements = min(ACCELERATOR_CHUNK_ELEMENTS, max(CPU_CHUNK_ELEMENTS, available // BYTES_PER_CHUNK_ELEMENT))
    return 1 << (elements.bit_length() - 1)


def _available_bytes(device: torch.device) -> int | None:
    """Return the bytes that can be allocated on an accelerator; None for a CPU and for unknown devices."""
    if device.type in ("cuda", "xpu"):
        module = getattr(torch, device.type)
        cached = module.memory_reserved(device) - module.memory_allocated(device)
        return module.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return None
