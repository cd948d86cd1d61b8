"""Ctrl-C where nothing is lost: what is under way is finished and kept first."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def patient(possible: bool = True) -> Iterator[Callable[[], bool]]:
    """Within it, Ctrl-C is only noted, and what is yielded tells whether it was; a second one interrupts at once.

    Whoever asks finishes, keeps what there is and raises KeyboardInterrupt.

    Args:
        possible: if not, Ctrl-C does what it always does. So it does outside the main thread, and where it is ignored, as in
            the background.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if not possible or ignored or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    noted = False

    def note(*_: object) -> None:
        nonlocal noted
        noted = True
        signal.signal(signal.SIGINT, before)
        print("\nstopping, once what there is is kept; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)
