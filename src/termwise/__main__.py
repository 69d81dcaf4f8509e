"""`python -m termwise`: train the demonstrations."""

import os
import sys

from .demo._command import main

if __name__ == "__main__":
    code = main()
    if "RANK" in os.environ:
        # gloo's threads outlive the group and can abort an interpreter that winds down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
