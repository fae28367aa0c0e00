"""Inception v3 against torchvision's, its initialization, its sizes and its export."""

import math
import re

import numpy as np
import onnx
import onnxruntime
import pretrainedmodels
import pytest
import torch
import torchvision
from support import ROOT, user_error

from common.config import TrainConfig
from common.data import transforms
from common.deploy import export
from common.device.device import Device
from common.errors import UserError
from common.evaluation import onnx_conversion
from common.evaluation.torch_classifier import Normalizer
from common.train import losses
from common.weights.load import load_model, load_pretrained
from inception_v3.spec import SPEC


def smooth(n, seed=None):
    """Images of large patches, normalized: unlike white noise, they differ from each other after many layers."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.nn.functional.interpolate(2 * torch.randn(n, 3, 6, 6, generator=generator), 299, mode="bicubic")


@pytest.fixture(scope="module")
def peer():
    """torchvision's network with batch-norm statistics of real activations, so that outputs are not vacuous."""
    torch.manual_seed(0)
    network = torchvision.models.inception_v3(weights=None, init_weights=False, aux_logits=True, dropout=0.0)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the plain average over the passes, without the initial zeros and ones
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(smooth(4))
    for norm in norms:
        norm.momentum = 0.1
    return network.eval()


def ours(state_dict, **options):
    network = SPEC.build(dropout=0.0, **options)
    network.load_state_dict(state_dict, strict=True)
    return network


def normalized(seed=1, n=2, size=299):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_parameter_counts():
    assert sum(p.numel() for p in SPEC.build().parameters()) == 27_161_264
    assert sum(p.numel() for p in SPEC.build(aux=False).parameters()) == 23_834_568


def test_cadenes_file_gives_cadenes_logits(peer, tmp_path):
    """Its classifier is called last_linear."""
    theirs = pretrainedmodels.inceptionv3(pretrained=None).eval()
    theirs.load_state_dict({re.sub(r"^fc\.", "last_linear.", name): tensor for name, tensor in
                            peer.state_dict().items()})  # fmt: skip
    torch.save(theirs.state_dict(), tmp_path / "inceptionv3.pth")
    network, meta = load_model(tmp_path / "inceptionv3.pth", SPEC, transform_input=False)
    assert meta["build"]["aux"] and meta["build"]["pool_padding"] == "torch"
    with torch.inference_mode():
        expected, logits = theirs(normalized()), network(normalized())
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_file_of_1001_rows_keeps_or_loses_its_background(peer, tmp_path):
    """Both classifiers have a background class in row 0, as TensorFlow's; --num-classes 1000 cuts it off."""
    state = dict(peer.state_dict())
    for layer in SPEC.classifiers:
        for part in ("weight", "bias"):
            row = state[f"{layer}.{part}"]
            state[f"{layer}.{part}"] = torch.cat([row[:1] + 7, row])
    torch.save(state, tmp_path / "a.pth")
    whole, meta = load_model(tmp_path / "a.pth", SPEC, transform_input=False)
    assert meta["num_classes"] == 1001 and SPEC.background_columns(1001) == 1
    cut, meta = load_model(tmp_path / "a.pth", SPEC, num_classes=1000, transform_input=False)
    assert meta["num_classes"] == 1000
    x = normalized(n=1, size=107)
    with torch.inference_mode():
        expected = peer(x)
        for logits in (cut(x), whole(x)[:, 1:]):  # the product with another number of rows rounds otherwise
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    options, state, notes = load_pretrained(tmp_path / "a.pth", SPEC, {"num_classes": 1000, "aux": True}, set())
    assert options["num_classes"] == 1000 and notes == []
    assert all(torch.equal(state[name], tensor) for name, tensor in peer.state_dict().items())


