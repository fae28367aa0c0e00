"""Checkpoint files: every format that is read, and every way in which one can be wrong."""

import dataclasses
import hashlib
import pathlib

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import UserError
from common.spec import ModelSpec
from common.weights.load import download, load_model, load_pretrained
from tools import convert_weights


class Tiny(nn.Module):
    """A network with what the reader treats specially: batch norm counters, dropout, a classifier."""

    def __init__(self, num_classes, dropout):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.dropout, self.last_linear = nn.Dropout(dropout), nn.Linear(4, num_classes)

    def forward(self, x):
        return self.last_linear(self.dropout(self.bn(self.conv(x)).mean((2, 3))))


SPEC = ModelSpec(
    name="tiny_net",
    builder=Tiny,
    build_options={"num_classes": 10, "dropout": 0.2},
    num_classes=10,
    label_offset=1,
    classifiers=("last_linear",),
)


@pytest.fixture
def small():
    """A state dict of 7 classes."""
    torch.manual_seed(0)
    return SPEC.build(num_classes=7).state_dict()


@pytest.fixture
def two_networks(monkeypatch):
    """tools/convert_weights.py knows tiny_net and another one."""
    other = dataclasses.replace(SPEC, name="other", builder=lambda num_classes, dropout: nn.Linear(3, num_classes))
    specs = {"tiny_net": SPEC, "other": other}
    monkeypatch.setattr(convert_weights.models, "names", lambda: list(specs))
    monkeypatch.setattr(convert_weights.models, "spec", specs.get)


def logits(model):
    with torch.inference_mode():
        return model(torch.ones(1, 3, 9, 9))


def test_reads_bare_state_dicts_of_both_pickle_forms(small, tmp_path):
    old = {key: tensor for key, tensor in small.items() if not key.endswith("num_batches_tracked")}
    torch.save(small, tmp_path / "new.pth")
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    new_model, meta = load_model(tmp_path / "new.pth", SPEC)
    old_model, _ = load_model(tmp_path / "old.pth", SPEC)
    assert meta["num_classes"] == 7 and meta["format"] == "state_dict" and not new_model.training
    assert torch.equal(logits(new_model), logits(old_model))


@pytest.mark.parametrize(
    "metadata", [None, {"zoo": "timm"}, {"zoo": "[1]"}, {"zoo": '{"build": 1}', "image_size": "9"}]
)
def test_reads_timm_safetensors(small, tmp_path, metadata):
    """Entries of another program are left alone."""
    from safetensors.torch import save_file

    save_file(small, tmp_path / "model.safetensors", metadata)
    model, meta = load_model(tmp_path / "model.safetensors", SPEC)
    assert (
        meta["image_size"] == SPEC.input_size
        and meta["format"] == "safetensors"
        and torch.equal(model.state_dict()["last_linear.bias"], small["last_linear.bias"])
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(small, tmp_path, value, two_networks):
    state = {key: tensor.clone() for key, tensor in small.items()}
    state["last_linear.bias"][1] = value
    torch.save(state, tmp_path / "a.pth")
    message = f"a.pth: 1 of {len(state)} tensors hold NaN or infinite values, for example last_linear.bias; the"
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "a.pth", SPEC)
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path / "a.pth", SPEC, {**SPEC.build_options, "num_classes": 7}, set())
    with pytest.raises(UserError, match=message):
        convert_weights.detect(str(tmp_path / "a.pth"))


def test_the_network_that_a_file_nearly_fits_is_named(small, tmp_path, two_networks):
    torch.save({key: tensor for key, tensor in small.items() if key != "conv.bias"}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"does not fit tiny_net, 1 names or shapes differ \(1 missing\): missing conv"):
        convert_weights.detect(str(tmp_path / "a.pth"))
    torch.save({f"x{i}": torch.zeros(1) for i in range(30)} | small, tmp_path / "b.pth")
    with pytest.raises(UserError, match="b.pth: fits none of tiny_net, other; --arch NAME lists the differences"):
        convert_weights.detect(str(tmp_path / "b.pth"))


def test_wrapper_prefix_is_removed(small, tmp_path):
    torch.save(
        {
            "state_dict": {f"module.{key}": tensor for key, tensor in small.items()},
            "epoch": 3,
            "best_acc1": torch.tensor(12.5),
        },
        tmp_path / "a.pth.tar",
    )
    _, meta = load_model(tmp_path / "a.pth.tar", SPEC)
    assert meta["epoch"] == 3 and "best_acc1" not in meta


def own_checkpoint(state_dict, **facts):
    return {
        "state_dict": state_dict,
        "arch": "tiny_net",
        "num_classes": 7,
        "image_size": 107,
        "build": {"num_classes": 7, "dropout": 0.5},
        "classes": list("abcdefg"),
        **facts,
    }


