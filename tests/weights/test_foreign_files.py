"""Checkpoints of other trainers: timm's and torchvision's own files, wrapped names, averages, and files of other kinds."""

import argparse
import gzip
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
import timm.utils
import torch
from tiny import PROGRAM, SPEC
from torch import nn

from common.deploy import export
from common.errors import UserError
from common.weights import convert
from common.weights.load import load_model, load_pretrained
from common.weights.torch_file import load_torch
from tools import convert_weights


@pytest.fixture(scope="module")
def network():
    """A tiny network of 3 classes, and a copy whose classifier bias is larger by 1: its averages."""
    torch.manual_seed(0)
    raw, averaged = SPEC.build(num_classes=3), SPEC.build(num_classes=3)
    averaged.load_state_dict(raw.state_dict())
    with torch.no_grad():
        averaged.fc.bias += 1
    return raw, averaged


@pytest.fixture(scope="module")
def timm_file(network, tmp_path_factory):
    """last.pth.tar of timm.utils.CheckpointSaver: argparse.Namespace, optimizer, a metric of numpy, both weights."""
    raw, averaged = network
    folder = tmp_path_factory.mktemp("timm")
    optimizer = torch.optim.SGD(raw.parameters(), 0.1, momentum=0.9)
    options = argparse.Namespace(model="tiny", lr=0.1, mean=[0.5, 0.5, 0.5], resume=None, opt_kwargs={})
    saver = timm.utils.CheckpointSaver(raw, optimizer, options, model_ema=averaged, checkpoint_dir=str(folder))
    saver.save_checkpoint(3, metric=np.float64(71.5))
    return folder / "last.pth.tar"


@pytest.fixture(scope="module")
def torchvision_file(network, tmp_path_factory):
    """The dict that torchvision's references/classification/train.py saves; its averages are torch's AveragedModel."""
    raw, averaged = network
    optimizer = torch.optim.SGD(raw.parameters(), 0.1, momentum=0.9)
    content = {
        "model": raw.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 30).state_dict(),
        "epoch": 4,
        "args": argparse.Namespace(data_path="/data", device="cuda", epochs=90, clip_grad_norm=None),
        "model_ema": torch.optim.swa_utils.AveragedModel(averaged).state_dict(),
    }
    path = tmp_path_factory.mktemp("torchvision") / "model_4.pth"
    torch.save(content, path)
    return path


FILES = {"timm_file": ("state_dict", "state_dict_ema"), "torchvision_file": ("model", "model_ema")}


@pytest.mark.parametrize("fixture", FILES)
@pytest.mark.parametrize("use_ema", [None, True, False])
def test_the_averages_are_taken_unless_the_user_chooses_and_it_is_said(request, network, fixture, use_ema):
    path, (raw_key, averaged_key) = request.getfixturevalue(fixture), FILES[fixture]
    model, meta = load_model(path, SPEC, use_ema)
    taken, other = (raw_key, averaged_key) if use_ema is False else (averaged_key, raw_key)
    expected = network[0] if use_ema is False else network[1]
    assert torch.equal(model.fc.bias, expected.fc.bias)
    option = "--use-ema" if use_ema is False else "--no-use-ema"
    assert meta["taken"] == f"{path}: took the weights of {taken}; it also holds {other} ({option} takes them)"
    assert meta["epoch"] == (3 if fixture == "timm_file" else 4)


