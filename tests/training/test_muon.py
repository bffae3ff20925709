"""Muon and AdamW as one optimizer."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from vlv.training.muon import MuonAndOther, matrices_of, orthogonal

RATE, DECAY = 0.02, 0.1


def small_model():
    torch.manual_seed(0)
    words, head = nn.Embedding(7, 8), nn.Linear(8, 7, bias=False)
    head.weight = words.weight  # the table of words is the output layer too
    model = nn.Sequential(words, nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8), head)
    model[3].weight.requires_grad_(False)
    return model


def trained(model):
    return [weight for weight in model.parameters() if weight.requires_grad]


def adamw(model):
    groups = [
        {"params": trained(model)[:2], "weight_decay": DECAY},
        {"params": trained(model)[2:], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3)


def take_steps(model, *optimizers, number=3):
    for step in range(number):
        ids = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()


def take_drawn_steps(model, *optimizers, number=3):
    """Steps with gradients that do not depend on the weights."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        for weight in trained(model):
            weight.grad = torch.randn(weight.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def test_only_the_matrices_of_linear_layers_are_chosen():
    model = small_model()
    (chosen,) = matrices_of(model)
    assert chosen is model[1].weight


def test_a_convolution_moves_as_the_matrix_of_its_filters():
    torch.manual_seed(0)
    convolution, grouped = nn.Conv2d(4, 64, 3, bias=False), nn.Conv2d(4, 4, 3, groups=4, bias=False)
    model, matrix = nn.Sequential(convolution, grouped), nn.Linear(36, 64, bias=False)
    assert matrices_of(model) == [convolution.weight]
    matrix.weight.data = convolution.weight.detach().flatten(1).clone()
    for module in (convolution, matrix):
        take_drawn_steps(module, MuonAndOther(torch.optim.AdamW(module.parameters()), matrices_of(module), RATE))
    assert torch.equal(convolution.weight.flatten(1), matrix.weight)


def test_each_weight_moves_as_with_its_own_optimizer():
    together, apart = small_model(), small_model()
    take_drawn_steps(together, MuonAndOther(adamw(together), matrices_of(together), RATE))
    matrix = apart[1].weight
    rest = [{"params": [apart[0].weight], "weight_decay": DECAY}]
    rest += [{"params": [weight for weight in trained(apart)[2:] if weight is not matrix], "weight_decay": 0.0}]
    muon = torch.optim.Muon([matrix], lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    take_drawn_steps(apart, torch.optim.AdamW(rest, lr=1e-3), muon)
    for (name, found), expected in zip(together.named_parameters(), apart.parameters(), strict=True):
        if name == "1.weight":  # torch's Muon computes in bfloat16
            moved = (expected - small_model()[1].weight).norm()
            assert (found - expected).norm() < 0.02 * moved
        else:
            assert torch.equal(found, expected), name


def test_no_direction_of_a_matrix_is_left_behind():
    model = small_model()
    before = model[1].weight.detach().clone()
    take_steps(model, MuonAndOther(adamw(model), matrices_of(model), RATE), number=1)
    update = model[1].weight.detach() - (1 - RATE * DECAY) * before
    sizes = torch.linalg.svdvals(update)[:7] / (RATE * 0.2 * 16**0.5)  # of 7 words, the gradient has 7 directions
    gradient = torch.linalg.svdvals(model[1].weight.grad)[:7]
    assert gradient[0] > 100 * gradient[6]
    assert sizes.min() > 0.6 and sizes.max() < 1.3


@pytest.mark.parametrize("shape", [(16, 16), (16, 24), (12, 200), (200, 12)])
def test_the_singular_values_alone_change(shape):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -5, min(shape), dtype=torch.float64)
    matrix = left @ values.diag() @ right
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert torch.allclose(orthogonal(matrix.float()).double(), left @ values.diag() @ right, atol=1e-3)


def test_a_loaded_state_continues_exactly():
    model = small_model()
    optimizer = MuonAndOther(adamw(model), matrices_of(model), RATE)
    take_steps(model, optimizer)
    copy, state = deepcopy(model), deepcopy(optimizer.state_dict())
    again = MuonAndOther(adamw(copy), matrices_of(copy), 0.5)
    again.load_state_dict(state)
    take_steps(model, optimizer)
    take_steps(copy, again)
    for (name, found), expected in zip(copy.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected), name
