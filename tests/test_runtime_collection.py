"""What must not be interrupted by Python's collector is not."""

import gc
import weakref

from mmi_engine.runtime import no_collection


class Node:
    """An object that only the collector can free."""

    def __init__(self) -> None:
        self.me = self


def test_nothing_is_collected_meanwhile_and_the_setting_returns() -> None:
    before, old = gc.isenabled(), weakref.ref(Node())
    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        with no_collection():
            assert old() is None  # what was garbage is gone
            new = weakref.ref(Node())
            for _ in range(1000):
                Node()
            assert new() is not None
        assert gc.isenabled() == before
    finally:
        gc.set_threshold(*threshold)
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        if before:
            gc.enable()
