"""`python -m widefield`."""

import sys

from widefield.cli import script

if __name__ == "__main__":
    sys.exit(script())
