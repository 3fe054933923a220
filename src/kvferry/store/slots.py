"""Which slots of an arena are free. Knows sizes, ranks and slabs; not what lies in a slot.

A slab has one slot stride and one rank. When its last slot is freed its units go back to the supply and may serve
another size next; neighbours then make a longer run. A thread keeps memory claimed ahead of need, and then has the
kernel zero it, so that saving waits for neither.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

from kvferry.blocks import Slot
from kvferry.errors import InvariantError
from kvferry.observability.log import OnceLog
from kvferry.store.arena import Arena, slot_stride, slots_in

_LEAST_AHEAD_BYTES: Final = 128 << 20
_LARGEST_SHARE: Final = 8
"""A slab is made longer, to leave less over, up to this part of the arena."""
_MOST_LEFT_OVER: Final = 0.12
_BARE, _COMING, _THERE, _TAKEN = range(4)
"""A unit that nobody uses: without memory, being claimed, with memory. And one that a slab uses, or that has none."""
_IS_FREE: Final = bytes.maketrans(bytes([_BARE, _COMING, _THERE, _TAKEN]), b"\1\1\1\0")


class SlotClass(NamedTuple):
    """Slots that can stand in for each other."""

    stride: int
    rank: int


class SlabUnits(NamedTuple):
    """How many units a slab of one stride has: at least, for one slot, and usually, so that little is left over."""

    least: int
    usual: int


class Run(NamedTuple):
    """Units to make a slab of."""

    of: SlotClass
    first: int
    num_units: int


@lru_cache(maxsize=1024)
def slab_units(unit_bytes: int, num_units: int, stride: int) -> SlabUnits:
    """For an arena of so many units. `usual` is the fewest of which at most 12 % are left over, headers included, or
    else, up to an eighth of the arena, those that leave the least."""
    least = -(-stride // unit_bytes)
    while not slots_in(least * unit_bytes, stride):
        least += 1

    def left_over(units: int) -> float:
        return 1 - slots_in(units * unit_bytes, stride) * stride / (units * unit_bytes)

    candidates = range(least, max(least, num_units // _LARGEST_SHARE) + 1)
    best = next((units for units in candidates if left_over(units) <= _MOST_LEFT_OVER), None)
    return SlabUnits(least, best or min(candidates, key=left_over))


def pack(arena: Arena, free: bytearray, missing: Mapping[SlotClass, int], *, tight: bool) -> list[Run] | None:
    """Runs for slabs of so many slots of each class; None: they do not fit. Pure.

    free: a 1 for each free unit. tight: slabs as short as can be, should longer ones not fit.
    """
    if sum(of.stride * count for of, count in missing.items()) > free.count(1) * arena.unit_bytes:
        return None
    free = bytearray(free)
    runs = []
    for of in sorted(missing, reverse=True):
        least, usual = slab_units(arena.unit_bytes, arena.num_units, of.stride)
        num_units = least if tight else usual
        for _ in range(-(-missing[of] // slots_in(num_units * arena.unit_bytes, of.stride))):
            first = free.find(b"\1" * num_units)
            if first < 0:
                return None
            free[first : first + num_units] = bytes(num_units)
            runs.append(Run(of, first, num_units))
    return runs


def fits(arena: Arena, parts: Iterable[tuple[int, int]]) -> bool:
    """Whether parts of these sizes and ranks fit an arena that is empty."""
    chunk = Counter(SlotClass(slot_stride(size), rank) for size, rank in parts)
    return pack(arena, bytearray(b"\1" * arena.num_units), chunk, tight=True) is not None


class UnitSupply:
    """Units that no slab uses, with their memory claimed ahead by a thread. Thread-safe, for one taker at a time.

    taken: units that are in use from the beginning, or not to be used.
    """

    def __init__(self, arena: Arena, taken: Iterable[int]) -> None:
        self._arena = arena
        self._units = bytearray(arena.num_units)
        for unit in taken:
            self._units[unit] = _TAKEN
        self._ahead = 0
        self._cold: deque[int] = deque()
        """Claimed units whose pages may not have been zeroed."""
        self._changed = threading.Condition()
        self._closed = False
        self._log = OnceLog(logging.getLogger(__name__))
        self.keep_ahead(_LEAST_AHEAD_BYTES)
        self._thread = threading.Thread(target=self._claim_ahead, name="kvferry-claim", daemon=True)
        self._thread.start()

    def free(self) -> bytearray:
        """A 1 for each unit that `take` may give, a 0 for each other."""
        with self._changed:
            return self._units.translate(_IS_FREE)

    def take(self, first: int, num_units: int) -> bool:
        """Use free units; waits for their memory if it must. False: there is no memory for them, nor for any unit
        that has none yet; these are gone."""
        run = slice(first, first + num_units)
        with self._changed:
            while self._units[run] != bytes([_THERE]) * num_units:
                bare = self._units.find(_BARE, run.start, run.stop)
                if _TAKEN in self._units[run]:
                    return False
                if bare >= 0:
                    self._claim(bare)
                else:
                    self._changed.wait()
            self._units[run] = bytes([_TAKEN]) * num_units
            self._changed.notify_all()
            return True

    def put_back(self, first: int, num_units: int) -> None:
        """Units of a slab that is no more. They keep their memory."""
        with self._changed:
            self._units[first : first + num_units] = bytes([_THERE]) * num_units

    def keep_ahead(self, num_bytes: int) -> None:
        """From now on have the memory of at least so much more claimed than is used, but no more than of a quarter."""
        with self._changed:
            units = min(-(-num_bytes // self._arena.unit_bytes), self._arena.num_units // 4)
            self._ahead = max(1, self._ahead, units)
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread; wait until no claim is under way."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _claim(self, unit: int) -> None:
        """Claim one unit, the lock released meanwhile."""
        self._units[unit] = _COMING
        try:
            with self._unlocked():
                self._arena.claim(unit)
        except OSError as error:
            self._units[unit] = _TAKEN
            self._units = self._units.replace(bytes([_BARE]), bytes([_TAKEN]))
            self._log.warn("full", "shared memory is full: the arena ends after %d units: %s", unit, error)
        else:
            self._units[unit] = _THERE
            self._cold.append(unit)
        self._changed.notify_all()

    @contextlib.contextmanager
    def _unlocked(self) -> Iterator[None]:
        self._changed.release()
        try:
            yield
        finally:
            self._changed.acquire()

    def _claim_ahead(self) -> None:
        with self._changed:
            while not self._closed:
                bare = self._units.find(_BARE)
                if bare >= 0 and self._units.count(_COMING) + self._units.count(_THERE) < self._ahead:
                    self._claim(bare)
                elif self._cold:
                    self._warm(self._cold.popleft())
                else:
                    self._changed.wait()

    def _warm(self, unit: int) -> None:
        """Have one unit's pages zeroed, the lock released meanwhile, if nobody has begun to use them."""
        if self._units[unit] == _THERE:
            with self._unlocked():
                self._arena.populate(unit)


