import torch
from torch import nn

from codesign.bundled.optimizer import FlatState, orthogonalise


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    matrices = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0))

    singular = torch.linalg.svdvals(orthogonalise(matrices))

    assert singular.min() > 0.5
    assert singular.max() < 1.5


def test_steps_lower_a_simple_loss_with_gradients_of_two_processes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8, bias=False))
    state = FlatState(model, {"1.weight": 0.01}, 0.02, num_processes=2)
    inputs = torch.randn(64, 8)
    wanted = inputs.roll(1, 1)
    losses = []
    for step in range(30):
        for process, half in enumerate((slice(0, 32), slice(32, 64))):
            state.use_gradients_of(model, process)
            loss = (model(inputs[half]) - wanted[half]).square().mean() / 2
            loss.backward()
            losses.append(loss.item())
        state.step(state.slots, 1.0, step, weight_decay=0.0)
        state.gradients.zero_()

    assert losses[-1] < 0.8 * losses[0]
