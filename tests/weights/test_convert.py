"""Weight files of other programs: MindSpore's and Keras' own fixtures, Cadene's and timm's names, conversions."""

import binascii
import dataclasses
import shutil

import pytest
import torch
from support import (
    ROOT,
    closed_form_array,
    closed_form_image,
    closed_form_weight,
    fill_closed_form,
    imagenet_normalized,
    user_error,
)

from common.errors import UserError
from common.weights import convert, keras, mindspore
from common.weights.load import load_model
from xception.src.config import SPEC

MINDSPORE = ROOT / "tests" / "fixtures" / "mindspore_slice.ckpt"  # by MindSpore 2.10.0, chunks of 1 kB, crc_check=True
KERAS = ROOT / "tests" / "fixtures" / "keras_layers.h5"  # by Keras 3.15.1, model.save("x.h5")
SIZE = 96


@pytest.fixture(scope="module")
def state():
    """Closed-form weights under our names."""
    state = SPEC.build().state_dict()
    fill_closed_form(state)
    return state


def logits(path, **options):
    model, meta = load_model(path, SPEC, **options)
    with torch.inference_mode():
        return model(torch.from_numpy(closed_form_image(SIZE))), meta["build"]


def expected(state, normalized=lambda images: images, **options):
    model = SPEC.build(**options).eval()
    model.load_state_dict(state)
    with torch.inference_mode():
        return model(normalized(torch.from_numpy(closed_form_image(SIZE))))


# ---- MindSpore -------------------------------------------------------------------------------------------------------


def test_a_file_written_by_mindspore_is_read():
    assert MINDSPORE.stat().st_size < 50_000
    raw = mindspore.read_raw(MINDSPORE)
    assert raw["global_step"].shape == (1,)
    assert raw["epoch_num"].item() == 3
    assert "note" not in raw  # a text, not a tensor
    read = mindspore.read(MINDSPORE)
    assert {name.partition(".")[0] for name in read} == {"conv1", "bn1", "bn2", "block1", "fc", "half"}
    assert {name for name in read if name.startswith("bn1.")} == {
        "bn1.weight",
        "bn1.bias",
        "bn1.running_mean",
        "bn1.running_var",
    }
    own = SPEC.build().state_dict()
    for name, tensor in read.items():
        if name == "half.weight":
            assert tensor.dtype == torch.float16
            assert torch.equal(tensor, torch.from_numpy(closed_form_array(name, (4, 3))).half())
        else:
            assert tensor.shape == own[name].shape
            assert torch.equal(tensor, torch.from_numpy(closed_form_weight(name, tuple(tensor.shape)))), name


def test_mindspores_chunks_are_really_there():
    message, _ = mindspore._checkpoint_message()
    values = message.FromString(MINDSPORE.read_bytes()[:-17]).value
    assert [value.tag for value in values].count("conv1.weight") == 4  # 3456 bytes in parts of 1024


def test_a_damaged_mindspore_file_is_refused(tmp_path):
    content = bytearray(MINDSPORE.read_bytes())
    content[2000] ^= 1
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(content)
    with pytest.raises(UserError, match="damaged, its checksum is wrong"):
        load_model(broken, SPEC)
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(MINDSPORE.read_bytes()[:9000])
    with pytest.raises(UserError, match=r"cut.ckpt: not a MindSpore checkpoint, or truncated"):
        load_model(cut, SPEC)
    content[2000] ^= 1
    stated = binascii.crc32(content[:-17])
    assert int.from_bytes(content[-10:], "big") == stated


def test_a_mindspore_file_of_another_network_lists_what_differs():
    with pytest.raises(UserError) as error:
        load_model(MINDSPORE, SPEC)
    message = str(error.value)
    assert "does not fit xception" in message
    assert "214 names or shapes differ (213 missing, 1 unexpected): missing block1.rep." in message
    assert "unexpected half.weight [4, 3]" in message and len(message) < 800


def test_mindspore_files_round_trip_with_optimizer_extras(state, tmp_path, monkeypatch):
    monkeypatch.setattr(mindspore, "CHUNK_BYTES", 100_000)
    moments = {f"moments.{name}": tensor for name, tensor in state.items() if name.startswith("conv1.")}
    mindspore.write(tmp_path / "a.ckpt", {**state, **moments, "global_step": torch.tensor([7])})
    assert set(mindspore.read_raw(tmp_path / "a.ckpt")) > {"global_step", "moments.conv1.weight", "bn1.gamma"}
    ours, build = logits(tmp_path / "a.ckpt")
    assert build == {"num_classes": 1000, "dropout": 0.5, "pool_padding": "same", "bn_eps": 1e-5}
    assert torch.equal(ours, expected(state, pool_padding="same", bn_eps=1e-5))