@dataclass(slots=True, eq=False)
class Slab:
    """A slab in use. free: offsets of its free slots, the lowest last."""

    run: Run
    num_slots: int
    free: list[int]

    @property
    def units(self) -> range:
        return range(self.run.first, self.run.first + self.run.num_units)


class Room:
    """What-if over an allocator: would there be room for `needs` slots of each class, were some slots given back?
    Changes nothing.

    Valid until the allocator changes.
    """

    def __init__(self, allocator: SlotAllocator, needs: Mapping[SlotClass, int]) -> None:
        self._allocator = allocator
        self._needs = needs
        self._units: bytearray | None = None
        self._given: dict[SlotClass, int] = {}
        self._given_in: dict[Slab, int] = {}

    def give(self, slots: Iterable[Slot]) -> None:
        """Suppose that these taken slots were given back."""
        for slot in slots:
            slab = self._allocator.slab_of(slot)
            num_given = self._given_in[slab] = self._given_in.get(slab, 0) + 1
            given = self._given.get(slab.run.of, 0) + 1
            if len(slab.free) + num_given == slab.num_slots:
                given -= slab.num_slots
                units = slab.units
                self._free_units()[units.start : units.stop] = b"\1" * len(units)
            self._given[slab.run.of] = given

    def enough(self, *, tight: bool) -> bool:
        """Whether there would be room. tight: see `pack`."""
        missing = self._allocator.missing(self._needs, self._given)
        return not missing or self._allocator.pack(self._free_units(), missing, tight=tight) is not None

    def _free_units(self) -> bytearray:
        if self._units is None:
            self._units = self._allocator.free_units()
        return self._units


