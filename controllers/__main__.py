"""Entry point of `python -m controllers`."""

import os
import signal
import sys

# Importing torch takes seconds; until the program listens itself, Ctrl-C just ends it, without a traceback.
signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from controllers.commandline import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
