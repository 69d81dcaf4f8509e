"""`python -m termwise`: train the demonstrations."""

from .demo._command import leave, main

if __name__ == "__main__":
    leave(main())
