"""The thread beside the passes."""

from __future__ import annotations

import threading

from kvferry.offload.background import Background, Readiness, Task


def test_flush_waits_for_the_jobs_that_it_is_given_and_for_no_other() -> None:
    background = Background("test")
    begun, may_end = threading.Event(), threading.Event()

    def run(wanted: bool) -> bool:
        begun.set()
        return wanted and may_end.wait(10)

    background.submit(Task(1, run))
    background.wait_for(Task(2, lambda wanted: wanted), lambda: Readiness.NOT_YET, 10)
    background.flush([3])
    assert begun.wait(10)
    flushed = threading.Event()
    waiter = threading.Thread(target=lambda: (background.flush([1, 3]), flushed.set()))
    waiter.start()
    assert not flushed.wait(0.05)
    may_end.set()
    assert flushed.wait(10)
    assert background.take_ended() == {1: True}
    background.flush([1])
    waiter.join()
    background.close()
    assert background.take_ended() == {2: False}
