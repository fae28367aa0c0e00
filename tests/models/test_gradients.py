"""Gradients of a training step, against the networks of torchvision and timm."""

import pytest
import timm
import torch
import torchvision

from tools import models

PEERS = {
    "inception_v3": lambda: torchvision.models.inception_v3(init_weights=False, dropout=0.0),  # with auxiliary head
    "inception_v4": lambda: timm.create_model("inception_v4", num_classes=1000),
    "xception": lambda: timm.create_model("legacy_xception"),
}
SIZES = {"inception_v3": 299, "inception_v4": 107, "xception": 75}  # torchvision's auxiliary head takes no other


def gradients(network, x):
    network = network.double().to(memory_format=torch.channels_last).train()
    logits = network(x)
    if isinstance(logits, tuple):
        loss = logits[0].square().sum() + 0.4 * logits[1].square().sum()
    else:
        loss = logits.square().sum()
    loss.backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("name", models.names())
def test_gradients_are_those_of_the_peer(name):
    """In channels_last, and in float64, where rounding hides no difference."""
    torch.manual_seed(0)
    peer, spec = PEERS[name](), models.spec(name)
    ours = spec.build(dropout=0.0, **({"pool_padding": "torch"} if name == "xception" else {}))
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(2, 3, SIZES[name], SIZES[name]).double().to(memory_format=torch.channels_last)
    found, expected = gradients(ours, x), gradients(peer, x)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0
        assert (found[key] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), key
