"""What every `ByteStore` must do, as a suite that the tests of each backend subclass, and the smallest backend.

Source of the shape: zarr-python's `StoreTests`. Knows nothing of how a backend keeps its bytes; the subclass reaches
them past the object under test, to damage them.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

from kvferry.store.base import ByteStore, PartName
from kvferry.store.keys import part_name


class DictByteStore:
    """Bytes in this process, for as long as it lives. Thread-safe."""

    def __init__(self) -> None:
        self.values: dict[PartName, bytes] = {}

    def put(self, name: PartName, view: memoryview) -> None:
        self.values[name] = bytes(view)

    def get_into(self, name: PartName, view: memoryview) -> bool:
        value = self.values.get(name)
        if value is None or len(value) != len(view):
            return False
        view[:] = value
        return True

    def contains(self, names: Sequence[PartName]) -> list[bool]:
        return [name in self.values for name in names]

    def delete(self, names: Sequence[PartName]) -> None:
        for name in names:
            self.values.pop(name, None)

    def touch(self, names: Sequence[PartName]) -> None:
        """Nothing is ever given up."""

    def close(self) -> None:
        """Values stay, as they would on a disk."""


def value_of(name: PartName, num_bytes: int = 70_000) -> memoryview:
    """Bytes that only this name has, the same at every call."""
    return memoryview(hashlib.shake_128(name).digest(num_bytes))


def name_of(number: int, rank: int = 0) -> PartName:
    """A part's name."""
    return part_name(hashlib.sha256(number.to_bytes(8, "little")).digest(), 0, rank)


class ByteStoreSuite:
    """Subclass as `class TestMine(ByteStoreSuite)` and implement the three hooks, which may use pytest's fixtures.

    `persistent` says whether values outlive the object; `damage` whether `corrupt` and `truncate` work.
    """

    persistent = True
    damage = True

    def make(self) -> ByteStore:
        """Open the backend; opened again within one test, it finds what the last one left."""
        raise NotImplementedError

    def corrupt(self, name: PartName) -> None:
        """Flip a bit of this name's value where it is kept."""
        raise NotImplementedError

    def truncate(self, name: PartName) -> None:
        """Cut off the end of this name's value where it is kept."""
        raise NotImplementedError

    def read(self, store: ByteStore, name: PartName, num_bytes: int = 70_000) -> bytes | None:
        """The value under `name`, or None."""
        buffer = bytearray(num_bytes)
        return bytes(buffer) if store.get_into(name, memoryview(buffer)) else None

    def test_what_is_put_is_got(self) -> None:
        store = self.make()
        for number in range(3):
            store.put(name_of(number), value_of(name_of(number)))
        assert [self.read(store, name_of(number)) for number in range(3)] == [
            bytes(value_of(name_of(number))) for number in range(3)
        ]
        store.close()

    def test_sizes_from_one_byte_to_many_pieces(self) -> None:
        store = self.make()
        sizes = (1, 4095, 4096, 4097, (1 << 18) - 1, (1 << 18) + 1, 1_000_003)
        for number, num_bytes in enumerate(sizes):
            store.put(name_of(number), value_of(name_of(number), num_bytes))
        for number, num_bytes in enumerate(sizes):
            assert self.read(store, name_of(number), num_bytes) == bytes(value_of(name_of(number), num_bytes))
        store.close()

    def test_an_unknown_name_is_a_miss(self) -> None:
        store = self.make()
        store.put(name_of(1), value_of(name_of(1)))
        assert self.read(store, name_of(2)) is None
        assert store.contains([name_of(2), name_of(1)]) == [False, True]
        assert store.contains([]) == []
        store.close()

    def test_another_rank_is_another_name(self) -> None:
        store = self.make()
        store.put(name_of(1, rank=0), value_of(name_of(1, rank=0)))
        assert self.read(store, name_of(1, rank=1)) is None
        store.close()

    def test_another_length_is_a_miss(self) -> None:
        store = self.make()
        store.put(name_of(1), value_of(name_of(1)))
        assert self.read(store, name_of(1), 69_999) is None
        assert self.read(store, name_of(1), 70_001) is None
        store.close()

    def test_deleted_is_gone(self) -> None:
        store = self.make()
        store.put(name_of(1), value_of(name_of(1)))
        store.delete([name_of(1), name_of(2)])
        assert store.contains([name_of(1)]) == [False]
        assert self.read(store, name_of(1)) is None
        store.put(name_of(1), value_of(name_of(1)))
        assert self.read(store, name_of(1)) == bytes(value_of(name_of(1)))
        store.close()

    def test_use_changes_no_value(self) -> None:
        store = self.make()
        store.put(name_of(1), value_of(name_of(1)))
        store.touch([name_of(1), name_of(2)])
        assert store.contains([name_of(1), name_of(2)]) == [True, False]
        assert self.read(store, name_of(1)) == bytes(value_of(name_of(1)))
        store.close()

    def test_the_caller_may_reuse_its_buffer(self) -> None:
        store = self.make()
        buffer = bytearray(value_of(name_of(1)))
        store.put(name_of(1), memoryview(buffer))
        buffer[:] = bytes(len(buffer))
        assert self.read(store, name_of(1)) == bytes(value_of(name_of(1)))
        store.close()

    def test_putting_twice_changes_nothing(self) -> None:
        store = self.make()
        for _ in range(2):
            store.put(name_of(1), value_of(name_of(1)))
        assert self.read(store, name_of(1)) == bytes(value_of(name_of(1)))
        store.close()

    def test_values_outlive_the_object(self) -> None:
        store = self.make()
        store.put(name_of(1), value_of(name_of(1)))
        store.close()
        store = self.make()
        assert store.contains([name_of(1)]) == [self.persistent]
        assert self.read(store, name_of(1)) == (bytes(value_of(name_of(1))) if self.persistent else None)
        store.close()

    def test_a_damaged_value_is_a_miss_and_can_be_put_again(self) -> None:
        for harm in (self.corrupt, self.truncate) if self.damage else ():
            store = self.make()
            for number in (1, 2):
                store.put(name_of(number), value_of(name_of(number)))
            harm(name_of(1))
            assert self.read(store, name_of(1)) is None
            assert self.read(store, name_of(2)) == bytes(value_of(name_of(2)))
            store.put(name_of(1), value_of(name_of(1)))
            assert self.read(store, name_of(1)) == bytes(value_of(name_of(1)))
            store.close()

    def test_many_threads(self) -> None:
        """Every read of a name gives its own bytes or none, whatever others put and delete meanwhile."""
        store = self.make()
        wrong: list[str] = []

        def work(seed: int) -> None:
            for step in range(40):
                name = name_of((seed * 7 + step * 5) % 6)
                if step % 3 == 0:
                    store.put(name, value_of(name))
                elif step % 7 == 6:
                    store.delete([name])
                elif (got := self.read(store, name)) not in (None, bytes(value_of(name))):
                    wrong.append(f"{name.hex()} read as {got[:8].hex() if got else None}")

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        store.close()
