"""Models that FSDP2 has sharded: each process holds a part of every weight, and all gather the whole together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, TrainingArguments


def check_fsdp(args: TrainingArguments) -> None:
    """Raises ValueError where accelerate would train with DDP in place of the FSDP that it was asked for."""
    asked = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ValueError(
            "FSDP spreads a model over several GPUs, which are not there: use another config of accelerate, such as"
            " the ddp of the package."
        )


def blank_copy(model: nn.Module) -> nn.Module:
    """A copy of a model that is not sharded yet, without the content of its weights: see [`fill`]."""
    blanks = {id(weight): nn.Parameter(weight.to("meta"), weight.requires_grad) for weight in model.parameters()}
    return deepcopy(model, blanks)


def keep_digits(plugin: FullyShardedDataParallelPlugin) -> None:
    """Keeps losses in fp32, as under DDP: in half precision accelerate would have FSDP round them to that."""
    # Sums of gradients stay in half precision: in fp32, FSDP fails to accumulate those of layers that never run.
    if isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def keep_tied_together(model: nn.Module) -> None:
    """
    Keeps accelerate from sharding the input embeddings apart from what is tied to them: it looks for output embeddings
    alone, but Florence-2's are tied into both of its halves, and FSDP refuses to shard such weights apart.
    """
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is None:
        model.get_input_embeddings = lambda: None


def reshard(model: nn.Module) -> None:
    """Puts the parts back in place of the whole weights, in the compute precision, that a forward pass leaves."""
    model.state_dict()  # FSDP does so for a state dict; `FSDPModule.reshard` does not after half a forward pass


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """
    Lets other methods of a sharded model than `forward` compute: FSDP gathers the weights of its layers whenever these
    run, but those outside of any layer only for `forward`. All processes must do the same in this context.
    """
    if isinstance(model, FSDPModule):
        model.unshard()
    yield
    if isinstance(model, FSDPModule):
        reshard(model)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor; all processes must ask for it together."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def assign(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copies a whole tensor, which every process has, into one that may be sharded."""
    if isinstance(target, DTensor):
        whole = whole.detach().to(target.device)
        whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)


def fill(blank: nn.Module, model: nn.Module, keep: bool) -> None:
    """
    Gathers the weights of a sharded model. They go into its [`blank_copy`] in the processes that `keep` them; all
    processes must call this together.
    """
    reshard(model)
    weights = dict(model.named_parameters())
    for name, weight in blank.named_parameters():
        whole = gathered(weights[name])
        if keep:
            torch.utils.swap_tensors(weight, nn.Parameter(whole.cpu(), weight.requires_grad))
