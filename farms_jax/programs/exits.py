"""How a program ends: one line on stderr where the mistake is not its own, and the exit status that shells expect."""

import contextlib
import os
import sys
from collections.abc import Callable, Generator
from typing import NoReturn

from farms_jax.errors import InputError
from farms_jax.programs.stopping import Stopped, stop_signals_raise


@contextlib.contextmanager
def reported(program: str, when_stopped: str = "") -> Generator[None]:
    """End a program with one line on stderr instead of a traceback, where the mistake is not the program's.

    Exit status 2 for an `InputError` or a file that cannot be used, 130 after Ctrl-C and 143 after SIGTERM, 141 where
    the program that reads the output has ended. `when_stopped` says what to do after a stop.
    """
    try:
        with stop_signals_raise():
            yield
            sys.stdout.flush()
    except InputError as error:
        sys.stderr.write(f"{program}: {error}\n")
        sys.exit(2)
    except BrokenPipeError:  # of `... | head`: nobody reads on, and nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        sys.stderr.write(f"{program}: {error.filename or 'the output or a file'}: {error.strerror or error}\n")
        sys.exit(2)
    except Stopped as stopped:
        sys.stderr.write(f"\n{program}: stopped by {stopped}{when_stopped}\n")
        sys.exit(128 + stopped.signal)  # as a shell reports it


def run_and_end(main: Callable[[], object]) -> NoReturn:
    """Run a program and end the process with its exit status, without waiting for threads that still compute.

    Python's own way out waits for them, for minutes where one is at a long task, and crashes where one is inside XLA.
    """
    status = 0
    try:
        main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
