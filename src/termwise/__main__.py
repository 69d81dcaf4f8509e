"""`python -m termwise`: train the demonstrations."""

import sys

from .demo._command import main

if __name__ == "__main__":
    sys.exit(main())
