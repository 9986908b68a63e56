"""Ctrl-C and SIGTERM: as an error that ends a program, or held back until a step is done and its checkpoint written."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any


class Stopped(KeyboardInterrupt):
    """The program was asked to stop by a signal, whose number is `signal`."""

    def __init__(self, number: int, advice: str = "") -> None:
        """Name the signal, and say what to do next."""
        super().__init__(signal.Signals(number).name + advice)
        self.signal = number


class StopRequest:
    """Whether a stop was asked for while it was held back."""

    _number: int | None = None  # of the signal that asked

    def __bool__(self) -> bool:
        """Return whether to stop at the next step."""
        return self._number is not None

    def obey(self) -> None:
        """Raise `Stopped` if a stop was asked for."""
        if self._number is not None:
            raise Stopped(self._number)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._number is not None:  # twice: whoever asks will not wait
            raise Stopped(number)
        self._number = number
        sys.stderr.write(f"\n{signal.Signals(number).name}: stopping after this step; once more stops at once\n")


@contextlib.contextmanager
def stop_signals_raise() -> Generator[None]:
    """Have SIGTERM end what runs inside as Ctrl-C does: with an error, so that whatever is open is closed.

    Raises:
        Stopped: a signal came; in place of whatever else the error that it raised was turned into on its way.
    """
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        raise Stopped(number)

    with _handling(stop), _raised_again(stop):
        try:
            yield
        except Exception as error:  # JAX makes its own of one that is raised in a callback of a compiled program
            if asked:
                raise Stopped(asked[0]) from error
            raise


@contextlib.contextmanager
def _raised_again(stop: Callable[[int, FrameType | None], None]) -> Generator[None]:
    """Ask again where a stop was lost: raised in a destructor, say, from which no error gets out.

    JAX is kept from printing the traceback of one that was raised in a callback.
    """
    hook, log = sys.unraisablehook, logging.getLogger("jax._src.callback")

    def ask_again(number: int) -> None:
        if signal.getsignal(number) is stop:  # not over meanwhile
            if os.name == "posix":
                os.kill(os.getpid(), number)  # wakes the main thread, whatever it waits for
            else:
                signal.raise_signal(number)  # there, kill would end the process at once

    def unraisable(lost: Any) -> None:
        if isinstance(lost.exc_value, Stopped):
            threading.Timer(0.05, ask_again, (lost.exc_value.signal,)).start()
        else:
            hook(lost)

    def is_no_stop(record: logging.LogRecord) -> bool:
        return record.exc_info is None or not isinstance(record.exc_info[1], Stopped)

    sys.unraisablehook = unraisable
    log.addFilter(is_no_stop)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        log.removeFilter(is_no_stop)


@contextlib.contextmanager
def hold_stops() -> Generator[StopRequest]:
    """Hold Ctrl-C and SIGTERM back until the work inside looks for them; the second one stops it at once.

    >>> with hold_stops() as stop:
    ...     for step in range(3):
    ...         if stop:
    ...             break  # after writing a checkpoint

    Yields:
        The request. A stop that was asked for is raised as `Stopped` at the end at the latest.
    """
    request = StopRequest()
    with _handling(request._ask):
        yield request
    request.obey()


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Generator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python handles signals there alone
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)
