"""`python -m eagleray`: the command line."""

import sys

from eagleray.deploy.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
