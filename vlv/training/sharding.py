"""Models that FSDP2 shards: each process holds a part of every weight, and all processes gather it together."""

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


def asks_for_fsdp(args: TrainingArguments) -> bool:
    """Whether the arguments, or the configuration of accelerate, ask for FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def asks_to_shard(args: TrainingArguments) -> bool:
    """Whether the arguments ask for FSDP or DeepSpeed. A process then does not hold whole weights in fp32."""
    return asks_for_fsdp(args) or args.deepspeed_plugin is not None


def check_fsdp(args: TrainingArguments) -> None:
    """Raises ValueError when accelerate would train with DDP although FSDP was requested."""
    asked = asks_for_fsdp(args)
    if asked and args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ValueError(
            "FSDP shards a model over several GPUs, and this machine does not have them: use another config of"
            " accelerate, such as ddp."
        )


def blank_copy(model: nn.Module) -> nn.Module:
    """A copy, without weights, of a model that is not sharded yet; [`fill`] fills it."""
    blanks = {id(weight): nn.Parameter(weight.to("meta"), weight.requires_grad) for weight in model.parameters()}
    return deepcopy(model, blanks)


def keep_digits(plugin: FullyShardedDataParallelPlugin) -> None:
    """Keeps losses in fp32, as under DDP. In half precision, accelerate would let FSDP round them."""
    # Sums of gradients stay in half precision. In fp32, FSDP cannot accumulate those of layers that never run.
    if isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def keep_tied_together(model: nn.Module) -> None:
    """
    Prevents accelerate from sharding the input embeddings separately from the weights that are tied to them. It looks
    only for tied output embeddings. Florence-2's are tied into both halves of its language model, and FSDP refuses to
    shard tied weights separately.
    """
    if isinstance(model, PreTrainedModel) and model.get_output_embeddings() is None:
        model.get_input_embeddings = lambda: None


def reshard(model: nn.Module) -> None:
    """Shards again the weights that a forward pass has gathered in the compute precision."""
    model.state_dict()  # this makes FSDP shard; `FSDPModule.reshard` does not after an unfinished forward pass


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """
    Makes other methods of a sharded model than `forward` work. FSDP gathers the weights of a layer whenever the layer
    runs, but weights outside of all layers only for `forward`. All processes must do the same in this context.
    """
    if isinstance(model, FSDPModule):
        model.unshard()
    yield
    if isinstance(model, FSDPModule):
        reshard(model)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor. All processes must call this together."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def assign(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copies a whole tensor, which every process has, into a tensor that may be sharded."""
    if isinstance(target, DTensor):
        whole = whole.detach().to(target.device)
        whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)


def fill(blank: nn.Module, model: nn.Module, keep: bool) -> None:
    """
    Gathers the weights of a sharded model. Processes with `keep` put them into its [`blank_copy`]. All processes must
    call this together.
    """
    reshard(model)
    weights = dict(model.named_parameters())
    for name, weight in blank.named_parameters():
        whole = gathered(weights[name])
        if keep:
            torch.utils.swap_tensors(weight, nn.Parameter(whole.cpu(), weight.requires_grad))