def test_own_checkpoint_brings_its_options_and_averaged_weights(small, tmp_path):
    averaged = {**small, "last_linear.bias": small["last_linear.bias"] + 1}
    torch.save(own_checkpoint(small, ema_state_dict=averaged), tmp_path / "a.pth.tar")
    model, meta = load_model(tmp_path / "a.pth.tar", SPEC)
    assert model.dropout.p == 0.5 and meta["image_size"] == 107 and meta["classes"] == list("abcdefg")
    assert torch.equal(model.last_linear.bias, averaged["last_linear.bias"])
    assert meta["weights"] == "ema"
    torch.save(own_checkpoint(small, ema_state_dict=None), tmp_path / "b.pth.tar")
    model, meta = load_model(tmp_path / "b.pth.tar", SPEC)
    assert torch.equal(model.last_linear.bias, small["last_linear.bias"]) and meta["weights"] == "raw"


def test_explicit_option_that_contradicts_the_file(small, tmp_path):
    torch.save(own_checkpoint(small), tmp_path / "a.pth.tar")
    with pytest.raises(UserError, match=r"--num-classes: 10, but .*a.pth.tar holds 7"):
        load_model(tmp_path / "a.pth.tar", SPEC, num_classes=10)
    load_model(tmp_path / "a.pth.tar", SPEC, num_classes=7)


def test_background_class_is_cut_off_on_request(tmp_path):
    torch.save(SPEC.build(num_classes=11).state_dict(), tmp_path / "public.pth")
    whole, meta = load_model(tmp_path / "public.pth", SPEC)
    assert meta["num_classes"] == 11
    cut, meta = load_model(tmp_path / "public.pth", SPEC, num_classes=10)
    assert meta["num_classes"] == 10
    np.testing.assert_array_equal(logits(cut), logits(whole)[:, 1:])
    with pytest.raises(UserError, match="--num-classes: 9, but .* holds 11"):
        load_model(tmp_path / "public.pth", SPEC, num_classes=9)


def test_other_network_lists_what_differs(tmp_path):
    torch.save({"a.weight": torch.ones(2, 3), "conv.weight": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "x.pth", SPEC)
    message = str(caught.value)
    assert (
        "9 names or shapes differ (7 missing, 1 unexpected, 1 of another shape): conv.weight is [1], not [4" in message
    )
    assert "nearest to our bn.weight [4] is the file's a.weight [2, 3]" in message and "\n" not in message


def test_checkpoint_of_another_model_is_named(small, tmp_path):
    torch.save(own_checkpoint(small, arch="another_net"), tmp_path / "x.pth.tar")
    with pytest.raises(UserError, match="holds another_net, this program is for tiny_net"):
        load_model(tmp_path / "x.pth.tar", SPEC)


def test_damaged_files_are_refused(small, tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save(small, whole)
    content = bytearray(whole.read_bytes())
    (tmp_path / "torn.pth").write_bytes(content[: len(content) // 2])
    content[content.index(small["last_linear.weight"].numpy().tobytes()) + 5] ^= 1
    (tmp_path / "flipped.pth").write_bytes(content)
    torch.save(small, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pth").read_bytes()
    (tmp_path / "old_torn.pth").write_bytes(old[: len(old) // 2])
    for name, words in (("torn", "truncated or damaged"), ("flipped", "checksum"), ("old_torn", "damaged")):
        with pytest.raises(UserError, match=words):
            load_model(tmp_path / f"{name}.pth", SPEC)


class Evil:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("pwned"),)


def test_code_in_a_pickle_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="state_dict"):
        load_model(tmp_path / "evil.pth", SPEC)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot be read"), (b"", "not a checkpoint"), (b"GIF89a", "not a checkpoint")]
)
def test_no_checkpoint_at_all(content, words, tmp_path):
    path = tmp_path / "x.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_model(path, SPEC)


def test_download_checks_the_hash_in_the_name(tmp_path):
    import dataclasses

    content = b"weights"
    good = tmp_path / f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    good.write_bytes(content)
    spec = dataclasses.replace(SPEC, weight_urls=("file:///nowhere/" + good.name, good.as_uri()))
    assert download(spec, tmp_path / "cache").read_bytes() == content
    wrong = tmp_path / "net-00000000.pth"
    wrong.write_bytes(content)
    spec = dataclasses.replace(SPEC, weight_urls=(wrong.as_uri(),))
    with pytest.raises(UserError, match=r"could not be downloaded.*hash.*pass it with --ckpt"):
        download(spec, tmp_path / "other")
    assert not list((tmp_path / "other").glob("*.pth"))
