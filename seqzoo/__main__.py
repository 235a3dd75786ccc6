"""`python -m seqzoo` is the command `seqzoo`."""

import sys

from seqzoo.cli.main import main

sys.exit(main())
