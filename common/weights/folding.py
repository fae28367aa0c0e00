"""Exact changes of weights that keep the logits of a network in evaluation mode."""

from common.spec import Normalization, StateDict


def fold_eps(state_dict: StateDict, before: float, after: float) -> StateDict:
    """Weights for another epsilon of all batch norms: the scale takes in sqrt((var + after) / (var + before))."""
    folded = dict(state_dict)
    for name, variance in state_dict.items():
        if name.endswith(".running_var"):
            scale = name.removesuffix("running_var") + "weight"
            ratio = (variance.double() + after) / (variance.double() + before)
            folded[scale] = (state_dict[scale].double() * ratio.sqrt()).float()
    return folded


def fold_input(
    state_dict: StateDict, convolution: str, norm: str, before: Normalization, after: Normalization
) -> StateDict:
    """Weights for images of another normalization.

    The first convolution takes in a scale of its channels, the batch norm behind it a shift: exactly, because the
    convolution has no padding.

    Args:
      convolution, norm: names of the first convolution, without a bias, and of its batch norm.
      before, after: what the given and the returned weights expect.
    Returns:
      The weights as they are where a name is missing: those of another network, which the loader refuses.
    """
    kernel, center = f"{convolution}.weight", f"{norm}.running_mean"
    if not {kernel, center} <= state_dict.keys():
        return state_dict
    weight = state_dict[kernel].double()
    (mean, std), (new_mean, new_std) = (
        [weight.new_tensor(each).view(1, 3, 1, 1) for each in way] for way in (before, after)
    )
    constant = (weight * (new_mean - mean) / std).sum((1, 2, 3))
    folded = {kernel: weight * new_std / std, center: state_dict[center].double() - constant}
    return {**state_dict, **{name: tensor.float() for name, tensor in folded.items()}}
