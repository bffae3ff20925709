"""The overview of a training, printed before any long work."""

from torch import nn
from transformers import TrainingArguments

from vlv.training.muon import matrices_of
from vlv.training.stage import Stage


def overview(stage: Stage, args: TrainingArguments) -> str:
    """What trains and what is frozen, part by part, and how much memory this takes."""
    lines = [f"{'part':<24} {'trains':>12} {'frozen':>12} {'weights':>10}"]
    for name, part in stage.parts().items():
        lines.append(part_line(name, part))
    lines.append(part_line("all", stage.model))
    gradients = sum(p.numel() * p.element_size() for p in stage.model.parameters() if p.requires_grad)
    lines.append(f"On top of the weights: gradients {gradients / 2**20:.1f} MiB,")
    if args.optim in ("adamw_torch", "adamw_torch_fused"):
        muon = stage.settings.muon_learning_rate is not None
        matrices = sum(p.numel() * p.element_size() for p in matrices_of(stage.model)) if muon else 0
        lines[-1] += f" AdamW's two moments {2 * (gradients - matrices) / 2**20:.1f} MiB,"
        if matrices:
            lines[-1] += f" Muon's moment {matrices / 2**20:.1f} MiB,"
    lines[-1] += " activations, cached inputs."
    return "\n".join(lines)


def part_line(name: str, part: nn.Module) -> str:
    parameters = list(part.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    size = sum(p.numel() * p.element_size() for p in parameters)
    return f"{name:<24} {trained:>12,} {total - trained:>12,} {size / 2**20:>7.1f} MiB"
