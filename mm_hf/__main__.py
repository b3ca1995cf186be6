"""`python -m mm_hf` is `mm-hf`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
