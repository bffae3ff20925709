"""Muon for the weight matrices and another optimizer for all other weights, as the one optimizer of a Trainer."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainingArguments

from vlv.training.sharding import asks_to_shard

MOMENTUM = 0.95


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """
    A matrix with the singular vectors of this one, and singular values between 0.5 and 1.5: five steps of a
    Newton-Schulz iteration, with Jordan's coefficients.

    It computes in bfloat16, as `torch.optim.Muon` does, but on a CPU in float32: most CPUs have no instructions for
    bfloat16, and take four to eight times as long. In float32, the iteration of a long matrix needs only its Gram
    matrix, which is smaller.
    """
    wide = matrix if matrix.size(0) <= matrix.size(1) else matrix.T
    on_cpu = wide.device.type == "cpu"
    wide = wide.float() if on_cpu else wide.bfloat16()
    wide = wide / wide.norm().clamp(min=1e-7)
    wide = _by_gram(wide) if on_cpu and wide.size(1) >= 2 * wide.size(0) else _by_matrix(wide)
    return wide if matrix.size(0) <= matrix.size(1) else wide.T


def _by_matrix(wide: torch.Tensor) -> torch.Tensor:
    for _ in range(5):
        wide = torch.addmm(wide, _polynomial(wide @ wide.T), wide, beta=3.4445)
    return wide


def _by_gram(wide: torch.Tensor) -> torch.Tensor:
    gram = wide @ wide.T
    product = torch.eye(len(gram))
    for _ in range(5):
        factor = _polynomial(gram)
        factor.diagonal().add_(3.4445)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ wide


def _polynomial(gram: torch.Tensor) -> torch.Tensor:
    return torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)


class MuonAndOther(Optimizer):
    """
    Each step is one of Muon for the matrices and one of the other optimizer for the rest.

    Muon makes all singular values of a matrix's update equal, so that no direction learns much slower than another
    (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon). Its updates are scaled to the size of AdamW's
    (Liu et al., 2025, https://arxiv.org/abs/2502.16982).

    Args:
        other: an optimizer of all weights. Its groups lose the matrices.
        matrices: weights with two dimensions, or more, which become one.
        lr: Muon's learning rate. The weight decay is that of the groups.
    """

    def __init__(self, other: Optimizer, matrices: Collection[nn.Parameter], lr: float):
        chosen, groups = set(matrices), []
        for group in other.param_groups:
            mine = [weight for weight in group["params"] if weight in chosen]
            group["params"] = [weight for weight in group["params"] if weight not in chosen]
            if mine:
                groups.append({"params": mine, "lr": lr, "weight_decay": group["weight_decay"]})
        self.other = other
        kept = [group for group in other.param_groups if group["params"]]
        self.others = len(kept)
        super().__init__([*kept, *groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Loading a checkpoint replaces the groups and the state of this optimizer.
        self.other.param_groups, self.other.state = self.param_groups[: self.others], self.state
        self.other.step()
        for group in self.param_groups[self.others :]:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step(weight, group["lr"], group["weight_decay"])
        return loss

    def _step(self, weight: nn.Parameter, lr: float, weight_decay: float) -> None:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - MOMENTUM)
        nesterov = weight.grad.lerp(momentum, MOMENTUM)
        update = orthogonal(nesterov.flatten(1))  # a convolution's filters are rows
        scale = 0.2 * max(update.shape) ** 0.5
        weight.mul_(1 - lr * weight_decay).add_(update.reshape(weight.shape), alpha=-lr * scale)


def require_muon(rate: float, args: TrainingArguments) -> None:
    """Raises ValueError where Muon cannot train."""
    if rate <= 0:
        raise ValueError(f"muon_learning_rate is {rate:g}: it must be above 0.")
    if asks_to_shard(args):
        raise ValueError("muon_learning_rate needs whole matrices, which FSDP and DeepSpeed shard: train with DDP.")


def matrices_of(model: nn.Module) -> list[nn.Parameter]:
    """
    The weights of linear layers and convolutions that train. Left out are those that are tables of words at the same
    time, and convolutions in groups, whose weights mix few channels.
    """
    modules = list(model.modules())
    tables = {id(module.weight) for module in modules if isinstance(module, nn.Embedding)}
    mixing = {id(module.weight) for module in modules if isinstance(module, nn.Linear)}
    mixing |= {id(module.weight) for module in modules if isinstance(module, nn.Conv2d) and module.groups == 1}
    return [weight for weight in model.parameters() if weight.requires_grad and id(weight) in mixing - tables]
