"""The network: parameter counts, parity with the two peers, and what it does at other sizes."""

import shutil
import subprocess

import pytest
import torch
from support import ROOT

from common.weights.load import load_model
from inception_v4.spec import SPEC


@pytest.mark.parametrize(("num_classes", "expected"), [(1001, 42_681_353), (1000, 42_679_816)])
def test_parameter_count(num_classes, expected):
    with torch.device("meta"):
        model = SPEC.build(num_classes=num_classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def peer(name):
    if name == "timm":
        import timm

        return timm.create_model("inception_v4", num_classes=1001)
    import pretrainedmodels

    return pretrainedmodels.inceptionv4(num_classes=1001, pretrained=None)


@pytest.mark.parametrize(("name", "size"), [("timm", 107), ("pretrainedmodels", 299)])  # the latter takes no other size
def test_peers_weights_load_and_give_the_same_logits(name, size, tmp_path):
    torch.manual_seed(0)
    images, other = torch.randn(2, 3, size, size), peer(name)
    for module in other.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.inference_mode():
        other.train()(images)
        expected = other.eval()(images)
    torch.save(other.state_dict(), tmp_path / "peer.pth")
    ours, meta = load_model(tmp_path / "peer.pth", SPEC)
    with torch.inference_mode():
        actual = ours(images)
    assert meta["num_classes"] == 1001 and expected.std() > 0.1
    assert (actual - expected).abs().max() <= 1e-5


def test_pooling_branches_leave_padding_out():
    pool = SPEC.build().features[6].branch3[1].pool
    assert pool(torch.ones(1, 1, 3, 3)).min() == 1  # counted zeros would give 4/9 in the corner


def test_smallest_size_trains_and_a_smaller_one_fails():
    model = SPEC.build(num_classes=7).train()
    model(torch.randn(2, 3, SPEC.min_size, SPEC.min_size)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(RuntimeError):
        model.eval()(torch.randn(1, 3, SPEC.min_size - 1, SPEC.min_size - 1))


def test_unknown_build_option_is_a_type_error():
    with pytest.raises(TypeError, match="aux"):
        SPEC.build(aux=True)


# The lines around the patched one in the public reference repository at the commit its users are told to check out.
REFERENCE_LINES = """        super(InceptionV4, self).__init__()
{filler}
    def logits(self, features):
        #Allows image of any size to be processed
        adaptiveAvgPoolWidth = features.shape[2]
        x = F.avg_pool2d(features, kernel_size=adaptiveAvgPoolWidth)
        x = x.view(x.size(0), -1)
        x = self.last_linear(x)
        return x

    def forward(self, input):
"""


@pytest.mark.skipif(shutil.which("patch") is None, reason="the patch program is not installed")
def test_patch_applies_and_works_in_and_out_of_tracing(tmp_path):
    target = tmp_path / "inceptionv4.py"
    target.write_text(REFERENCE_LINES.format(filler="\n" * 298))
    lines = target.read_text().splitlines()
    assert lines[300] == "    def logits(self, features):"  # as in the reference
    patch = ROOT / "inception_v4" / "patches" / "inceptionv4.patch"
    done = subprocess.run(["patch", "--fuzz=0", str(target), str(patch)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    patched = target.read_text().splitlines()
    assert sum(a != b for a, b in zip(lines, patched, strict=True)) == 1
    changed = next(b for a, b in zip(lines, patched, strict=True) if a != b).strip()

    class Pool(torch.nn.Module):
        def forward(self, features):
            scope = {"features": features}
            exec(changed, scope)
            return torch.nn.functional.avg_pool2d(features, kernel_size=scope["adaptiveAvgPoolWidth"])

    features = torch.randn(1, 4, 8, 8)
    assert Pool()(features).shape == (1, 4, 1, 1)
    traced = torch.jit.trace(Pool(), features, check_trace=False)
    assert torch.equal(traced(features), Pool()(features))
