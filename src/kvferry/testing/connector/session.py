"""What the parts of one check share on one rank: the connector under test, the truth, and what was found so far.

A probe finds its session through the options of its own configuration: in the checking process by id, on another rank
by the folder, to which that rank writes what it found when its engine ends.
"""

from __future__ import annotations

import logging
import os
import uuid
from dataclasses import fields, replace
from pathlib import Path
from typing import Self

import msgspec

from kvferry.config import KvCacheConnectorConfig
from kvferry.connector.config import LlmArgs
from kvferry.testing.connector.faults import Fault
from kvferry.testing.connector.report import Finding
from kvferry.testing.connector.truth import Truth

_sessions: dict[str, Session] = {}


class Session:
    """One check, or another rank's part of it.

    marks: value that a block was filled with, to the name of the block that was to be there (b"": it will not be full).
    known_chains: name of a block to the (cache_salt, lora_id) of requests that computed it. late_names: of blocks that
        a later pass than their request's first filled.
    saw_async: whether a match since `begin` was asynchronous. running_hook: the connector's hook that has not returned
        yet, and since when. explained: hooks of which the engine may complain, as the fault behind it has a name.
    """

    def __init__(self, connector: KvCacheConnectorConfig, folder: Path) -> None:
        self.session_id = uuid.uuid4().hex
        self.connector = connector
        self.folder = folder
        self.truth = Truth()
        self.marks: dict[float, bytes] = {}
        self.known_chains: dict[bytes, set[tuple[str | None, str | None]]] = {}
        self.late_names: set[bytes] = set()
        self.saw_async = False
        self.running_hook: tuple[str, float] | None = None
        self.explained: set[str] = set()
        self.complaints = Complaints()
        self._found: dict[Fault, Finding] = {}
        self._rank = 0

    def __enter__(self) -> Self:
        _sessions[self.session_id] = self
        self.complaints.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.complaints.detach()
        del _sessions[self.session_id]

    @classmethod
    def of(cls, llm_args: LlmArgs) -> Session:
        """The session of a probe, made anew on a rank that is a process of its own."""
        options = llm_args.kv_connector_config.options
        session = _sessions.get(options["session"])
        if session is None:
            session = cls(KvCacheConnectorConfig(**options["connector"]), Path(options["folder"]))
            session.session_id = options["session"]
            session.truth = Truth.load(session.folder)
            session._rank = llm_args.rank
            session.__enter__()  # for as long as this process lives
        return session

    def config_of(self, module: str, scheduler: type, worker: type) -> KvCacheConnectorConfig:
        """The configuration with which an engine makes these probes, which then find this session."""
        target = {field.name: getattr(self.connector, field.name) for field in fields(self.connector)}
        return KvCacheConnectorConfig(
            connector_module=module,
            connector_scheduler_class=scheduler.__name__,
            connector_worker_class=worker.__name__,
            options={"session": self.session_id, "folder": str(self.folder), "connector": target},
        )

    def args_of_connector(self, llm_args: LlmArgs) -> LlmArgs:
        """What the connector under test is made from: its own configuration in place of the probe's."""
        return replace(llm_args, kv_connector_config=self.connector)

    # -- findings ----------------------------------------------------------------------------------------------------

    def found(self, fault: Fault, seen: str, hook: str | None = None) -> None:
        """Note a fault. hook: the engine is going to complain of it too, which is then no news."""
        if hook is not None:
            self.explained.add(hook)
        earlier = self._found.get(fault)
        where = f"rank {self._rank}: " if self._rank else ""
        self._found[fault] = Finding(fault, where + seen) if earlier is None else _once_more(earlier, 1)

    def begin(self) -> None:
        """A scenario begins."""
        self.saw_async = False
        self.explained.clear()
        self.complaints.messages.clear()
        self._found.clear()

    def take_found(self) -> list[Finding]:
        """What was found since `begin`, on all ranks, in the order of `Fault`."""
        return [self._found[fault] for fault in Fault if fault in self._found]

    def write_found(self) -> None:
        """On a rank that is a process of its own: leave what was found to rank 0."""
        if self._rank == 0:
            return
        found = [(finding.fault.name, finding.seen, finding.count) for finding in self._found.values()]
        file = self.folder / f"found-{self._rank}-{os.getpid()}"
        left = (found, sorted(self.explained), self.complaints.messages)
        file.with_suffix(".part").write_bytes(msgspec.msgpack.encode(left))
        file.with_suffix(".part").rename(file.with_suffix(".msgpack"))

    def read_other_ranks(self) -> None:
        """Take in what other ranks left when their engine ended."""
        for file in sorted(self.folder.glob("found-*.msgpack")):
            found, explained, messages = msgspec.msgpack.decode(file.read_bytes())
            file.unlink()
            self.explained.update(explained)
            self.complaints.messages += messages
            for name, seen, count in found:
                fault = Fault[name]
                earlier = self._found.get(fault)
                self._found[fault] = Finding(fault, seen, count) if earlier is None else _once_more(earlier, count)


def _once_more(finding: Finding, count: int) -> Finding:
    return replace(finding, count=finding.count + count)


class Complaints(logging.Handler):
    """What kvferry logs while it is attached, kept from whoever else would show it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self._logger = logging.getLogger("kvferry")

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def about(self, hook: str) -> str:
        """The first message about the hook that says more than that it took long: so does the probe."""
        about = [message for message in self.messages if f"hook {hook}" in message]
        return next((message for message in about if "held the engine up" not in message), "")

    def attach(self) -> None:
        """Take the logger's messages."""
        self._propagated, self._logger.propagate = self._logger.propagate, False
        self._logger.addHandler(self)

    def detach(self) -> None:
        """Leave the logger as it was."""
        self._logger.removeHandler(self)
        self._logger.propagate = self._propagated
