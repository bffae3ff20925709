"""How much memory there is, and how much of it a piece of work took."""

import sys

import psutil
import torch


def memory_in_use(device: torch.device) -> int:
    """Bytes in use; [`peak_memory`] is counted from here on, where that can be told."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far. On the host a peak of long ago counts too, which errs to the safe side."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # other systems count in kilobytes


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on the device, what its allocator keeps at hand included."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available
