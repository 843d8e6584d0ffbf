"""`python -m portable` is the command `portable`."""

import sys

from portable.cli import main

if __name__ == "__main__":
    sys.exit(main())
