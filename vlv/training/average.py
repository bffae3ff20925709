"""Moving average of weights: a diffusion model's samples are better from the average than from the last step."""

from collections.abc import Iterable

import torch
from transformers import TrainerCallback


class MovingAverage(TrainerCallback):
    """Keeps the tensors `average` an exponential moving average of the weights `trained`, in the same order.

    A training checkpoint should hold the average too, so that a resumed run continues it.
    """

    def __init__(self, trained: Iterable[torch.Tensor], average: Iterable[torch.Tensor], decay: float):
        self.trained, self.average, self.decay = list(trained), list(average), decay

    def on_train_begin(self, args, state, control, **kwargs):
        # In place, because the trained weights and the checkpoint that was loaded before are on the device only now.
        self.average[:] = [mean.to(weight.device) for mean, weight in zip(self.average, self.trained, strict=True)]

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        # Early on the average follows faster, so that the random start leaves it soon.
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        torch._foreach_lerp_(self.average, self.trained, 1 - decay)

    @torch.no_grad()
    def take(self) -> None:
        """Puts the average in place of the trained weights."""
        torch._foreach_copy_(self.trained, self.average)
