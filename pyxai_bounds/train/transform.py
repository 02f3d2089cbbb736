"""Changes of a model before it trains: what the field's baselines do to the network rather than to the loss."""

from __future__ import annotations

from torch import nn


def softplus(model: nn.Module, beta: float) -> nn.Module:
    """Replace every ``nn.ReLU`` inside ``model`` by softplus(beta·x)/beta, in place; returns the model.

    A baseline of R2ET (arXiv 2212.14106), after Dombrowski et al., NeurIPS 2019: the smaller beta, the smoother.
    Raises ValueError for beta ≤ 0 and for a model without a ReLU module (ReLUs called as functions cannot be found).
    """
    if not beta > 0:
        raise ValueError(f"beta={beta} must be positive.")
    found = [
        (module, name)
        for module in model.modules()
        for name, child in module._modules.items()  # named_children() would skip the second use of a shared ReLU
        if isinstance(child, nn.ReLU)
    ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no nn.ReLU module to replace: pass a network that contains one (not a bare "
            "nn.ReLU), with modules instead of torch.relu or F.relu."
        )
    for module, name in found:
        setattr(module, name, nn.Softplus(beta=beta))
    return model