def test_mindcv_has_other_names_and_normalizes_as_for_imagenet(state, tmp_path):
    def theirs(name):
        name = name.replace("fc.", "classifier.")
        if name.startswith("block"):
            number, _, rest = name[len("block") :].partition(".")
            name = f"blocks.{int(number) - 1}.{rest}"
        return name

    mindspore.write(tmp_path / "mindcv.ckpt", {theirs(name): tensor for name, tensor in state.items()})
    assert "blocks.11.skipbn.gamma" in mindspore.read_raw(tmp_path / "mindcv.ckpt")
    theirs = expected(state, imagenet_normalized, pool_padding="same", bn_eps=1e-5)
    torch.testing.assert_close(
        logits(tmp_path / "mindcv.ckpt")[0], theirs, rtol=0, atol=1e-5 * float(theirs.abs().max())
    )


# ---- Keras -----------------------------------------------------------------------------------------------------------


def test_a_file_written_by_keras_is_read():
    read = keras.read(KERAS)
    shapes = {
        "block1_conv1.weight": (8, 3, 3, 3),
        "block2_sepconv1.depthwise.weight": (8, 1, 3, 3),
        "block2_sepconv1.pointwise.weight": (12, 8, 1, 1),
        "predictions.weight": (5, 12),
        "predictions.bias": (5,),
    }
    for layer, channels, names in (
        ("block1_conv1_bn", 8, ("weight", "bias", "running_mean", "running_var")),
        ("no_scale_bn", 12, ("bias", "running_mean", "running_var")),
    ):
        shapes |= {f"{layer}.{name}": (channels,) for name in names}
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == shapes
    for name, shape in shapes.items():
        assert torch.equal(read[name], torch.from_numpy(closed_form_weight(name, shape))), name


def test_keras_files_round_trip(state, tmp_path):
    keras.write(tmp_path / "a.h5", SPEC.export_maps["keras"](state))
    ours, build = logits(tmp_path / "a.h5")
    assert build["bn_eps"] == 1e-3
    assert build["pool_padding"] == "same"
    assert torch.equal(ours, expected(state, pool_padding="same", bn_eps=1e-3))


def test_keras_shortcuts_keep_their_order_whatever_was_built_before(state, tmp_path):
    theirs = SPEC.export_maps["keras"](state)
    later = {}
    for name, tensor in theirs.items():
        layer, _, last = name.partition(".")
        if layer.startswith(("conv2d", "batch_normalization")):
            kind, number = (
                (layer.rpartition("_")[0], int(layer.rpartition("_")[2]))
                if layer[-1].isdigit() and "_" in layer.removeprefix("batch_")
                else (layer, 0)
            )
            layer = f"{kind}_{number + 9}"  # crosses from one digit to two
        later[f"{layer}.{last}"] = tensor
    assert "conv2d_12.weight" in later
    assert "batch_normalization_9.bias" in later
    keras.write(tmp_path / "later.h5", later)
    assert torch.equal(logits(tmp_path / "later.h5")[0], expected(state, bn_eps=1e-3))


def test_layers_of_keras_files_are_in_keras_order(state):
    """Keras loads by position: a shortcut comes after the two separable convolutions beside it."""
    order = list(dict.fromkeys(name.partition(".")[0] for name in SPEC.export_maps["keras"](state)))
    assert order[:12] == [
        "block1_conv1",
        "block1_conv1_bn",
        "block1_conv2",
        "block1_conv2_bn",
        "block2_sepconv1",
        "block2_sepconv1_bn",
        "block2_sepconv2",
        "block2_sepconv2_bn",
        "conv2d",
        "batch_normalization",
        "block3_sepconv1",
        "block3_sepconv1_bn",
    ]
    assert order[-7:] == [
        "conv2d_3",
        "batch_normalization_3",
        "block14_sepconv1",
        "block14_sepconv1_bn",
        "block14_sepconv2",
        "block14_sepconv2_bn",
        "predictions",
    ]


def test_an_hdf5_file_that_is_not_keras_is_refused(tmp_path):
    import h5py

    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = [1.0]
    with pytest.raises(UserError, match="without Keras' layer_names"):
        load_model(tmp_path / "other.h5", SPEC)
    (tmp_path / "cut.h5").write_bytes(KERAS.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"cut.h5: truncated or damaged"):
        load_model(tmp_path / "cut.h5", SPEC)