class SlotAllocator:
    """Free lists over the slabs of an arena. Callers serialise.

    slabs: what an earlier owner of the arena left. unusable: units to leave alone.
    """

    def __init__(self, arena: Arena, slabs: Sequence[Slab] = (), unusable: Iterable[int] = ()) -> None:
        self._arena = arena
        self._supply = UnitSupply(arena, [*unusable, *(unit for slab in slabs for unit in slab.units)])
        self._generations = itertools.count(arena.first_generation)
        self._slabs: dict[int, Slab] = {}
        """By first unit."""
        self._open: dict[SlotClass, dict[Slab, None]] = {}
        """Slabs of a class that have a free slot, the longest open first."""
        self._num_free: Counter[SlotClass] = Counter()
        for slab in slabs:
            self._add(slab)

    def take(self, num_bytes: int, rank: int) -> Slot | None:
        """A slot for a payload of `num_bytes`, with a generation that no slot of this arena had before; None: no room.

        Its header still says free.
        """
        of = SlotClass(slot_stride(num_bytes), rank)
        if of not in self._open and not self.prepare({of: 1}):
            return None
        slab = next(iter(self._open[of]))
        offset = slab.free.pop()
        self._num_free[of] -= 1
        if not slab.free:
            self._shut(slab)
        return Slot(offset, num_bytes, next(self._generations))

    def give_back(self, slot: Slot) -> None:
        """The slot's header already says free. The units of an empty slab return to the supply."""
        slab = self.slab_of(slot)
        slab.free.append(slot.offset)
        self._num_free[slab.run.of] += 1
        self._open.setdefault(slab.run.of, {})[slab] = None
        if len(slab.free) == slab.num_slots:
            self._dissolve(slab)

    def prepare(self, needs: Mapping[SlotClass, int]) -> bool:
        """Make the slabs without which `needs` slots of each class cannot be taken. False, and none made: there is no
        room for them, or no memory."""
        missing = self.missing(needs, {})
        if not missing:
            return True
        units = self.free_units()
        runs = self.pack(units, missing, tight=False)
        if runs is None:
            runs = self.pack(units, missing, tight=True)
        made: list[Slab] = []
        for run in runs or ():
            if not self._supply.take(run.first, run.num_units):
                for slab in made:
                    self._dissolve(slab)
                return False
            of, first, num_units = run
            free = self._arena.format_slab(first, num_units, of.stride, of.rank)[::-1]
            made.append(Slab(run, len(free), free))
            self._add(made[-1])
        return runs is not None

    def missing(self, needs: Mapping[SlotClass, int], given: Mapping[SlotClass, int]) -> dict[SlotClass, int]:
        """What of `needs` could not be taken at once, were these slots given back."""
        missing = {}
        for of, count in needs.items():
            free = self._num_free.get(of, 0) + given.get(of, 0)
            if count > free:
                missing[of] = count - free
        return missing

    def pack(self, units: bytearray, missing: Mapping[SlotClass, int], *, tight: bool) -> list[Run] | None:
        """See the function of this name."""
        return pack(self._arena, units, missing, tight=tight)

    def free_units(self) -> bytearray:
        """A 1 for each unit that no slab uses."""
        return self._supply.free()

    def slab_of(self, slot: Slot) -> Slab:
        """The slab of a taken slot."""
        first = self._arena.slab_of(slot.offset)
        assert first is not None, "a slot lies in a slab"
        return self._slabs[first]

    def check(self, taken: Iterable[Slot]) -> None:
        """InvariantError: `taken` and the free slots are not exactly the slots of the slabs in use, or a slab is not
        where the arena says."""
        free = [offset for slab in self._slabs.values() for offset in slab.free]
        offsets = [slot.offset for slot in taken] + free
        expected = sum(slab.num_slots for slab in self._slabs.values())
        if len(offsets) != len(set(offsets)) or len(offsets) != expected:
            raise InvariantError(f"{len(offsets)} slots are taken or free, {expected} exist")
        for of, slabs in self._open.items():
            num_free = sum(len(slab.free) for slab in slabs)
            if num_free != self._num_free[of] or not slabs or any(slab.run.of != of for slab in slabs):
                raise InvariantError(f"{num_free} free slots of {of}, {self._num_free[of]} counted")
        if sum(map(len, self._open.values())) != sum(bool(slab.free) for slab in self._slabs.values()):
            raise InvariantError("a slab with a free slot is not open, or the reverse")
        slab_of = {unit: first for first, slab in self._slabs.items() for unit in slab.units}
        for unit, is_free in enumerate(self.free_units()):
            if self._arena.slab_of_unit(unit) != slab_of.get(unit) or (is_free and unit in slab_of):
                raise InvariantError(f"unit {unit} belongs to another slab than the arena says, or is also free")

    def counts(self) -> dict[str, int]:
        """Slabs in use, free units, free slots in slabs in use."""
        return {
            "slabs_used": len(self._slabs),
            "units_free": self.free_units().count(1),
            "slots_free": self._num_free.total(),
        }

    def keep_ahead(self, num_bytes: int) -> None:
        """See `UnitSupply.keep_ahead`."""
        self._supply.keep_ahead(num_bytes)

    def close(self) -> None:
        """End the claiming thread; nothing may be taken any more."""
        self._supply.close()

    def _add(self, slab: Slab) -> None:
        """A slab of which a slot at least is taken, or about to be."""
        self._slabs[slab.run.first] = slab
        if slab.free:
            self._open.setdefault(slab.run.of, {})[slab] = None
            self._num_free[slab.run.of] += len(slab.free)

    def _dissolve(self, slab: Slab) -> None:
        of, first, num_units = slab.run
        del self._slabs[first]
        self._num_free[of] -= slab.num_slots
        self._shut(slab)
        self._arena.free_slab(first, num_units)
        self._supply.put_back(first, num_units)

    def _shut(self, slab: Slab) -> None:
        """The slab has no free slot, or is no more."""
        opened = self._open[slab.run.of]
        del opened[slab]
        if not opened:
            del self._open[slab.run.of], self._num_free[slab.run.of]
