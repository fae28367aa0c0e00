"""demo.py of every model: the five most probable classes of each image."""

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from common import cli, parallel, run_folder
from common.data import decode, file_tree
from common.data.index import FolderIndex, of_files
from common.errors import UserError
from common.evaluation import class_names, predictions, program
from common.evaluation.predictions import Row
from common.files import StrPath, check_distinct
from common.spec import ModelSpec

NUM_SAMPLES = 8  # validation images that are named where no image is given
_BATCH, _WITHOUT_WORKERS = 16, 64  # images of a batch; images that are decoded without worker processes
_HEADERS = 1000  # images whose EXIF orientation is looked at before the first one is classified
_LISTED = 5  # unreadable files that the message at the end names
_PROVIDERS = {"cuda": "cuda", "npu": "cann"}  # --device -> ONNX Runtime's provider; cpu otherwise


def main(
    spec: ModelSpec,
    description: str,
    default_checkpoint: Callable[[], pathlib.Path] | None = None,
    validation_option: str = "data",
) -> None:
    """Body of a model's demo script.

    Args:
      default_checkpoint: called where --resume is not given; default: run_folder.newest_best.
      validation_option: training option that held the folder of the validation images, or the dataset root.
    """
    with cli.exit_on_error():
        parser = cli.Parser(
            f"{description}Images are cropped and normalized as in evaluation. Without IMAGE it names "
            f"{NUM_SAMPLES} validation images of\nthe run that wrote the checkpoint.\n"
        )
        parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files, or folders of them")
        parser.add_argument(
            "--resume", "--ckpt", "--model", default="", help="a checkpoint (default: see above), .onnx or .om file"
        )
        parser.add_argument("--device", default="auto", choices=cli.DEVICES, help="where to run")
        parser.add_argument(
            "--class-names", default="", metavar="FILE", help="names of the classes: one per line, or class_index.json"
        )
        parser.add_argument(
            "--use-ema",
            action=argparse.BooleanOptionalAction,
            help="take the checkpoint's averaged weights (default: where it has them)",
        )
        parser.add_argument(
            "--upright",
            action=argparse.BooleanOptionalAction,
            default=False,
            help="turn photographs as EXIF says, for a network trained on turned ones (default: EXIF is ignored)",
        )
        parser.add_argument(
            "--predictions",
            default="",
            metavar="FILE",
            help="file to write the five best classes of each image to, .csv or .json",
        )
        args = parser.parse_args()
        if args.predictions:
            predictions.check(args.predictions)
            check_distinct(args.predictions, "--predictions", {"--class-names": args.class_names or ""})
        images = [path for argument in args.images for path in list_images(argument)]
        resume = str(args.resume or (default_checkpoint() if default_checkpoint else run_folder.newest_best(spec.name)))
        predictor = Predictor(spec, resume, args.device, args.class_names, args.use_ema, args.upright)
        index = of_files(images) if images else predictor.samples(validation_option)
        seen = images[:_HEADERS]
        if not args.upright and (turned := sum(map(decode.is_turned, seen))):
            first = "the first " if len(seen) < len(images) else ""
            print(f"note: EXIF says to turn {turned} of {first}{len(seen)} photographs, ignored without --upright")
        num_failed, num_right, failed = 0, 0, list[Row]()  # of the failed ones, the first
        with predictions.writer(args.predictions) if args.predictions else contextlib.nullcontext(list) as write:
            for rows in predictor(index):
                write(rows)
                for row in rows:
                    if row.error:
                        num_failed += 1
                        failed += [row] if num_failed <= _LISTED else []
                        continue
                    num_right += row.best[0].index == row.label_index
                    print(_describe(row), flush=True)
        if not images:
            print(f"{num_right} of {len(index) - num_failed} are right")
        if num_failed:
            listed = "; ".join(f"{row.path} ({row.error})" for row in failed)
            more = f"; and {num_failed - _LISTED} more" if num_failed > _LISTED else ""
            raise UserError(f"IMAGE: {num_failed} of {len(index)} files do not decode: {listed}{more}")


def _describe(row: Row) -> str:
    """The most probable classes of an image; guess and truth where its class is known."""
    if row.label is None:
        lines = [f"  {100 * guess.probability:6.2f} %  {guess.name}" for guess in row.best]
        return "\n".join([row.path, *lines])
    guess = row.best[0]
    return f"{row.path}  guess: {guess.name} ({100 * guess.probability:.2f} %), truth: {row.label}"


