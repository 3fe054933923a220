"""Where memory lies."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import pytest

from kvferry.memory import node_of_pci_device, prefer_node

PAGE = mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="needs a kernel with NUMA, as most are")
def test_pages_are_asked_of_a_node() -> None:
    memory = mmap.mmap(-1, 8 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    prefer_node(address + 2 * PAGE, 4 * PAGE, 0)
    memory[2 * PAGE] = 1
    policies = dict(line.split()[:2] for line in Path("/proc/self/numa_maps").read_text("utf-8").splitlines())
    assert policies[f"{address + 2 * PAGE:x}"].startswith("prefer")
    assert policies[f"{address + 6 * PAGE:x}"] == "default"
    with pytest.raises(OSError, match="Invalid argument"):
        prefer_node(address + 1, PAGE, 0)


def test_a_device_is_next_to_a_node(tmp_path: Path) -> None:
    device = tmp_path / "bus/pci/devices/0000:1b:00.0"
    device.mkdir(parents=True)
    for node, expected in (("1", 1), ("-1", None), ("what", None)):
        (device / "numa_node").write_text(f"{node}\n", encoding="ascii")
        for number in range(2):
            (tmp_path / f"devices/system/node/node{number}").mkdir(parents=True, exist_ok=True)
        assert node_of_pci_device("0000:1B:00.0", tmp_path) == expected
    assert node_of_pci_device("0000:ff:00.0", tmp_path) is None
    (device / "numa_node").write_text("1", encoding="ascii")
    (tmp_path / "devices/system/node/node1").rmdir()
    assert node_of_pci_device("0000:1b:00.0", tmp_path) is None, "there is one node"