# ---- Cadene, timm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["fc", "last_linear"])
def test_cadene_files_with_matrices_for_pointwise_kernels(state, tmp_path, head):
    theirs = {
        name.replace("fc.", f"{head}."): tensor[:, :, 0, 0] if ".pointwise." in name else tensor
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }
    torch.save(theirs, tmp_path / "xception.pth")
    ours, build = logits(tmp_path / "xception.pth")
    assert build["pool_padding"] == "torch"
    assert torch.equal(ours, expected(state, pool_padding="torch"))


# ---- conversions -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(state, tmp_path_factory):
    """One file per origin."""
    folder = tmp_path_factory.mktemp("origins")
    mindspore.write(folder / "mindspore.ckpt", state)
    keras.write(folder / "keras.h5", SPEC.export_maps["keras"](state))
    torch.save(state, folder / "timm.pth")
    return folder


@pytest.fixture
def small(monkeypatch):
    """The spec with a small image for the check that a conversion makes."""
    return dataclasses.replace(SPEC, input_size=SIZE)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("mindspore.ckpt", "a.pth.tar"),
        ("mindspore.ckpt", "a.ckpt"),
        ("keras.h5", "a.pth.tar"),
        ("keras.h5", "a.h5"),
        ("timm.pth", "a.pth.tar"),
        ("timm.pth", "a.safetensors"),
        ("timm.pth", "a.pth"),
    ],
)
def test_conversions_keep_every_logit(files, small, tmp_path, source, target):
    done = convert.convert(files / source, tmp_path / target, small)
    assert done.difference == 0
    (before, build), (after, build_after) = logits(files / source), logits(tmp_path / target)
    assert build == build_after
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("timm.pth", "a.h5", "pool_padding torch, but a file of this format means pool_padding same"),
        ("timm.pth", "a.ckpt", "pool_padding torch, but a file of this format means pool_padding same"),
    ],
)
def test_options_that_a_format_cannot_store_are_named_and_nothing_is_written(
    files, small, tmp_path, source, target, reason
):
    (tmp_path / target).write_text("precious")
    with pytest.raises(UserError, match=reason):
        convert.convert(files / source, tmp_path / target, small)
    assert (tmp_path / target).read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == [target]


@pytest.mark.parametrize("target", ["a.pth", "a.safetensors"])
def test_files_in_our_names_state_what_no_other_program_builds(files, small, tmp_path, target):
    done = convert.convert(files / "keras.h5", tmp_path / target, small)
    assert done.notes == ("pool_padding same: stated in the file; other programs do not build this network",)
    (before, build), (after, build_after) = logits(files / "keras.h5"), logits(tmp_path / target)
    assert build == build_after and build["bn_eps"] == 1e-3
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("source", "target", "eps"), [("keras.h5", "a.ckpt", 1e-5), ("mindspore.ckpt", "a.weights.h5", 1e-3)]
)
def test_another_epsilon_moves_into_the_scales(files, small, tmp_path, source, target, eps):
    done = convert.convert(files / source, tmp_path / target, small)
    assert done.notes[0].startswith("bn_eps ") and done.difference > 0
    (before, _), (after, build) = logits(files / source), logits(tmp_path / target)
    assert build["bn_eps"] == eps
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))


def test_the_pooling_phases_are_one_function_at_sizes_of_odd_maps(files, tmp_path):
    """Sides of the maps at 295: 147, 145, 73, 37, 19, 10; at 299 the second pool sees 74."""
    assert [size for size in range(290, 300) if SPEC.same_at("pool_padding", size)] == [295, 296]
    assert not SPEC.same_at("bn_eps", 295)
    odd = dataclasses.replace(SPEC, input_size=103)  # 51, 49, 25, 13, 7, 4
    done = convert.convert(files / "mindspore.ckpt", tmp_path / "a.pth", odd)
    assert done.notes == ("pool_padding same became torch, which is the same at 103 x 103 pixels, not at all sizes",)
    assert done.difference == 0


def test_the_padding_survives_a_conversion_by_way_of_our_own_checkpoint(files, small, tmp_path):
    convert.convert(files / "keras.h5", tmp_path / "a.pth.tar", small)
    convert.convert(tmp_path / "a.pth.tar", tmp_path / "b.h5", small)
    assert torch.equal(logits(files / "keras.h5")[0], logits(tmp_path / "b.h5")[0])


def test_the_command_prints_the_conversion(files, run, tmp_path):
    shutil.copy(files / "timm.pth", tmp_path / "in.pth")
    convert_to = [ROOT / "tools" / "convert_weights.py", "--arch", "xception", "in.pth"]
    done = run(*convert_to, "out.pth.tar")
    assert done.stdout.startswith("out.pth.tar: zoo from state_dict, num_classes 1000, dropout 0.5, ")
    assert user_error(run(*convert_to, "out.onnx", check=2)).startswith("out.onnx: unknown format")
