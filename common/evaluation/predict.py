"""demo.py of every model: images in, five named guesses out."""

import os

from common import cli, run_folder
from common.data import decode
from common.errors import UserError
from common.weights.load import load_model

NUM_GUESSES = 5


def main(spec, description, argv=None, default_ckpt=run_folder.newest_best):
    """Body of a model's demo script; `default_ckpt` gives the path where --resume does not."""
    with cli.exit_on_error():
        parser = cli.Parser(description)
        parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
        parser.add_argument(
            "--resume", default="", help="checkpoint [default ./model_best.pth.tar, else the newest run's]"
        )
        parser.add_argument("--device", default="auto", choices=("auto", "npu", "cuda", "cpu"), help="where to run")
        args = parser.parse_args(argv)
        paths = [path for word in args.images for path in _files(word)]
        guess = Guesser(spec, args.resume or default_ckpt(), args.device)
        for path in paths:
            print(path)
            for name, probability in guess(path):
                print(f"  {100 * probability:6.2f} %  {name}")


def _files(word):
    """The image files that a word of the command line means."""
    if os.path.isfile(word):
        return [word]
    if not os.path.isdir(word):
        raise UserError(f"IMAGE: {word} is no file or folder")
    found = sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(word)
        for name in names
        if name.lower().endswith(decode.EXTENSIONS)
    )
    if not found:
        raise UserError(f"IMAGE: {word} holds no images ({', '.join(decode.EXTENSIONS)})")
    return found


class Guesser:
    """A checkpoint as a function from an image file to [(class name, probability)], the most probable first."""

    def __init__(self, spec, checkpoint, device_kind):
        from common.data import transforms
        from common.device import device as devices
        from common.evaluation import torch_engine

        device = devices.choose(device_kind)
        model, meta = load_model(checkpoint, spec)
        model.to(device.torch)
        self._transform = transforms.eval_transform(spec, meta["image_size"])
        self._engine = torch_engine.TorchEngine(model, torch_engine.Normalizer(spec, device, "nchw"), device)
        self._background = spec.background_columns(meta["num_classes"])
        self._names = _class_names(meta["classes"], meta["num_classes"] - self._background)

    def __call__(self, path):
        import torch

        pixels = torch.tensor(self._transform(decode.open_rgb(path)))
        logits = torch.from_numpy(self._engine(pixels[None]))[0, self._background :]
        probabilities, classes = logits.double().softmax(0).topk(min(NUM_GUESSES, len(logits)))
        return [(self._names[k], p) for p, k in zip(probabilities.tolist(), classes.tolist(), strict=True)]


def _class_names(known, num_classes):
    """Names the checkpoint knows, else ImageNet's for 1000 classes, as torchvision lists them; numbers for others."""
    if known or num_classes != 1000:
        names = list(known or [])
        return names + [f"class {k}" for k in range(len(names), num_classes)]
    from torchvision.models import ResNet50_Weights

    return ResNet50_Weights.DEFAULT.meta["categories"]