@pytest.mark.parametrize("transform_input", [False, True])
def test_logits_are_torchvisions_in_evaluation_and_training_mode(peer, transform_input):
    network, x = ours(peer.state_dict(), transform_input=transform_input), normalized()
    peer.transform_input = transform_input
    with torch.no_grad():
        assert (network.eval()(x) - peer.eval()(x)).abs().max() < 1e-5
        pairs = zip(network.train()(x), peer.train()(x), strict=True)
        differences = [(a - b).abs().max() for a, b in pairs]
    peer.eval()
    peer.transform_input = False
    assert len(differences) == 2 and max(differences) < 1e-5


def test_input_normalized_by_half_is_not_confused_with_imagenets(peer):
    """A network for 0.5/0.5 input gives the same logits for both normalizations if, and only if, transform_input is set."""
    pixels = (smooth(2, seed=3) * 60 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    imagenet = Normalizer(SPEC, Device("cpu"), "nchw")(pixels)
    half = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    told, untold = (ours(peer.state_dict(), transform_input=flag).eval() for flag in (True, False))
    with torch.no_grad():
        expected = untold(half)
        assert (told(imagenet) - expected).abs().max() < 1e-4
        assert (untold(imagenet) - expected).abs().max() > 1e-2


def test_the_input_normalization_is_recognized_from_a_bare_state_dict(peer, tmp_path):
    torch.save(peer.state_dict(), tmp_path / "ported.pth")  # trained statistics beside scales of exactly 1
    _, meta = load_model(tmp_path / "ported.pth", SPEC)
    assert meta["build"]["transform_input"] is True
    state = {k: v + 0.5 if k.endswith("bn.weight") else v for k, v in peer.state_dict().items()}
    torch.save(state, tmp_path / "trained.pth")
    _, meta = load_model(tmp_path / "trained.pth", SPEC)
    assert meta["build"]["transform_input"] is False
    model, meta = load_model(tmp_path / "ported.pth", SPEC, transform_input=False)
    assert model.transform_input is False


def test_the_initializer_reaches_every_convolution():
    """Deviation of a normal cut at two sigma: 0.8796 sigma. The auxiliary head has its own."""
    torch.manual_seed(0)
    network = SPEC.build()
    special = {"AuxLogits.conv1.conv": 0.01, "AuxLogits.fc": 0.001}
    checked = 0
    for name, module in network.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            sigma, weight = special.get(name, 0.1), module.weight
            assert weight.abs().max() <= 2 * sigma, name
            if weight.numel() > 5000:
                assert weight.std().item() == pytest.approx(0.8796 * sigma, rel=0.03), name
            checked += 1
    assert checked == 96 + 2


@pytest.mark.parametrize("size", [75, 96, 160, 224])
def test_smaller_inputs_train_and_evaluate(size):
    network = SPEC.build(num_classes=3)
    main, aux = network.train()(normalized(size=size))
    (main.sum() + aux.sum()).backward()
    assert all(p.grad is not None for p in network.parameters())
    assert network.eval()(normalized(size=size)).shape == (2, 3)


def test_the_auxiliary_head_counts_four_tenths():
    """The weight that the README documents; the paper does not give it."""
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        outputs = SPEC.build(num_classes=3).train()(normalized(size=75))
    loss = losses.training_loss(outputs, labels, TrainConfig(label_smoothing=0.0), SPEC.aux_weight)
    main, auxiliary = (torch.nn.functional.cross_entropy(logits, labels).item() for logits in outputs)
    assert abs(main - auxiliary) > 0.01
    assert loss.item() == pytest.approx(main + 0.4 * auxiliary, rel=1e-6)


def test_other_options_are_refused():
    with pytest.raises(TypeError, match="bn_eps"):
        SPEC.build(bn_eps=1e-5)


@pytest.fixture(scope="module")
def checkpoint(peer, tmp_path_factory):
    """A checkpoint as training writes it, with trained-looking statistics and logits of about a thousand."""
    state = {k: v.clone() for k, v in peer.state_dict().items()}
    state["fc.weight"] *= 3000
    path = tmp_path_factory.mktemp("checkpoint") / "model_best.pth.tar"
    build = {**SPEC.build_options, "num_classes": 1000}
    torch.save(
        {
            "arch": "inception_v3",
            "build": build,
            "image_size": 299,
            "state_dict": state,
            "ema_state_dict": None,
            "classes": [f"n{k:08d}" for k in range(1000)],
        },
        path,
    )
    return path


def test_export_with_dynamic_batch_is_opset_11_and_equals_torch_at_large_logits(checkpoint, run, tmp_path):
    run(ROOT / "inception_v3" / "pthtar2onnx.py", "--ckpt", checkpoint, "--onnx", tmp_path / "v3.onnx")
    proto = onnx.load(tmp_path / "v3.onnx")
    onnx.checker.check_model(proto)
    assert [entry.version for entry in proto.opset_import] == [11]
    assert [i.name for i in proto.graph.input] == ["image"] and [o.name for o in proto.graph.output] == ["class"]
    model, _ = load_model(checkpoint, SPEC)
    session = onnxruntime.InferenceSession(tmp_path / "v3.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 3, 8):
        images = normalized(seed=n, n=n)
        with torch.inference_mode():
            expected = model(images).numpy()
        found = session.run(None, {"image": images.numpy()})[0]
        assert np.abs(expected).max() > 100
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_export_takes_a_fixed_batch_and_the_default_checkpoint(checkpoint, run, tmp_path):
    (tmp_path / "model_best.pth.tar").symlink_to(checkpoint)
    run(ROOT / "inception_v3" / "pthtar2onnx.py", "--batch=2")
    shape = onnx.load(tmp_path / "inception_v3.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in shape] == [2, 3, 299, 299]


def test_a_network_that_onnx_runtime_computes_otherwise_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setitem(onnx_conversion.TOLERANCES, "float32", -1.0)
    with pytest.raises(UserError, match="--onnx: not written, ONNX Runtime differs"):
        export.export_onnx(SPEC.build(num_classes=2), SPEC, tmp_path / "x.onnx", 75)
    assert list(tmp_path.iterdir()) == []


def test_demo_names_five_classes_with_probabilities(checkpoint, images, run):
    photo = images / "val" / "bee" / "0001.jpg"
    lines = run(ROOT / "inception_v3" / "demo.py", photo, "--resume", checkpoint, "--device=cpu").stdout.splitlines()
    assert lines[0] == str(photo) and len(lines) == 6
    # The same by hand: the evaluation's own pixels, softmax, names from the checkpoint.
    from common.data.decode import open_rgb

    model, meta = load_model(checkpoint, SPEC)
    pixels = torch.from_numpy(transforms.eval_transform(SPEC)(open_rgb(photo)).copy())[None]
    with torch.inference_mode():
        logits = model(Normalizer(SPEC, Device("cpu"), "nchw")(pixels)).double()[0]
    best = logits.topk(5).indices.tolist()
    for line, probability, k in zip(lines[1:], logits.softmax(0)[best].tolist(), best, strict=True):
        percent, name = line.split("%")
        assert name.strip() == meta["classes"][k]
        assert math.isclose(float(percent), 100 * probability, abs_tol=0.02)


def test_demo_takes_a_folder_and_says_what_is_wrong(checkpoint, images, run, tmp_path):
    out = run(ROOT / "inception_v3" / "demo.py", images / "val", "--resume", checkpoint, "--device=cpu").stdout
    assert out.count(".jpg") == 21
    for word, message in ((tmp_path / "nothing", "is no file or folder"), (tmp_path, "holds no images")):
        assert message in user_error(run(ROOT / "inception_v3" / "demo.py", word, "--resume", checkpoint, check=2))
    assert "no model_best.pth.tar here" in user_error(run(ROOT / "inception_v3" / "demo.py", images / "val", check=2))
