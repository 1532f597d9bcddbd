"""`python -m aiter`, for where the `aiter` script is not on PATH."""

import sys

from aiter.cli import main

sys.exit(main())
