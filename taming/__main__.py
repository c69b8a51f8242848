"""`python -m taming COMMAND ...` is the command `taming COMMAND ...`."""

import sys

from taming.cli import main

sys.exit(main())
