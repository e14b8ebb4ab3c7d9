"""Memory of the emulated device: global memory in separate allocations, shared memory of one block.

An access outside every allocation, across two of them or off its alignment raises, as does a race in shared memory.
Global accesses are counted: how often each byte was read and written, and in how many 32-byte sectors per warp.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

WARP = 32
SECTOR = 32
RED_ZONE = 4096


class MemoryFault(RuntimeError):
    """An access that a device would have answered with an error, or worse, with some number."""


@dataclass
class Allocation:
    """The storage of a tensor, which is read and written in place."""

    base: int
    bytes: np.ndarray
    reads: np.ndarray = field(init=False)
    writes: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.reads, self.writes = (np.zeros(len(self.bytes), np.int64) for _ in range(2))


class GlobalMemory:
    def __init__(self) -> None:
        self.allocations: dict[int, Allocation] = {}
        self.end = 1 << 20
        self.sectors = {"load": 0, "store": 0}

    def allocation(self, tensor: torch.Tensor) -> Allocation:
        """The allocation under a tensor; views of one storage share it."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.allocations:
            content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            self.allocations[storage.data_ptr()] = Allocation(self.end, content)
            self.end += -(-(len(content) + RED_ZONE) // 256) * 256  # 256-byte aligned, as CUDA's
        return self.allocations[storage.data_ptr()]

    def address(self, tensor: torch.Tensor) -> int:
        return self.allocation(tensor).base + tensor.storage_offset() * tensor.element_size()

    def counts(self, tensor: torch.Tensor, kind: str) -> torch.Tensor:
        """How often each byte of a tensor was accessed, (*shape, bytes of an element); kind is "reads" or "writes"."""
        counts = torch.from_numpy(getattr(self.allocation(tensor), kind))
        size = tensor.element_size()
        return counts.as_strided(
            (*tensor.shape, size), (*(step * size for step in tensor.stride()), 1), tensor.storage_offset() * size
        )

    def load(self, addresses: np.ndarray, size: int, warps: np.ndarray) -> np.ndarray:
        """(n, size) bytes."""
        allocation, places = self._places(addresses, size)
        self._count_sectors("load", addresses, size, warps)
        np.add.at(allocation.reads, places.ravel(), 1)
        return allocation.bytes[places]

    def store(self, addresses: np.ndarray, data: np.ndarray, warps: np.ndarray) -> None:
        allocation, places = self._places(addresses, data.shape[1])
        self._count_sectors("store", addresses, data.shape[1], warps)
        allocation.bytes[places] = data
        if (allocation.bytes[places] != data).any():
            raise MemoryFault("lanes store different numbers to one address")
        np.add.at(allocation.writes, places.ravel(), 1)

    def _places(self, addresses: np.ndarray, size: int) -> tuple[Allocation, np.ndarray]:
        if (addresses % size).any():
            raise MemoryFault(f"global access of {size} bytes that is not aligned to {size}")
        for allocation in self.allocations.values():
            places = addresses - allocation.base
            if (places >= 0).all() and (places + size <= len(allocation.bytes)).all():
                return allocation, places[:, None] + np.arange(size)
        raise MemoryFault(f"global access outside its tensor, addresses {addresses.min():#x} to {addresses.max():#x}")

    def _count_sectors(self, kind: str, addresses: np.ndarray, size: int, warps: np.ndarray) -> None:
        ends = np.concatenate([addresses // SECTOR, (addresses + size - 1) // SECTOR])
        self.sectors[kind] += len(np.unique(ends * 64 + np.tile(warps, 2)))


class SharedMemory:
    """Between two barriers, a byte written by one warp may not be touched by another, nor one read be written."""

    NOBODY, SEVERAL = -1, -2

    def __init__(self, size: int) -> None:
        self.bytes = np.zeros(size, np.uint8)
        self.written = np.zeros(size, bool)
        self.barrier()

    def barrier(self) -> None:
        self.writer, self.reader = (np.full(len(self.bytes), self.NOBODY) for _ in range(2))

    def load(self, addresses: np.ndarray, size: int, warps: np.ndarray) -> np.ndarray:
        places = self._places(addresses, size)
        if not self.written[places].all():
            raise MemoryFault("shared memory is read that nobody wrote")
        if ((self.writer[places] != self.NOBODY) & (self.writer[places] != warps[:, None])).any():
            raise MemoryFault("shared memory is read before a barrier follows the write")
        for warp in np.unique(warps):
            mine = places[warps == warp]
            self.reader[mine] = np.where(np.isin(self.reader[mine], (self.NOBODY, warp)), warp, self.SEVERAL)
        return self.bytes[places]

    def store(self, addresses: np.ndarray, data: np.ndarray, warps: np.ndarray) -> None:
        places = self._places(addresses, data.shape[1])
        for others in (self.writer, self.reader):
            if ((others[places] != self.NOBODY) & (others[places] != warps[:, None])).any():
                raise MemoryFault("shared memory is overwritten before a barrier follows its last use")
        self.bytes[places] = data
        if (self.bytes[places] != data).any():
            raise MemoryFault("lanes store different numbers to one shared address")
        self.writer[places], self.written[places] = warps[:, None], True

    def _places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        if (addresses % size).any() or (addresses < 0).any() or (addresses + size > len(self.bytes)).any():
            raise MemoryFault(f"shared access of {size} bytes outside shared memory or off its alignment")
        return addresses[:, None] + np.arange(size)
