"""`python -m cppo`: the `cppo` command, for launchers that start a module."""

import sys

from cppo.cli.main import main

sys.exit(main())
