"""`python hub_upload.py MODEL --repo-id user/name` is `vlv publish`."""

import sys

from vlv.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "publish")
    sys.exit(main())
