"""
`vlv train` with FSDP2 on the CPU, as a program for `accelerate launch`. On a CPU accelerate quietly trains with DDP in
place of FSDP, unless it takes the processes for ones with a GPU each.
"""

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

start = PartialState.__init__


def start_as_if_on_gpus(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = start_as_if_on_gpus
    from vlv.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
