"""`python -m hicode` is the command `hicode`."""

import sys

from hicode.cli import main

sys.exit(main())
