"""Which slots of an arena are free. Knows sizes, ranks and slabs; not what lies in a slot.

A slab has one slot stride and one rank. When its last slot is freed it goes back to the supply and may serve another
size next. A thread keeps memory claimed ahead of need, so that saving does not wait while the kernel zeroes pages.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from kvferry.blocks import Slot
from kvferry.errors import InvariantError
from kvferry.observability.log import OnceLog
from kvferry.store.arena import Arena, slab_bytes_for, slot_stride, slots_per_slab

_AHEAD_BYTES: Final = 128 << 20
_SLAB_TARGET_BYTES: Final = 16 << 20
_MAX_SLOTS_TRIED: Final = 16


class SlotClass(NamedTuple):
    """Slots that can stand in for each other."""

    stride: int
    rank: int


def choose_slab_bytes(arena_bytes: int, part_bytes: Iterable[int], num_ranks: int) -> int | None:
    """The slab size that wastes least for parts of these sizes; None: one chunk of them does not fit the arena.

    Slabs are about `_SLAB_TARGET_BYTES` or a 32nd of a smaller arena, as a slab is what can change hands between
    sizes. Candidates hold a whole number of slots of one of the sizes; the winner has the smallest share of its
    worst-served size left over. At most 12 % is left over where sizes are equal or far apart.
    """
    strides = sorted(map(slot_stride, part_bytes))
    target = min(_SLAB_TARGET_BYTES, max(arena_bytes // 32, 1))
    best: tuple[float, int] | None = None
    for stride in set(strides):
        least = max(1, target // stride)
        for num_slots in range(least, least + _MAX_SLOTS_TRIED):
            slab_bytes = slab_bytes_for(stride, num_slots)
            if _slabs_for_a_chunk(slab_bytes, strides, num_ranks) > arena_bytes // slab_bytes:
                continue
            worst = max(1 - slots_per_slab(slab_bytes, other) * other / slab_bytes for other in strides)
            best = min(best or (1.0, 0), (round(worst, 2), slab_bytes))
    return best[1] if best else None


def fits(arena: Arena, part_bytes: Iterable[int], num_ranks: int) -> bool:
    """Whether a chunk of parts of these sizes fits an arena that is already cut."""
    strides = [slot_stride(size) for size in part_bytes]
    return _slabs_for_a_chunk(arena.slab_bytes, strides, num_ranks) <= arena.num_slabs


def _slabs_for_a_chunk(slab_bytes: int, strides: list[int], num_ranks: int) -> float:
    slabs = 0
    for stride, count in Counter(strides).items():
        per_slab = slots_per_slab(slab_bytes, stride)
        if not per_slab:
            return float("inf")
        slabs += -(-count // per_slab) * num_ranks
    return slabs


class SlabSupply:
    """Slabs that no size uses, with their memory claimed ahead by a thread. Thread-safe."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._idle: deque[int] = deque()
        self._next = 0
        self._end = arena.num_slabs
        self._num_claiming = 0
        self._ahead = max(1, min(_AHEAD_BYTES // arena.slab_bytes, self._end // 4))
        self._changed = threading.Condition()
        self._closed = False
        self._log = OnceLog(logging.getLogger(__name__))
        self._thread = threading.Thread(target=self._claim_ahead, name="kvferry-claim", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Slabs that `take` may still give."""
        with self._changed:
            return len(self._idle) + self._num_claiming + self._end - self._next

    def take(self) -> int | None:
        """A slab with memory; waits for its memory if it must. None: there is no slab, or no memory for one."""
        with self._changed:
            while not self._idle:
                if self._next < self._end:
                    self._claim_next()
                elif self._num_claiming:
                    self._changed.wait()
                else:
                    return None
            slab = self._idle.popleft()
            self._changed.notify_all()
            return slab

    def put_back(self, slab: int) -> None:
        """A slab whose slots are all free. It keeps its memory and is the next to be taken."""
        with self._changed:
            self._idle.appendleft(slab)

    def close(self) -> None:
        """End the thread; wait until no claim is under way."""
        with self._changed:
            self._closed = True
            self._end = self._next
            self._changed.notify_all()
        self._thread.join()

    def _claim_next(self) -> None:
        """Claim one slab, the lock released meanwhile."""
        slab = self._next
        self._next += 1
        self._num_claiming += 1
        self._changed.release()
        failure: OSError | None = None
        try:
            self._arena.claim(slab)
        except OSError as error:
            failure = error
        finally:
            self._changed.acquire()
            self._num_claiming -= 1
            self._changed.notify_all()
        if failure is None:
            self._idle.append(slab)
            return
        # Claims go on in other threads: the highest slab without memory ends the arena, lower ones were claimed.
        self._end = self._next
        self._log.warn("full", "shared memory is full: the arena ends after %d slabs: %s", slab, failure)

    def _claim_ahead(self) -> None:
        with self._changed:
            while not self._closed:
                if len(self._idle) + self._num_claiming < self._ahead and self._next < self._end:
                    self._claim_next()
                else:
                    self._changed.wait()


class Room:
    """What-if over an allocator: would there be room for `needs`, were some slots given back? Changes nothing.

    Valid until the allocator changes.
    """

    def __init__(self, allocator: SlotAllocator, needs: Mapping[SlotClass, int]) -> None:
        self._allocator = allocator
        self._needs = needs
        self._spare = allocator.num_spare
        self._num_free = Counter({of: allocator.num_free(of) for of in needs})
        self._given: Counter[int] = Counter()

    def give(self, slots: Iterable[Slot]) -> None:
        """Suppose that these taken slots were given back."""
        for slot in slots:
            slab, of, num_free, num_slots = self._allocator.slab_state(slot)
            self._given[slab] += 1
            self._num_free[of] += 1
            if num_free + self._given[slab] == num_slots:
                self._num_free[of] -= num_slots
                self._spare += 1

    def enough(self) -> bool:
        """Whether there would be room."""
        spare = self._spare
        for of, count in self._needs.items():
            missing = count - self._num_free[of]
            if missing > 0:
                num_slots = self._allocator.slots_per_slab(of)
                if not num_slots:
                    return False
                spare -= -(-missing // num_slots)
        return spare >= 0


class SlotAllocator:
    """Free lists over the slabs of an arena. Callers serialise."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._supply = SlabSupply(arena)
        self._generations = itertools.count(1)
        self._slabs: dict[int, SlotClass] = {}
        self._free: dict[int, list[int]] = {}
        """Free offsets of each slab in use, the lowest last."""
        self._open: dict[SlotClass, dict[int, None]] = {}
        """Slabs of a class that have a free slot, the longest open first."""
        self._num_free: Counter[SlotClass] = Counter()

    def take(self, num_bytes: int, rank: int) -> Slot | None:
        """A slot for a payload of `num_bytes`, with a generation that no slot of this arena had before; None: no room.

        Its header still says free.
        """
        of = SlotClass(slot_stride(num_bytes), rank)
        if not self._open.get(of) and not self._add_slab(of):
            return None
        slab = next(iter(self._open[of]))
        free = self._free[slab]
        offset = free.pop()
        self._num_free[of] -= 1
        if not free:
            del self._open[of][slab]
        return Slot(offset, num_bytes, next(self._generations))

    def give_back(self, slot: Slot) -> None:
        """The slot's header already says free. An empty slab returns to the supply."""
        slab = self._arena.slab_of(slot.offset)
        of = self._slabs[slab]
        free = self._free[slab]
        free.append(slot.offset)
        self._num_free[of] += 1
        if len(free) < self.slots_per_slab(of):
            self._open[of][slab] = None
            return
        del self._slabs[slab], self._free[slab]
        self._open[of].pop(slab, None)
        self._num_free[of] -= len(free)
        self._supply.put_back(slab)

    def room(self, needs: Mapping[SlotClass, int]) -> Room:
        """Ask whether, and after giving back what, `needs` slots of each class could be taken."""
        return Room(self, needs)

    @property
    def num_spare(self) -> int:
        """Slabs that no class uses."""
        return len(self._supply)

    def num_free(self, of: SlotClass) -> int:
        """Free slots in slabs of this class."""
        return self._num_free[of]

    def slots_per_slab(self, of: SlotClass) -> int:
        """Slots that a slab of this class has."""
        return slots_per_slab(self._arena.slab_bytes, of.stride)

    def slab_state(self, slot: Slot) -> tuple[int, SlotClass, int, int]:
        """The slab of a taken slot, its class, its free slots and all its slots."""
        slab = self._arena.slab_of(slot.offset)
        of = self._slabs[slab]
        return slab, of, len(self._free[slab]), self.slots_per_slab(of)

    def check(self, taken: Iterable[Slot]) -> None:
        """InvariantError: `taken` and the free slots are not exactly the slots of the slabs in use."""
        offsets = [slot.offset for slot in taken] + [offset for free in self._free.values() for offset in free]
        expected = sum(self.slots_per_slab(of) for of in self._slabs.values())
        if len(offsets) != len(set(offsets)) or len(offsets) != expected:
            raise InvariantError(f"{len(offsets)} slots are taken or free, {expected} exist")
        for of, slabs in self._open.items():
            free = sum(len(self._free[slab]) for slab in slabs)
            if free != self._num_free[of] or any(self._slabs[slab] != of for slab in slabs):
                raise InvariantError(f"{free} free slots of {of}, {self._num_free[of]} counted")

    def counts(self) -> dict[str, int]:
        """Slabs in use and spare, free slots in slabs in use."""
        return {
            "slabs_used": len(self._slabs),
            "slabs_spare": len(self._supply),
            "slots_free": sum(map(len, self._free.values())),
        }

    def close(self) -> None:
        """End the claiming thread; nothing may be taken any more."""
        self._supply.close()

    def _add_slab(self, of: SlotClass) -> bool:
        if not self.slots_per_slab(of):
            return False
        slab = self._supply.take()
        if slab is None:
            return False
        self._slabs[slab] = of
        self._free[slab] = self._arena.format_slab(slab, of.stride, of.rank)[::-1]
        self._open.setdefault(of, {})[slab] = None
        self._num_free[of] += len(self._free[slab])
        return True
