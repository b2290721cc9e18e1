"""What every test needs of the process it runs in."""

import signal

# A shell that starts a job in the background makes it ignore Ctrl-C, and children inherit that: what the tests
# interrupt would not hear it. A handler, unlike being ignored, is not inherited.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
