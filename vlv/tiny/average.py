"""Moving average of weights: a diffusion model's samples are better from the average than from the last step."""

import torch
from torch import nn
from transformers import TrainerCallback


class MovingAverage(TrainerCallback):
    """Keeps `average` an exponential moving average of `trained`, two modules of one shape.

    Both live in the model that is trained, so a training checkpoint holds the average too.
    """

    def __init__(self, trained: nn.Module, average: nn.Module, decay: float):
        self.trained, self.average, self.decay = trained, average, decay

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        # Early on the average follows faster, or it would drag the random start along.
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.trained.parameters()), 1 - decay)
