"""Exact changes of weights that keep the logits of a network in evaluation mode."""

from common.spec import StateDict


def fold_eps(state_dict: StateDict, before: float, after: float) -> StateDict:
    """Weights for another epsilon of all batch norms: the scale takes in sqrt((var + after) / (var + before))."""
    folded = dict(state_dict)
    for name, variance in state_dict.items():
        if name.endswith(".running_var"):
            scale = name.removesuffix("running_var") + "weight"
            ratio = (variance.double() + after) / (variance.double() + before)
            folded[scale] = (state_dict[scale].double() * ratio.sqrt()).float()
    return folded
