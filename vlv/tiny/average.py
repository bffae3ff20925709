"""Moving average of weights. A diffusion model with average weights draws better samples than after its last step."""

import torch
from torch import nn
from transformers import TrainerCallback


class MovingAverage(TrainerCallback):
    """Updates `average`, an exponential moving average of the weights of `trained`. The modules have the same shape.

    Both are parts of the model that trains, so a training checkpoint holds the average too.
    """

    def __init__(self, trained: nn.Module, average: nn.Module, decay: float):
        self.trained, self.average, self.decay = trained, average, decay

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        # The average follows faster in early steps. Otherwise the random initial weights would stay in it.
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.trained.parameters()), 1 - decay)
