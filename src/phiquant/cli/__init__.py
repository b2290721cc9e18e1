"""The command line: one file per verb, imported when the verb is used."""

__all__ = ["main"]


def main() -> None:
    """Entry point of the `phiquant` script: runs the verb named by the arguments, then exits with its status.

    0 success, 1 an error told in one sentence, 2 wrong usage, 130 interrupted by Ctrl-C, 141 the reader of the output
    went away.
    """
    import signal
    import sys

    try:
        from .app import run

        status = run(sys.argv[1:])
    except KeyboardInterrupt:
        status = 130
    # What was asked for is done, or undone: a Ctrl-C that comes now must not change the status while Python winds up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(status)
