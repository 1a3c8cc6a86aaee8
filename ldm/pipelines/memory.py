"""How many images are computed at a time, and whether one fits into memory, estimated before anything is computed.

As many images go through a network together as need `CHUNK_BYTES` by the estimate: a function of the model and the
size, so that a call computes the same wherever it runs. Only where less memory is free there are fewer.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm.models import UNetConfig
from ldm.progress import error_reason

# Five images of Stable Diffusion 1.5 with guidance in float32, or 760 of the built-in model; more are slower on CPUs.
CHUNK_BYTES = 2 * 2**30
_ENDLESS = 2**48  # where free memory is unknown; larger numbers overflow the sizes of torch

# Measured on the CPU for four shapes of networks, 64 to 192 positions a side: at its widest a level holds 6 times its
# input with the skip connection, or 32 times its channels where it has attention.
_MAPS_OF_RESNET, _MAPS_OF_ATTENTION = 6, 32


@dataclass(frozen=True, kw_only=True)
class ChunkSizes:
    """How many images go through the UNet, and through the first stage, at a time."""

    sampled: int
    decoded: int


def chunk_sizes(
    count: int,
    size: tuple[int, int],
    *,
    sample_bytes: int,
    image_bytes: int,
    device: torch.device,
    held_bytes: int = 0,
    in_one_batch: bool = False,
) -> ChunkSizes:
    """Divides `count` images of `size` (height, width) into chunks that fit; ValueError where that is impossible.

    Args:
        sample_bytes, image_bytes: what an image needs in the UNet, and in the first stage.
        held_bytes: what stays on the device all the while.
        in_one_batch: whether the images must not be divided.
    """
    here, name = available_bytes(torch.device("cpu")), "one image" if count == 1 else f"{count:,} images"
    free = here if device.type == "cpu" else available_bytes(device)
    needed = max(sample_bytes * (count if in_one_batch else 1), image_bytes)
    if needed > free:
        which = f"{name} at once (a classifier is asked about all)" if in_one_batch and count > 1 else "an image"
        memory = f"{_size(needed)} of memory, and {_size(free)} are free on {device}"
        sides = f"height and width are {size[0]} and {size[1]}"
        raise ValueError(f"{sides}: {which} of this size needs about {memory}; choose a smaller size")
    finished = 3 * count * size[0] * size[1]  # as PIL images, in the memory of the CPU
    free -= held_bytes + (finished if device.type == "cpu" else 0)
    if needed > free or finished > here:
        raise ValueError(
            f"{name} of {size[0]}x{size[1]} and their prompts take {_size(finished + held_bytes)}, and about "
            f"{_size(needed)} to generate; {_size(here)} of memory are free: ask for fewer at a time, or smaller ones"
        )
    budget = min(CHUNK_BYTES, free)
    sampled = count if in_one_batch else min(count, max(1, budget // max(1, sample_bytes)))
    return ChunkSizes(sampled=sampled, decoded=min(count, max(1, budget // max(1, image_bytes))))


def unet_bytes(config: UNetConfig, height: int, width: int, element: int) -> int:
    """About how much a UNet needs for one image of height x width positions of `element` bytes, beside its weights."""
    widths, layers = config.block_out_channels, config.per_level(config.layers_per_block)
    skips, widest = widths[0], 0.0
    for level, channels in enumerate(widths):
        below = widths[min(level + 1, len(widths) - 1)]
        attention = "CrossAttn" in config.down_block_types[level] or "CrossAttn" in config.up_block_types[-1 - level]
        maps = max(_MAPS_OF_RESNET * (below + channels), _MAPS_OF_ATTENTION * channels * attention)
        share = 0.25**level  # of the positions
        skips += channels * layers[level] * share + channels * share / 4
        widest = max(widest, maps * share)
    return int((skips + widest) * element) * height * width


def available_bytes(device: torch.device) -> int:
    """What can still be allocated; a very large number where that cannot be found out."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return _ENDLESS
    with suppress(OSError, KeyError, ValueError, ImportError):  # Linux
        import resource

        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = sum(int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)  # of `ulimit -v`
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            free = min(free, max(0, limit - pages * resource.getpagesize()))
        return min(free, *_left_to_containers())
    with suppress(AttributeError, OSError, ValueError):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return free if free > 0 else _ENDLESS
    return _ENDLESS


def _left_to_containers(root: Path = Path("/sys/fs/cgroup"), listing: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What the control groups (v2) above this process still allow; a large number is no limit."""
    left = [_ENDLESS]
    with suppress(OSError, ValueError):
        (own,) = [line[3:] for line in listing.read_text().splitlines() if line.startswith("0::")]
        folder = root / own.lstrip("/")
        for group in (folder, *folder.parents):
            with suppress(OSError, ValueError, KeyError):  # no limit is "max", and the root has none
                most = int((group / "memory.max").read_text())
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                used = int((group / "memory.current").read_text()) - int(statistics["inactive_file"])
                left.append(max(0, most - used))
            if group == root:
                break
    return left


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, or that a size is beyond all memory."""
    said = str(error).lower()
    signs = (
        "out of memory", "not enough memory", "can't allocate memory", "bad_alloc", "_alloc_failed",
        "size calculation overflowed", "failed to allocate", "cannot allocate memory",
    )  # fmt: skip
    kinds = MemoryError | torch.OutOfMemoryError
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(sign in said for sign in signs))


@contextmanager
def explain_out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Makes a `ValueError` of running out of memory inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold on to the tensors that filled the memory
        raise ValueError(f"{what} did not fit into memory ({error_reason(error)}); {remedy}") from None


def _size(count: int) -> str:
    """ "12 MiB", "3.4 GiB"."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{max(1, round(count / 2**20))} MiB"
