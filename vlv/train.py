"""`python -m vlv.train RECIPE` is `vlv train RECIPE`, for `accelerate launch -m` and `torchrun -m`."""

import sys

from vlv.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    sys.exit(main())
