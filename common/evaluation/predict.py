"""demo.py of every model: the five most probable classes of each image."""

import collections
import os
import pathlib
from collections.abc import Callable, Sequence

from common import cli, run_folder
from common.data import decode, file_tree
from common.errors import UserError
from common.spec import ModelSpec
from common.weights.load import load_model

TOP_K = 5


def main(
    spec: ModelSpec, description: str, default_checkpoint: Callable[[], pathlib.Path] = run_folder.newest_best
) -> None:
    """Body of a model's demo script; `default_checkpoint` is called where --resume is not given."""
    with cli.exit_on_error():
        parser = cli.Parser(f"{description}Images are cropped and normalized as in evaluation.\n")
        parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
        parser.add_argument("--resume", default="", help="checkpoint (default: see above)")
        parser.add_argument("--device", default="auto", choices=cli.DEVICES, help="where to run")
        args = parser.parse_args()
        paths = [path for argument in args.images for path in list_images(argument)]
        predictor = Predictor(spec, args.resume or default_checkpoint(), args.device)
        for path in paths:
            print(path)
            for name, probability in predictor(path):
                print(f"  {100 * probability:6.2f} %  {name}")


def list_images(path: str) -> list[str]:
    """`path` itself if it is a file, else the images below the folder `path`, sorted."""
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise UserError(f"IMAGE: {path} is no file or folder")
    found, ignored = [], collections.Counter[str]()
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not file_tree.is_hidden(name)]
        found += [os.path.join(folder, name) for name in names if file_tree.is_image(name)]
        ignored.update(file_tree.kind_ignored(name) for name in names if not file_tree.is_image(name))
    if not found:
        kinds = file_tree.describe_ignored(ignored)
        extensions = ", ".join(decode.EXTENSIONS)
        raise UserError(f"IMAGE: {path} holds no images ({extensions}){' but ' + kinds if kinds else ''}")
    return sorted(found)


class Predictor:
    """A checkpoint as a function from an image file to [(class name, probability)], most probable first."""

    def __init__(self, spec: ModelSpec, checkpoint: str | pathlib.Path, device_kind: str) -> None:
        from common.data.transforms import eval_transform
        from common.device import device as devices
        from common.evaluation.torch_classifier import Normalizer, TorchClassifier

        device = devices.choose(device_kind)
        model, meta = load_model(checkpoint, spec)
        model.to(device.torch_device)
        self._transform = eval_transform(spec, meta["image_size"])
        self._classifier = TorchClassifier(model, Normalizer(spec, device, "nchw"), device)
        self._background = spec.background_columns(meta["num_classes"])
        self._names = _class_names(meta["classes"], meta["num_classes"] - self._background)

    def __call__(self, path: str) -> list[tuple[str, float]]:
        import torch

        pixels = torch.tensor(self._transform(decode.open_rgb(path)))
        logits = torch.from_numpy(self._classifier(pixels[None]))[0, self._background :]
        probabilities, classes = logits.double().softmax(0).topk(min(TOP_K, len(logits)))
        return [(self._names[k], p) for p, k in zip(probabilities.tolist(), classes.tolist(), strict=True)]


def _class_names(stored: Sequence[str] | None, num_classes: int) -> list[str]:
    """The checkpoint's names; where it has none, ImageNet's for 1000 classes and numbers otherwise."""
    if stored or num_classes != 1000:
        names = list(stored or [])
        return names + [f"class {k}" for k in range(len(names), num_classes)]
    from torchvision.models import ResNet50_Weights

    return ResNet50_Weights.DEFAULT.meta["categories"]
