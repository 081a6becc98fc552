"""`python -m codesign` is `codesign`."""

import sys

from codesign.cli import main

if __name__ == "__main__":
    sys.exit(main())
