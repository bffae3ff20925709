"""Muon for the weight matrices and another optimizer for all other weights, as the one optimizer of a Trainer."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from vlv.training.sharding import asks_for_fsdp


class MuonAndOther(Optimizer):
    """
    Each step is one of `torch.optim.Muon` for the matrices and one of the other optimizer for the rest.

    Muon makes all singular values of a matrix's update equal, so that no direction learns much slower than another
    (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon). Its updates are scaled to the size of AdamW's.

    Args:
        other: an optimizer of all weights. Its groups lose the matrices.
        matrices: weights with two dimensions.
        lr: Muon's learning rate. The weight decay is that of the groups.
    """

    def __init__(self, other: Optimizer, matrices: Collection[nn.Parameter], lr: float):
        chosen, groups = set(matrices), []
        for group in other.param_groups:
            mine = [weight for weight in group["params"] if weight in chosen]
            group["params"] = [weight for weight in group["params"] if weight not in chosen]
            if mine:
                groups.append({"params": mine, "weight_decay": group["weight_decay"]})
        self.other, self.muon = other, torch.optim.Muon(groups, lr=lr, adjust_lr_fn="match_rms_adamw")
        kept = [group for group in other.param_groups if group["params"]]
        self.others = len(kept)
        super().__init__([*kept, *self.muon.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Loading a checkpoint replaces the groups and the state of this optimizer.
        self.other.param_groups = self.param_groups[: self.others]
        self.muon.param_groups = self.param_groups[self.others :]
        for part in (self.other, self.muon):
            part.state = self.state
            part.step()
        return loss


def require_muon(args: TrainingArguments) -> None:
    """Raises ValueError where Muon cannot train."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"muon_learning_rate needs PyTorch 2.9 or newer, and this is {torch.__version__}.")
    if asks_for_fsdp(args) or args.deepspeed_plugin is not None:
        raise ValueError("muon_learning_rate needs whole matrices, which FSDP and DeepSpeed shard: train with DDP.")


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    """The weights of linear layers that train, without those that are tables of words at the same time."""
    modules = list(model.modules())
    tables = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    linear = {id(module.weight) for module in modules if isinstance(module, nn.Linear)} - tables
    return [weight for weight in model.parameters() if weight.requires_grad and id(weight) in linear]
