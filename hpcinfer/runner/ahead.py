"""Work done ahead of whoever needs it, in a thread, within bounds of number and size."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """Runs iterators in a background thread, one after the other, and keeps what they yield until it is taken: in order, each once.

    All methods are for one thread, the one that takes. What an iterator raises is raised by the `take` whose turn it is, after everything
    that came before it; nothing comes after it. The thread starts with the first iterator.

    Args:
        size_of: bytes of an item.
        max_items: the thread waits while so many are ready ...
        max_bytes: ... or so many bytes; one batch may go beyond.
    """

    def __init__(self, size_of: Callable[[Item], int], *, max_items: int, max_bytes: int) -> None:
        self._size_of = size_of
        self._max_items = max_items
        self._max_bytes = max_bytes
        # Guards all that follows; notified at each change.
        self._changed = threading.Condition()
        self._orders: collections.deque[Iterator[list[Item]]] = collections.deque()
        self._ready: collections.deque[Item] = collections.deque()
        self._ready_bytes = 0
        self._failure: BaseException | None = None
        self._is_working = False
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def put(self, batches: Iterator[list[Item]]) -> None:
        """Has an iterator run, after those that are there. From now on it belongs to the thread."""
        with self._changed:
            self._orders.append(batches)
            self._changed.notify_all()
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._work, name="ahead", daemon=True)
                self._thread.start()

    def take(self, *, wait_s: float | None) -> Item | None:
        """The next item; None where there is none left, or none after `wait_s` (None: as long as it takes)."""
        with self._changed:
            if not self._ready:
                self._changed.wait_for(lambda: self._ready or self._failure is not None or not self._is_busy(), wait_s)
            if not self._ready:
                if self._failure is not None:
                    raise self._failure
                return None
            item = self._ready.popleft()
            self._ready_bytes -= self._size_of(item)
            if not self._is_full():
                self._changed.notify_all()
            return item

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the thread, after the batch that it is at, and drops what was not taken. Waits for it, at most `timeout_s`."""
        with self._changed:
            self._is_closed = True
            self._orders.clear()
            self._ready.clear()
            self._ready_bytes = 0
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _is_busy(self) -> bool:
        return not self._is_closed and (self._is_working or bool(self._orders))

    def _is_full(self) -> bool:
        return bool(self._ready) and (len(self._ready) >= self._max_items or self._ready_bytes >= self._max_bytes)

    # The thread -----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (order := self._next_order()) is not None:
                for batch in order:
                    if not self._keep(batch):
                        return
        except BaseException as error:  # of whatever kind: `take` raises it
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _next_order(self) -> Iterator[list[Item]] | None:
        with self._changed:
            self._is_working = False
            self._changed.notify_all()
            while not self._orders and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                return None
            self._is_working = True
            return self._orders.popleft()

    def _keep(self, batch: list[Item]) -> bool:
        """Hands a batch over and waits for room for another one; False once nobody wants one."""
        with self._changed:
            if not self._is_closed:
                self._ready.extend(batch)
                self._ready_bytes += sum(map(self._size_of, batch))
                self._changed.notify_all()
            while self._is_full() and not self._is_closed:
                self._changed.wait()
            return not self._is_closed
