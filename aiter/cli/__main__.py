"""`python -m aiter.cli`: the same as `python -m aiter`."""

import sys

from aiter.cli import main

sys.exit(main())
