"""`python -m shoestring`: the command line."""

import sys

from shoestring.cli import main

sys.exit(main())
