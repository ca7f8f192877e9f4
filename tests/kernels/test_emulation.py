"""Parts of the emulation that a kernel's result does not show."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
from qoqlab_kernels import emulation


def test_threads_that_ask_for_a_shared_array_at_once_get_the_same() -> None:
    block, empty = SimpleNamespace(_allocations={}, _dynshared=np.zeros(10, np.byte)), np.empty
    found: list[np.ndarray] = []

    def slow(*arguments: object) -> np.ndarray:
        time.sleep(0.05)  # every other thread comes to this line meanwhile
        return empty(*arguments)  # type: ignore[call-overload,no-any-return]

    def ask() -> None:
        found.append(emulation.shared_array(block, 4, np.uint32))

    with mock.patch.object(np, "empty", slow):
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 8 and all(array is found[0] for array in found)
    assert (found[0].view(np.uint8) == emulation.POISON).all()
    assert emulation.shared_array(block, 4, np.uint32) is not found[0]  # another line
    assert emulation.shared_array(block, 0, np.uint32).shape == (2,)
