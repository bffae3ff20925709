"""
`vlv train` as a program for `accelerate launch`, for the tests of training in several processes.

SHARD_ON_CPU=1: with FSDP2 on the CPU. There accelerate would silently train with DDP instead of FSDP. This makes it
believe that each process has a GPU.
KILLED_AT_STEP=N: the second process is killed after N training steps.
"""

import os
import signal
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from vlv.cli import main
from vlv.training.trainer import StageTrainer

SHARD = os.environ.get("SHARD_ON_CPU") == "1"
KILLED_AT_STEP = int(os.environ.get("KILLED_AT_STEP", -1))

start, training_step = PartialState.__init__, StageTrainer.training_step


def start_as_if_on_gpus(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if SHARD and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def checked_step(self, *args, **kwargs):
    assert all(isinstance(weight, DTensor) == SHARD for weight in self.stage.model.parameters())
    if (self.state.global_step, self.args.process_index) == (KILLED_AT_STEP, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return training_step(self, *args, **kwargs)


if __name__ == "__main__":
    PartialState.__init__, StageTrainer.training_step = start_as_if_on_gpus, checked_step
    sys.exit(main(["train", *sys.argv[1:]]))
