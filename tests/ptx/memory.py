"""Global memory: the storages of tensors, at their own addresses. Shared memory: with its history.

Both check the bounds and the alignment of every access. Bytes are rows: of `size` bytes each,
one for each access.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from tests.ptx.numbers import Array
from tests.ptx.parse import Fault

POISON = 0xFF  # NaN in every type
MOST_BLOCKS = 1 << 15  # that can be told apart
NEVER = 2**31 - 1  # later than all synchronizations


class GlobalMemory:
    """The storages of tensors, read and written where they lie."""

    def __init__(self, tensors: Iterable[torch.Tensor] = ()) -> None:
        self._bases = np.zeros(0, np.int64)
        self._parts: list[Array] = []
        self.written: list[tuple[Array, int, Array]] = []  # addresses, bytes, blocks
        self.read: list[tuple[Array, int, Array]] = []
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        """All of the tensor's storage may be accessed."""
        storage = tensor.untyped_storage()
        if not storage.nbytes() or storage.data_ptr() in self._bases:
            return
        part = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        at = int(np.searchsorted(self._bases, storage.data_ptr()))
        self._bases = np.insert(self._bases, at, storage.data_ptr())
        self._parts.insert(at, part)

    def load(self, address: Array, size: int, blocks: Array) -> Array:
        """Bytes [n, size] at addresses int64 [n], for threads of these blocks."""
        out = np.empty((len(address), size), np.uint8)
        for part, which, row in self._rows(address, size, "read"):
            out[which] = part[row]
        self.read.append((address, size, blocks))
        return out

    def store(self, address: Array, data: Array, blocks: Array) -> None:
        size = data.shape[1]
        for part, which, row in self._rows(address, size, "written"):
            part[row] = data[which]
            if (part[row] != data[which]).any():
                raise Fault("threads write different bytes to one place in global memory")
        self.written.append((address, size, blocks))

    def _rows(self, address: Array, size: int, done: str) -> Iterator[tuple[Array, Any, Array]]:
        """For each storage: its bytes [.., size], which of the accesses are there, and where."""
        if (address % size).any():
            raise Fault(f"{size} bytes of global memory are {done} at an odd address")
        index = np.searchsorted(self._bases, address, "right") - 1
        one = not len(index) or index.min() == index.max()
        for i in index[:1] if one else np.unique(index):
            which: Any = slice(None) if one else index == i
            at = address[which] - (self._bases[i] if i >= 0 else 0)
            if i < 0 or (at + size > len(self._parts[i])).any():
                raise Fault(f"{size} bytes are {done} outside of all tensors")
            part = self._parts[i]
            yield part[: len(part) // size * size].reshape(-1, size), which, at // size

    def check_races(self) -> None:
        """Assert that no block reads or writes what another one writes; forgets what was done.

        Raises:
            Fault: one does.

        """
        written, writers = _bytes_of(self.written)
        order = np.argsort(written, kind="stable")
        written, writers = written[order], writers[order]
        if ((written[1:] == written[:-1]) & (writers[1:] != writers[:-1])).any():
            raise Fault("two blocks write to one place in global memory")
        read, readers = _bytes_of(self.read)
        if len(written) and len(read):
            at = np.minimum(np.searchsorted(written, read), len(written) - 1)
            if ((written[at] == read) & (writers[at] != readers)).any():
                raise Fault("a block reads from global memory what another one writes")
        self.written, self.read = [], []


def _bytes_of(accesses: list[tuple[Array, int, Array]]) -> tuple[Array, Array]:
    """Addresses of bytes, and the blocks that they were accessed by, each pair once."""
    if not accesses:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    addresses = [(a[:, None] + np.arange(size)).ravel() for a, size, _ in accesses]
    blocks = [np.repeat(b, size) for _, size, b in accesses]
    # Addresses have 48 bits at most, so blocks fit beside them.
    keys = np.unique(np.concatenate(addresses) * MOST_BLOCKS + np.concatenate(blocks))
    return keys // MOST_BLOCKS, keys % MOST_BLOCKS


class SharedMemory:
    """Of all blocks that run in lock-step, and who has accessed it last, and when.

    Time is counted in synchronizations. `seen[w, v]`: up to when warp w, counted over all
    blocks, knows what warp v of its block has done. A read conflicts with a write that its warp
    does not know of, a write also with such reads. Between the lanes of a warp, as between
    warps, it takes a synchronization; a thread knows what it has done itself.
    """

    def __init__(self, blocks: int, threads: int, size: int, unit: int) -> None:
        """Poisoned; `unit`: bytes of the smallest access, the finest that is told apart."""
        self.size, self.unit = size, unit
        self.stride = -(-size // 16) * 16
        self.bytes = np.full(blocks * self.stride, POISON, np.uint8)
        count = len(self.bytes) // unit
        self.threads, self.warps = threads, threads // 32
        self.time = 1
        # Of the last write: time and thread; a thread that is none: on its way.
        self._wrote = np.zeros(count, np.int64)
        # Of each warp's last read: time, and lane, or 32: several.
        self._read = np.zeros((self.warps, count), np.int32)
        self._reader = np.zeros((self.warps, count), np.int8)
        self._fenced = np.zeros(blocks * threads, np.int64)
        self.seen = np.zeros((blocks * self.warps, self.warps + 1), np.int64)

    def load(self, address: Array, size: int, threads: Array) -> Array:
        """Bytes [n, size] at addresses int64 [n] of each thread's block."""
        at = self._place(address, size, threads, "read")
        units = self._units(at, size)
        conflict = self._unknown_writes(units, threads)
        if conflict.any():
            raise Fault(self._story("read", units, conflict))
        self._note(units, threads)
        return self.bytes.reshape(-1, size)[at // size]

    def store(self, address: Array, data: Array, threads: Array) -> None:
        """Bytes [n, size] of `data`."""
        size = data.shape[1]
        at = self._place(address, size, threads, "written")
        units = self._units(at, size)
        rows = self.bytes.reshape(-1, size)
        conflict = self._unknown_writes(units, threads) | self._unknown_reads(units, threads)
        if conflict.any():
            # Layouts that hold numbers several times store them several times.
            differ = rows[at // size].reshape(*units.shape, -1) != data.reshape(*units.shape, -1)
            conflict &= differ.any(-1) | self._on_the_way(units)
            if conflict.any():
                raise Fault(self._story("written", units, conflict))
        rows[at // size] = data
        if (rows[at // size] != data).any():
            raise Fault("threads write different bytes to one place in shared memory")
        self._wrote[units] = (self.time * 4096 + threads % self.threads)[:, None]

    def announce(self, address: Array, size: int, threads: Array) -> None:
        """Bytes will come, some time from now on: nobody may touch their place."""
        units = self._units(self._place(address, size, threads, "written"), size)
        conflict = self._unknown_writes(units, threads) | self._unknown_reads(units, threads)
        if conflict.any():
            raise Fault(self._story("overwritten by a copy", units, conflict))
        self._wrote[units] = 1 << 62 | self.threads

    def land(self, address: Array, data: Array, threads: Array) -> None:
        """What was announced is there, for those who know what these threads have done."""
        size = data.shape[1]
        at = address + threads // self.threads * self.stride
        self.bytes.reshape(-1, size)[at // size] = data
        self._wrote[self._units(at, size)] = (self.time * 4096 + threads % self.threads)[:, None]

    def hold(self, address: Array, size: int, threads: Array) -> Array:
        """As `load`, by something asynchronous: nobody may write there until `release`.

        What was written must have passed a `fence`.
        """
        data = self.load(address, size, threads)
        units = self._units(self._place(address, size, threads, "read"), size)
        last = self._wrote[units]
        writer = (threads // self.threads * self.threads)[:, None] + (last & 4095)
        if (last >> 12 > self._fenced[writer]).any():
            raise Fault("shared memory is read asynchronously, without a fence after a write")
        self._set_read(units, threads, NEVER)
        return data

    def release(self, address: Array, size: int, threads: Array) -> None:
        """What was held has been read."""
        units = self._units(self._place(address, size, threads, "read"), size)
        self._set_read(units, threads, self.time)

    def fence(self, threads: Array) -> None:
        """What these threads have written so far may be read asynchronously."""
        self._fenced[threads] = self.time
        self.time += 1

    def _set_read(self, units: Array, threads: Array, time: int) -> None:
        own = (threads // 32 % self.warps)[:, None], units
        self._read[own], self._reader[own] = time, 32

    def synchronize(self, warps: Array) -> None:
        """These warps [blocks, n] of each block know from now on what they all have done."""
        together = self.seen[warps].max(1, keepdims=True)  # [blocks, 1, warps]
        self.seen[warps] = together
        for i in range(warps.shape[1]):
            self.seen[warps, warps[:, i : i + 1] % self.warps] = self.time
        self.time += 1

    def synchronize_lanes(self, warps: Array) -> None:
        """The lanes of each of these warps [n], likewise."""
        self.seen[warps, warps % self.warps] = self.time
        self.time += 1

    def _place(self, address: Array, size: int, threads: Array, done: str) -> Array:
        if (address % size).any():
            raise Fault(f"{size} bytes of shared memory are {done} at an odd address")
        if (address < 0).any() or (address + size > self.size).any():
            raise Fault(f"{size} bytes are {done} outside of {self.size} of shared memory")
        return address + threads // self.threads * self.stride

    def _units(self, at: Array, size: int) -> Array:
        """Numbers of what is told apart: [n, size / unit]."""
        return at[:, None] // self.unit + np.arange(size // self.unit)

    def _unknown_writes(self, units: Array, threads: Array) -> Array:
        last = self._wrote[units]
        writer = last & 4095
        known = self.seen[(threads // 32)[:, None], writer // 32]
        return (last >> 12 > known) & (writer != (threads % self.threads)[:, None])

    def _unknown_reads(self, units: Array, threads: Array) -> Array:
        warp, lane = threads // 32, threads % 32
        unknown = self._read[:, units] > self.seen[warp, : self.warps].T[:, :, None]
        own = warp % self.warps, np.arange(len(warp))
        unknown[own] &= self._reader[own[0][:, None], units] != lane[:, None]
        return unknown.any(0)

    def _note(self, units: Array, threads: Array) -> None:
        """These threads have read there."""
        warp, lane = threads // 32, (threads % 32).astype(np.int8)[:, None]
        own = (warp % self.warps)[:, None], units
        again = self._read[own] > self.seen[warp, warp % self.warps][:, None]
        before = np.where(again, self._reader[own], lane)
        self._reader[own] = np.where(before == lane, lane, np.int8(32))
        self._reader[own] = np.where(self._reader[own] == lane, lane, np.int8(32))
        self._read[own] = np.maximum(self._read[own], self.time)

    def _on_the_way(self, units: Array) -> Array:
        return self._wrote[units] >> 12 > self.time

    def _story(self, done: str, units: Array, conflict: Array) -> str:
        at = int(units[conflict][0]) * self.unit % self.stride
        if self._on_the_way(units)[conflict].any():
            return f"shared memory at {at} is {done} while a copy to it is on its way"
        return f"shared memory at {at} is {done} without a barrier after another's access"
