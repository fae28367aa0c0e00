"""Files of Keras and MindSpore of Inception v3 and v4: names that those programs wrote, logits across conversions.

tests/fixtures/mindspore_names.json: name and shape of every tensor in checkpoints that MindSpore 2.10.0 wrote for the
networks of mindspore-ai/models (official) and mindcv, of a batch norm its gamma alone; keras_inception_v3_layers.json: layers with weights of
keras.applications.InceptionV3 in the order of Keras 3.15.1's and 2.15.0's files.
"""

import dataclasses
import json
import sys
import types
import zipfile

import pytest
import torch
from support import ROOT, closed_form_image, fill_closed_form, imagenet_normalized

from common.errors import UserError
from common.weights import convert, keras, mindspore
from common.weights.load import load_model, load_pretrained
from inception_v3 import weights
from inception_v3.spec import SPEC
from tools import models

SIZE = 107
SMALL = dataclasses.replace(SPEC, input_size=SIZE)
FIXTURES = ROOT / "tests" / "fixtures"
MINDSPORE_NAMES = {
    network: {
        tag.replace("gamma", part): shape
        for tag, shape in tags.items()
        for part in (("gamma", "beta", "moving_mean", "moving_variance") if tag.endswith(".gamma") else ("",))
    }
    for network, tags in json.loads((FIXTURES / "mindspore_names.json").read_text()).items()
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint whose pooling is that of Keras and MindSpore; scales of batch norm are not 1."""
    options = {"num_classes": 7, "pool_padding": "same", "transform_input": False}
    network = SPEC.build(**options)
    state = network.state_dict()
    fill_closed_form(state)
    for name, tensor in state.items():
        if name.endswith(".bn.weight"):
            tensor.copy_(torch.linspace(0.5, 1.5, len(tensor)))
    path = tmp_path_factory.mktemp("source") / "a.pth.tar"
    torch.save({"arch": SPEC.name, "build": options, "image_size": SIZE, "state_dict": state}, path)
    return path


def logits(path, **options):
    network, meta = load_model(path, SMALL, **options)
    with torch.inference_mode():
        return network(torch.from_numpy(closed_form_image(SIZE))), meta


@pytest.mark.parametrize("name", MINDSPORE_NAMES)
def test_names_of_mindspores_files_are_ours(name):
    spec = models.spec(name.rpartition("_")[0])
    with torch.device("meta"):
        own = spec.build().state_dict()
    raw = {tag: torch.zeros(shape) for tag, shape in MINDSPORE_NAMES[name].items()}
    read = {mindspore._torch_name(tag): tensor for tag, tensor in raw.items()}
    renamed = spec.key_maps["mindspore"](read)
    missing = {key for key in own.keys() - renamed.keys() if not key.endswith("num_batches_tracked")}
    assert all(key.startswith("AuxLogits.") for key in missing) and bool(missing) == (name == "inception_v3_official")
    assert {key: tensor.shape for key, tensor in renamed.items()} == {key: own[key].shape for key in renamed}


@pytest.mark.parametrize("name", ["inception_v3", "inception_v4"])
def test_written_names_are_mindcvs(name):
    spec = models.spec(name)
    with torch.device("meta"):
        own = {key: value for key, value in spec.build().state_dict().items() if not key.endswith("tracked")}
    written = spec.export_maps["mindspore"](own)
    tags = {mindspore._mindspore_name(key, written): list(tensor.shape) for key, tensor in written.items()}
    assert tags == MINDSPORE_NAMES[f"{name}_mindcv"]


def test_the_extra_norms_of_the_official_inception_v4_become_part_of_its_classifier():
    """One feature, one class: ((2 (x - 1) / sqrt(3 + 1e-3) + 0.5) 4 + 1) -> 3 (z - 2) / sqrt(8 + 1e-5) - 1."""
    from inception_v4.weights import from_mindspore

    def norm(layer, *values):
        return {f"{layer}.{part}": torch.tensor([float(value)]) for part, value in zip(
            ("weight", "bias", "running_mean", "running_var"), values, strict=True
        )}  # fmt: skip

    state = {"softmax.dense.weight": torch.tensor([[4.0]]), "softmax.dense.bias": torch.tensor([1.0])}
    state |= norm("bn0", 2, 0.5, 1, 3) | norm("softmax.batchnorm", 3, -1, 2, 8)
    renamed = from_mindspore(state)
    x = 0.7
    z = (2 * (x - 1) / 3.001**0.5 + 0.5) * 4 + 1
    expected = 3 * (z - 2) / 8.00001**0.5 - 1
    assert float(renamed["last_linear.weight"] * x + renamed["last_linear.bias"]) == pytest.approx(expected, rel=1e-6)


def test_mindspores_inception_v4_normalizes_as_for_imagenet(tmp_path):
    """Of mindcv and of the official model zoo, whose batch norms have another epsilon; and files for mindcv."""
    from inception_v4 import weights as of_v4

    spec = dataclasses.replace(models.spec("inception_v4"), input_size=SIZE)
    network = spec.build(num_classes=7).eval()
    state = network.state_dict()
    fill_closed_form(state)
    images = torch.from_numpy(closed_form_image(SIZE))

    def given(model, images):
        with torch.inference_mode():
            return model(images)

    def close(found, expected):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

    mindspore.write(tmp_path / "theirs.ckpt", of_v4._renamed(state, of_v4._mindcv))
    ours = load_model(tmp_path / "theirs.ckpt", spec)[0]
    close(given(ours, images), given(network, imagenet_normalized(images)))
    convert.convert(tmp_path / "theirs.ckpt", tmp_path / "ours.pth.tar", spec)
    convert.convert(tmp_path / "ours.pth.tar", tmp_path / "back.ckpt", spec)
    back = of_v4._renamed(mindspore.read(tmp_path / "back.ckpt"), of_v4._ours)
    for name in ("conv.weight", "bn.running_mean"):
        close(back[f"features.0.{name}"], state[f"features.0.{name}"])

    first = "features.0.conv2d_1a_3x3"
    official = {f"{first}.conv.conv.weight": state["features.0.conv.weight"]}
    official |= {
        f"{first}.conv.batchnorm.{part}": state[f"features.0.bn.{part}"]
        for part in ("weight", "bias", "running_mean", "running_var")
    }
    official |= {f"softmax.dense.{part}": state[f"last_linear.{part}"] for part in ("weight", "bias")}
    for norm, width in (("bn0", 1536), ("softmax.batchnorm", 7)):
        parts = dict(weight=1.0, bias=0.0, running_mean=0.0, running_var=1.0)
        official |= {f"{norm}.{part}": torch.full((width,), value) for part, value in parts.items()}
    found = of_v4.from_mindspore(official)
    unit, images = network.features[0], images[:, :, :9, :9]
    unit.bn.eps = 1e-5
    expected = given(unit, imagenet_normalized(images))
    unit.bn.eps = 1e-3
    unit.load_state_dict({name: found.get(f"features.0.{name}", value) for name, value in unit.state_dict().items()})
    close(given(unit, images), expected)


def test_layers_are_in_keras_order():
    assert [layer for _, layer in weights.KERAS_LAYERS] == json.loads(
        (FIXTURES / "keras_inception_v3_layers.json").read_text()
    )


@pytest.mark.parametrize("suffix", [".h5", ".weights.h5", ".ckpt"])
def test_what_was_trained_here_leaves_and_returns(source, tmp_path, suffix):
    """Scales of batch norm and the expected input move into the weights."""
    target = tmp_path / f"a{suffix}"
    done = convert.convert(source, target, SMALL)
    (before, _), (after, meta) = logits(source), logits(target)
    assert meta["build"]["transform_input"] is (suffix != ".ckpt") and meta["build"]["pool_padding"] == "same"
    assert done.difference <= 1e-5
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))


def test_keras_itself_writes_its_archive(source, tmp_path, monkeypatch):
    """A stand-in for Keras 3: the network is its own, of the image size of the checkpoint; its outputs are logits."""
    made = []

    class Network:
        def __init__(self, **options):
            made.append(options)

        def load_weights(self, path):
            self.content = path.read_bytes()

        def save(self, path):
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("config.json", '{"config": {"layers": []}}')
                archive.writestr("model.weights.h5", self.content)

    keras_package = types.SimpleNamespace(applications=types.SimpleNamespace(InceptionV3=Network))
    monkeypatch.setitem(sys.modules, "keras", keras_package)
    done = convert.convert(source, tmp_path / "a.keras", SMALL)
    assert done.difference <= 1e-5 and [path.name for path in tmp_path.iterdir()] == ["a.keras"]
    assert made == [dict(weights=None, classes=7, classifier_activation=None, input_shape=(SIZE, SIZE, 3))]


def test_layers_without_names_are_read_by_position_and_numbers_may_start_anywhere(source, tmp_path):
    import h5py

    convert.convert(source, tmp_path / "a.weights.h5", SMALL)
    named = keras.read(tmp_path / "a.weights.h5")
    later = {}
    for name, tensor in named.items():
        layer, _, last = name.partition(".")
        layer = (
            layer if layer == "predictions" else f"{layer.rstrip('0123456789').rstrip('_')}_{keras._number(layer) + 7}"
        )
        later[f"{layer}.{last}"] = tensor
    with h5py.File(tmp_path / "a.weights.h5", "a") as file:
        for layer in file["layers"].values():
            del layer["vars"].attrs["name"]
    unnamed = keras.read(tmp_path / "a.weights.h5")
    assert "@conv2d@8.weight" in unnamed and "conv2d_94.weight" not in named and "conv2d_94.weight" in later
    expected = SPEC.key_maps["keras"](named)
    for other in (later, unnamed):
        renamed = SPEC.key_maps["keras"](other)
        assert renamed.keys() == expected.keys()
        assert all(torch.equal(renamed[key], tensor) for key, tensor in expected.items())


def test_weights_without_a_classifier_start_a_training(source, tmp_path):
    state = SPEC.export_maps["keras"](load_model(source, SPEC)[0].state_dict())
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("predictions.")}
    keras.write(tmp_path / "notop.h5", headless)
    _, _, notes = load_pretrained(tmp_path / "notop.h5", SPEC, {"num_classes": 5, "aux": False}, set())
    assert notes == ["--pretrained: fc is not in the file; initialized anew"]
    with pytest.raises(UserError, match="2 missing"):
        load_model(tmp_path / "notop.h5", SPEC)


def test_counted_padding_is_refused_where_it_is_left_out(source, tmp_path):
    content = torch.load(source)
    torch.save(content["state_dict"], tmp_path / "torchvision.pth")
    with pytest.raises(UserError, match="has pool_padding torch, but a file of this format means pool_padding same"):
        convert.convert(tmp_path / "torchvision.pth", tmp_path / "a.ckpt", SMALL)


def test_a_thousand_and_one_outputs_have_a_background_column():
    assert SPEC.background_columns(1001) == 1 and SPEC.background_columns(1000) == 0
