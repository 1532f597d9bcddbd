"""Programs that tests end by signals."""

import signal


def hear_signals() -> None:
    """For subprocess's preexec_fn: undoes what a shell (SIGINT and SIGQUIT, of what it runs in the background) and
    nohup (SIGHUP) make all their children ignore."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
