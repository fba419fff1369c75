"""`python -m distil_rank`."""

import sys

from distil_rank.cli import main

sys.exit(main())
