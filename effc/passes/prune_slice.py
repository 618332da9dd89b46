"""Take inputs or outputs away from linear layers, in place, in both forms that transformers uses."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from effc.passes.prune_calibration import InputStatistics

# Of the mean second moment, added to the diagonal before it is inverted. Strong, because the texts are few: what 0.01
# gains on them is lost on others (docs/pruning.md).
_DAMPING = 0.3


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight as ``[out, in]``, a view."""
    weight: torch.Tensor = module.get_parameter("weight").data
    return weight.T if isinstance(module, Conv1D) else weight


def set_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Give a linear layer another weight ``[out, in]``, of any size; the sizes it knows of itself follow."""
    stored = weight.T.contiguous() if isinstance(module, Conv1D) else weight.contiguous()
    parameter = nn.Parameter(stored, requires_grad=module.get_parameter("weight").requires_grad)
    module.register_parameter("weight", parameter)
    if isinstance(module, Conv1D):
        module.nf, module.nx = weight.shape
    else:
        assert isinstance(module, nn.Linear)
        module.out_features, module.in_features = weight.shape


def keep_outputs(module: nn.Module, kept: torch.Tensor) -> None:
    """Leave only the outputs ``kept`` (indices) of a linear layer."""
    set_weight(module, weight_of(module)[kept])
    bias = module._parameters.get("bias")
    if bias is not None:
        module.register_parameter("bias", nn.Parameter(bias.data[kept].clone(), requires_grad=bias.requires_grad))


def keep_inputs(module: nn.Module, kept: torch.Tensor) -> None:
    """Leave only the inputs ``kept`` (indices) of a linear layer."""
    set_weight(module, weight_of(module)[:, kept])


def forget_inputs(module: nn.Module, kept: torch.Tensor, statistics: InputStatistics | None) -> None:
    """Set the weights of all inputs but ``kept`` to zero; with statistics, fit the others to the layer's output.

    The fit is least squares over the calibration tokens, with the bias as one more unknown where there is one.
    """
    weight = weight_of(module).double()
    result = torch.zeros_like(weight)
    if statistics is None:
        result[:, kept] = weight[:, kept]
    else:
        moments, bias = statistics.moments, module._parameters.get("bias")
        mean = statistics.mean
        if bias is not None:
            moments = moments - statistics.tokens * torch.outer(mean, mean)
        among = moments[kept][:, kept].clone()
        among.diagonal().add_(_DAMPING * float(among.diagonal().mean()) + 1e-12)
        gone = torch.ones(weight.shape[1], dtype=torch.bool)
        gone[kept] = False
        # The damping pulls towards the weights as they were; towards zero, units that the texts seldom use would fade.
        owed = weight[:, gone] @ moments[gone][:, kept]
        result[:, kept] = weight[:, kept] + torch.linalg.solve(among, owed.T).T
        if bias is not None:
            bias.data.copy_(bias.double() + (weight - result) @ mean)
    set_weight(module, result.to(weight_of(module).dtype))
