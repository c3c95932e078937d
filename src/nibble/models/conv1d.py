"""GPT-2's Conv1D as nn.Linear.

transformers' `Conv1D` computes y = x W + b with W [in, out]: a linear whose weight is stored the
other way round. It is replaced when the model is built, so that formats, adapters, merges and
exports meet one kind of linear only. What is left of it is a set of parameter names whose tensors
are transposed when a checkpoint is read or written. It costs nothing: the model is on the meta
device. It is not a convolution, and nothing here touches real ones.
"""

from __future__ import annotations

from torch import nn


def replace_conv1d_(model: nn.Module) -> frozenset[str]:
    """Replace every `Conv1D` by an nn.Linear and return the names of the weights that checkpoints
    hold transposed.

    The new parameters are empty, of the old ones' type and device.
    """
    from transformers.pytorch_utils import Conv1D

    transposed: set[str] = set()
    for path, module in list(model.named_modules()):
        if not isinstance(module, Conv1D):
            continue
        in_features, out_features = module.weight.shape
        linear = nn.Linear(
            in_features,
            out_features,
            bias=module.bias is not None,
            device=module.weight.device,
            dtype=module.weight.dtype,
        )
        linear.train(module.training)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, linear)
        transposed.add(f"{path}.weight")
    return frozenset(transposed)
