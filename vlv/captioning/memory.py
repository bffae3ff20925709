"""Measures how much memory is free, and how much a computation used."""

import sys

import psutil
import torch


def memory_in_use(device: torch.device) -> int:
    """Bytes in use. On CUDA this also resets the count of [`peak_memory`]."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far. On the host this includes any earlier peak, so it can only be too high."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # other systems count in kilobytes


def free_memory(device: torch.device) -> int:
    """Free bytes on the device, including those that its allocator has reserved but does not use."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available