def list_images(path: str) -> list[str]:
    """`path` itself if it is a file, else the images below the folder `path`, sorted."""
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise UserError(f"IMAGE: {path} is no file or folder")
    found, ignored = [], collections.Counter[str]()
    for folder, folders, names in os.walk(path):
        ignored["hidden"] += sum(map(file_tree.is_hidden, folders))
        folders[:] = [name for name in folders if not file_tree.is_hidden(name)]
        found += [os.path.join(folder, name) for name in names if file_tree.is_image(name)]
        ignored.update(file_tree.kind_ignored(name) for name in names if not file_tree.is_image(name))
    kinds = file_tree.describe_ignored(ignored)
    if not found:
        extensions = ", ".join(decode.EXTENSIONS)
        raise UserError(f"IMAGE: {path} holds no images ({extensions}){' but ' + kinds if kinds else ''}")
    if kinds:
        print(f"note: ignored in {path}: {kinds}")
    return sorted(found)


class Predictor:
    """A checkpoint, .onnx or .om file as a function from image files to rows of a predictions file.

    Attributes:
      names: of the classes.
    Args:
      model_file: the file; prints which of its weights are taken where it holds several.
      class_names_file, use_ema, upright: values of --class-names, --use-ema and --upright.
    """

    def __init__(
        self,
        spec: ModelSpec,
        model_file: str,
        device_kind: str,
        class_names_file: StrPath = "",
        use_ema: bool | None = None,
        upright: bool = False,
    ) -> None:
        from common.data.transforms import eval_transform

        provider = _PROVIDERS.get(device_kind, "cpu")
        self._config = program.EvalConfig(resume=model_file, device=device_kind, provider=provider, use_ema=use_ema)
        self._model = program.load_evaluated_model(spec, self._config)
        if self._model.taken:
            print(self._model.taken, flush=True)
        self._transform = eval_transform(spec, self._model.image_size, upright)
        self._background = spec.background_columns(self._model.num_outputs)
        num_classes = self._model.num_outputs - self._background
        self.names = class_names.names(self._model.classes, num_classes, class_names_file)

    def __call__(self, images: FolderIndex) -> Iterator[list[Row]]:
        """The rows of each batch, without a background class; labels of `images` are classes."""
        from common.data.loader import EvalLoader
        from common.evaluation.evaluate import scored

        workers = parallel.dataloader_workers(2, 1) if len(images) > _WITHOUT_WORKERS else 0
        batches = EvalLoader(images, self._transform, _BATCH, "skip", 0, 1, workers, False)
        builder = predictions.RowBuilder(images, self.names)
        try:
            for batch, logits_NK in scored(self._model.classifier, batches):
                yield builder(batch, logits_NK[:, self._background :])
        finally:
            batches.close()

    def samples(self, validation_option: str) -> FolderIndex:
        """A few validation images of the checkpoint's run, spread over the classes.

        Raises:
          UserError: the file does not name the images, or they are not there any more.
        """
        found = self._validation_images(validation_option)
        chosen = sorted({int(i) for i in np.linspace(0, len(found) - 1, NUM_SAMPLES).round()})
        resume = self._config.resume
        print(f"{resume}: {len(chosen)} of the {len(found)} validation images in {found.root}", flush=True)
        samples = found.only(chosen)
        return dataclasses.replace(samples, labels=samples.labels - self._background)

    def _validation_images(self, validation_option: str) -> FolderIndex:
        resume, options = self._config.resume, self._model.run_options
        folder = str(options.get(validation_option) or "")
        if not folder:
            had = "was trained without validation images" if options else "does not say on which images it was trained"
            raise UserError(f"IMAGE: missing, and {resume} {had}; name image files or folders")
        if not os.path.isdir(folder):
            raise UserError(
                f"IMAGE: missing, and the images of {resume} are not in {folder}; name image files or folders"
            )
        exclude = str(options.get("exclude") or "")
        settings: Mapping[str, Any] = {
            "data": folder,
            "exclude": exclude if os.path.isfile(exclude) else "",
            "label_numbers": options.get("label_numbers", self._config.label_numbers),
        }
        return program.load_index(dataclasses.replace(self._config, **settings), self._model, self._background)