def test_a_choice_that_the_file_does_not_have_is_an_error(network, tmp_path):
    torch.save({"state_dict": network[0].state_dict()}, tmp_path / "raw.pth")
    torch.save({"model_ema": network[1].state_dict()}, tmp_path / "averaged.pth")
    torch.save(network[0].state_dict(), tmp_path / "bare.pth")
    for name, use_ema, message in (
        ("raw.pth", True, "--use-ema: .* holds no averaged weights; leave the option out"),
        ("bare.pth", True, "--use-ema: .* holds no averaged weights"),
        ("averaged.pth", False, "--no-use-ema: .* holds no weights beside its averages"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / name, SPEC, use_ema)
    assert load_model(tmp_path / "raw.pth", SPEC)[1]["taken"] == ""
    averaged = tmp_path / "averaged.pth"
    assert load_model(averaged, SPEC)[1]["taken"] == f"{averaged}: took the weights of model_ema"


def test_every_program_says_and_chooses(timm_file, images, network, tmp_path, capsys):
    """The largest bias tells which weights a program took."""
    took = f"{timm_file}: took the weights of state_dict_ema; it also holds state_dict (--no-use-ema takes them)\n"
    for use_ema in (None, False):
        expected = network[1 if use_ema is None else 0].fc.bias
        flags = [] if use_ema is None else ["--no-use-ema"]
        training = ["--data", str(images), "--output-dir", str(tmp_path / f"run {use_ema}"), "--max-steps=1", *flags]
        PROGRAM.main([*training, "--pretrained", str(timm_file), "--lr=1e-12"])
        assert (f"--pretrained: {took}" in capsys.readouterr().out) == (use_ema is None)
        trained = load_torch(tmp_path / f"run {use_ema}" / "checkpoint.pth.tar")["state_dict"]["fc.bias"]
        assert torch.allclose(trained, expected, atol=1e-6)

        PROGRAM.main(["--data", str(images), "--evaluate", "--pretrained", str(timm_file), *flags])
        assert (took in capsys.readouterr().out) == (use_ema is None)

        onnx = tmp_path / f"{use_ema}.onnx"
        export.export(SPEC, export.ExportConfig(ckpt=str(timm_file), onnx=str(onnx), use_ema=use_ema))
        out = capsys.readouterr().out
        assert (took in out) == (use_ema is None) and out.endswith(" of the largest logit\n")
        import onnx as package

        stored = {tensor.name: tensor for tensor in package.load(onnx).graph.initializer}
        np.testing.assert_array_equal(package.numpy_helper.to_array(stored["fc.bias"]), expected.detach().numpy())

        done = convert.convert(timm_file, tmp_path / "converted.pth", SPEC, use_ema)
        assert (done.taken + "\n" == took) == (use_ema is None)
        assert torch.equal(load_torch(tmp_path / "converted.pth")["fc.bias"], expected)


def test_the_conversion_program_has_the_option(timm_file, network, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(convert_weights, "detect", lambda path, use_ema: asked.append(use_ema) or SPEC)
    monkeypatch.setattr("sys.argv", ["", str(timm_file), str(tmp_path / "b.pth"), "--no-use-ema"])
    convert_weights.main()
    assert "took the weights of state_dict; it also holds state_dict_ema (--use-ema" in capsys.readouterr().out
    assert torch.equal(load_torch(tmp_path / "b.pth")["fc.bias"], network[0].fc.bias) and asked == [False]


def test_a_resumed_run_has_no_choice(images, tmp_path):
    PROGRAM.main(["--data", str(images), "--output-dir", str(tmp_path / "run"), "--max-steps=1", "--ema=0.9"])
    resumed = ["--data", str(images), "--resume", str(tmp_path / "run" / "checkpoint.pth.tar"), "--use-ema"]
    with pytest.raises(UserError, match="--use-ema: chooses among the weights of --pretrained"):
        PROGRAM.prepare(*PROGRAM.parse(resumed))
    with pytest.raises(UserError, match="--use-ema: needs --pretrained"):
        PROGRAM.parse(["--use-ema"])


# ---- names -----------------------------------------------------------------------------------------------------------


def rename(state, function):
    return {function(key): tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    "function",
    [
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: f"net.backbone.{key}",
        lambda key: f"_orig_mod.net.{key}",
        lambda key: key.replace("stem.", "stem._orig_mod."),  # torch.compile of a part
        lambda key: key.replace("stem.", "stem.module."),  # DataParallel of a part
        lambda key: key.replace("stem.0", "_fsdp_wrapped_module.stem.0._checkpoint_wrapped_module"),
    ],
)
def test_names_within_wrappers_are_found(network, tmp_path, function):
    state = network[0].state_dict()
    torch.save({"state_dict": rename(state, function)}, tmp_path / "a.pth")
    model, _ = load_model(tmp_path / "a.pth", SPEC)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    own = {"state_dict": rename(state, function), "arch": "tiny", "build": {"num_classes": 3}}
    torch.save(own, tmp_path / "own.pth.tar")
    assert load_model(tmp_path / "own.pth.tar", SPEC)[1]["format"] == "zoo"


def test_names_that_still_differ_are_shown_beside_the_nearest(network, tmp_path):
    state = network[0].state_dict()
    theirs = rename(state, lambda key: key.replace("stem.0", "\x1b[1mstem.conv0").replace("fc.", "classifier."))
    theirs["stem.1.bias"] = torch.zeros(9)
    torch.save(theirs, tmp_path / "a.pth")
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "a.pth", SPEC)
    message = str(caught.value)
    assert "does not fit tiny, 9 names or shapes differ (3 missing, 3 unexpected, 3 of another shape): " in message
    assert "stem.1.bias is [9], not [8]" in message and "head.bias is [3], not [10]" in message
    assert "nearest to our stem.0.weight [8, 3, 3, 3] is the file's stem.conv0.weight [8, 3, 3, 3]" in message
    assert message.isprintable()


def test_a_file_without_the_classifier_keeps_its_names(network, tmp_path):
    """All names of the file begin with `stem.`, as the network's own do."""
    torch.save({k: v for k, v in network[0].state_dict().items() if k.startswith("stem.")}, tmp_path / "a.pth")
    with pytest.raises(
        UserError, match=r"4 names or shapes differ \(4 missing\): missing fc.bias \[10\]; missing fc.w"
    ):
        load_model(tmp_path / "a.pth", SPEC)


def test_a_dict_without_weights_lists_what_it_holds(network, tmp_path):
    torch.save({"net": network[0].state_dict(), "epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="not a state dict, it holds epoch, net; .* under one of state_dict, model, "):
        load_model(tmp_path / "a.pth", SPEC)


# ---- what is not tensors ---------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("pwned"),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda x: argparse.Namespace(x=x), lambda x: [np.float64(1), x]])
def test_no_code_runs_beside_what_is_allowed(tmp_path, monkeypatch, wrap, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "args": wrap(Evil())}, "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="evil.pth: holds a getattr, which only its own program can load; "):
        load_torch("evil.pth")
    assert not pathlib.Path("pwned").exists()


@pytest.mark.parametrize("value", [pathlib.PurePosixPath("a"), np.array([Evil()]), Exception("x"), eval])
def test_nothing_else_is_allowed(tmp_path, value):
    torch.save({"state_dict": {}, "args": value}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds a |more than a state dict"):
        load_torch(tmp_path / "a.pth")


@pytest.mark.parametrize("module", [b"numpy._core", b"numpy.core"])
def test_numbers_of_numpy_1_and_2_are_read(tmp_path, module):
    values = [np.float64(71.5), np.float32(0.25), np.int64(-3), np.bool_(True), np.dtype(">i4").type(7), np.ones(2)]
    torch.save(
        {"values": values, "state": np.random.get_state()}, tmp_path / "a.pth", _use_new_zipfile_serialization=False
    )
    content = (tmp_path / "a.pth").read_bytes()
    assert b"cnumpy._core.multiarray\n" in content
    (tmp_path / "a.pth").write_bytes(content.replace(b"cnumpy._core.", b"c" + module + b"."))
    assert load_torch(tmp_path / "a.pth")["values"][:5] == [71.5, 0.25, -3, True, 7]


# ---- files of other kinds --------------------------------------------------------------------------------------------


def write_script(path):
    torch.jit.script(nn.Linear(2, 2)).save(str(path))


def write_module(path):
    torch.save(nn.Linear(2, 2), path)


def write_old_module(path):
    torch.save(nn.Sequential(nn.Linear(2, 2)), path, _use_new_zipfile_serialization=False)


def write_module_in_a_dict(path):
    torch.save({"epoch": 1, "model": nn.Linear(2, 2)}, path)


def write_exported_program(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/archive_format", "pt2")


def write_keras(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("metadata.json", "config.json", "model.weights.h5"):
            archive.writestr(name, "{}")


def write_arrays(path):
    with open(path, "wb") as file:
        np.savez(file, a=np.ones(2))


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "")


def write_pickle(path):
    path.write_bytes(pickle.dumps({"a": np.ones(2)}))


def write_lfs_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def write_gzip(path):
    path.write_bytes(gzip.compress(b"weights"))


def write_page(path):
    path.write_text("<!DOCTYPE html><html>404</html>")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_script, "a TorchScript module, .*torch.jit.load"),
        (write_module, r"a whole pickled network \(torch.nn.modules.linear.Linear\), .*model.state_dict\(\), 'weights.pth'"),
        (write_old_module, r"a whole pickled network \(torch.nn.modules.container.Sequential\)"),
        (write_module_in_a_dict, "a whole pickled network .*or an entry of it, where that is a dict"),
        (write_exported_program, "an exported program of torch.export"),
        (write_keras, "a (keras file, which|.keras archive, not a file of torch.save)"),
        (write_arrays, "numpy arrays"),
        (write_zip, r"a zip archive that torch.save did not write \(it holds notes.txt\)"),
        (write_pickle, "a pickle that torch.save did not write"),
        (write_lfs_pointer, "a Git LFS pointer, not the file itself; run git lfs pull"),
        (write_gzip, "compressed with gzip"),
        (write_page, "a web page"),
        (pathlib.Path.mkdir, "cannot be read .Is a directory"),
        (pathlib.Path.touch, "empty, not a checkpoint"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_file_of_another_kind_is_named_in_one_line(tmp_path, write, message, name):
    if name == "x.safetensors" and write not in (write_lfs_pointer, write_gzip, write_page, pathlib.Path.touch):
        name = "x.keras"
    write(tmp_path / name)
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path / name, SPEC)
    assert "damaged" not in str(caught.value) and str(caught.value).isprintable()
    if write is not pathlib.Path.mkdir:
        with pytest.raises(UserError, match=message):
            load_torch(tmp_path / name)


def test_the_ways_that_messages_name_give_readable_weights(network, tmp_path, monkeypatch):
    """The commands of the messages for TorchScript and for whole modules."""
    monkeypatch.chdir(tmp_path)
    example = torch.zeros(1, 3, 32, 32)
    torch.jit.trace(network[0].eval(), example).save("script.pt")
    with pytest.raises(UserError) as caught:
        load_torch("script.pt")
    exec(str(caught.value).partition('python -c "')[2].rpartition('"')[0])  # noqa: S102
    assert torch.equal(load_model("weights.pth", SPEC)[0].fc.bias, network[0].fc.bias)


def test_pretrained_weights_say_what_was_taken(torchvision_file):
    _, state, notes = load_pretrained(torchvision_file, SPEC, {"num_classes": 5}, set())
    assert state["fc.weight"].shape == (5, 16)
    assert notes[0].startswith(f"--pretrained: {torchvision_file}: took the weights of model_ema; ")
    assert notes[1:] == [
        "--pretrained: fc has 3 classes, not 5; initialized anew",
        "--pretrained: head has 3 classes, not 5; initialized anew",
    ]
