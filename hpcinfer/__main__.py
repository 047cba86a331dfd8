"""`python -m hpcinfer VERB ...`."""

import sys

from hpcinfer.cli.main import main

sys.exit(main())
