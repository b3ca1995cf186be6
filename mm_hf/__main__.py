"""`python -m mm_hf` is `mm-hf`."""

import sys

from .commands import main

sys.exit(main())
