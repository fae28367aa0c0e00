"""tools/compare.py: accuracy and agreement of two models, and the known mistake that explains a difference.

Legend: N batch, K column of the logits.
"""

import contextlib
import csv
import dataclasses
import heapq
import itertools
import json
import os
import pathlib
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from common import cli, files, parallel
from common.data import labels
from common.errors import RunError, UserError
from common.evaluation import class_names, program
from common.evaluation.comparison import Comparison, aligned, compare
from common.evaluation.metrics import softmax

if typing.TYPE_CHECKING:
    from PIL import Image

    from common.data.batch import Batch
    from common.data.index import FolderIndex
    from common.deploy.sides import Side
    from common.spec import ModelSpec

# Relative error of the logits from which a difference is more than rounding: float32 has 1e-6, float16 1e-3.
_ROUNDING = 5e-3
_COLUMNS = ["path", "label", "class_a", "probability_a", "class_b", "probability_b", "largest_difference"]


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Options of tools/compare.py."""

    data: str = cli.option(
        "",
        "folder with val/ as eval.py takes it, or any folder of images, which then have no labels",
        required="a folder of images",
    )
    arch: str = cli.option("", "network of files that do not say it; default: the one that they fit")
    label_numbers: str = labels.numbers_option()
    max_images: int = cli.option(0, "compare at most this many images, evenly spread; 0: all", low=0)
    batch_size: int = cli.option(16, "images per run; a model of fixed batch keeps its own", "-b", low=1)
    workers: int = cli.option(2, "processes that decode", "-j", low=0)
    threads: int = cli.option(0, "cores of a network on a CPU; 0 is all", low=0)
    device: str = cli.option("auto", "device of a checkpoint", choices=cli.DEVICES)
    device_id: int = cli.option(0, "index of the device", low=0, high=255)
    provider: str = cli.option("cpu", "ONNX Runtime's execution provider", choices=tuple(program.engines.PROVIDERS))
    image_size: int | None = cli.option(None, "side of the input, pixels (default: as stored)", low=1)
    transform_input: bool | None = cli.option(None, "of a checkpoint: see eval.py; default: as stored")
    num_classes: int | None = cli.option(None, "columns of a folder of results (default: the public weights')", low=1)
    changes: str = cli.option("", "file to write the images whose top-1 differs to, .csv")
    json: str = cli.option("", "file to write all numbers to, .json")
    max_drop: float | None = cli.option(
        None, "exit with 1 where top-1 of B is more than this many points below A's", low=0, high=100
    )
    min_agreement: float | None = cli.option(
        None, "exit with 1 where less than this share of the images, percent, has the same top-1", low=0, high=100
    )
    diagnose: bool = cli.option(True, "where the two differ by more than rounding, look for a known mistake")
    sample: int = cli.option(32, "images on which mistakes are looked for", low=8)
    per_layer: bool = cli.option(
        False, "print the error after each block, on 8 images; for checkpoints and .onnx files"
    )

    def __post_init__(self) -> None:
        cli.check_ranges(self)
        if self.changes and pathlib.Path(self.changes).suffix != ".csv":
            raise UserError(f"--changes: {self.changes}, must end in .csv")


def main(a: str, b: str, config: CompareConfig, spec_of: "Callable[[str], ModelSpec | None]") -> None:
    """Compare two models and print the result.

    Args:
      a, b: checkpoint, .onnx file, .om file, folder of result files, torchvision:NAME or timm:NAME.
      spec_of: the network of a file, or None where the file does not say it.
    Raises:
      UserError: a mistake in the arguments. RunError: a gate is not passed.
    """
    from common.deploy.sides import open_side

    options = program.EvalConfig(
        data=config.data,
        device=config.device,
        device_id=config.device_id,
        provider=config.provider,
        threads=config.threads,
        image_size=config.image_size,
        label_numbers=config.label_numbers,
    )
    specs = [spec_of(argument) for argument in (a, b)]
    sides = []
    for argument, spec, other in ((a, specs[0], specs[1]), (b, specs[1], specs[0])):
        sides.append(open_side(argument, spec, other, options, config.num_classes, config.transform_input))
    left, right = _with_background(sides[0], sides[1])
    if (ordered := right.in_order(left)) is not right:
        print("note: class order: B has the same class names in another order; its columns are compared by name")
        right = ordered
    index, is_labeled = _images(config, left, right)
    left, right = _background_left_out(config, left, right, index)
    if left.pipeline and right.pipeline and left.pipeline.size != right.pipeline.size:
        print(
            f"note: A takes images of {left.pipeline.size} pixels, B of {right.pipeline.size}; where a file does not "
            f"store its size, --image-size {left.pipeline.size} gives both the same"
        )
    most_different = _Largest(config.sample // 2)
    found = _compare(config, left, right, index, is_labeled, most_different)
    _print(left, right, found, is_labeled)
    offset = found.label_offset(index.labels) if is_labeled else ""
    if offset:
        print(f"cause: {offset}")
    finding = None
    if config.diagnose and found.relative_error > _ROUNDING:
        finding = _diagnose(config, left, right, index, most_different.indices())
        print(finding or f"cause: none of the known mistakes explains the difference{_of_int8(left, right)}")
    layers = _per_layer(left, right, index) if config.per_layer else []
    if config.json:
        files.write_atomic(
            config.json, json.dumps(_summary(left, right, found, offset, finding, layers), indent=2) + "\n"
        )
    _check_gates(config, found, is_labeled)


def _with_background(a: "Side", b: "Side") -> "tuple[Side, Side]":
    """Both sides; where one has a column more than the other's classes, that is a background column.

    Raises:
      UserError: numbers of classes that do not fit together.
    """
    classes = [side.num_outputs - side.background for side in (a, b)]
    if classes[0] == classes[1] + 1 and not a.background:
        return dataclasses.replace(a, background=1), b
    if classes[1] == classes[0] + 1 and not b.background:
        return a, dataclasses.replace(b, background=1)
    if classes[0] != classes[1]:
        raise UserError(f"{b.name}: has {classes[1]} classes, {a.name} has {classes[0]}; they cannot be compared")
    return a, b


def _background_left_out(config: CompareConfig, a: "Side", b: "Side", index: "FolderIndex") -> "tuple[Side, Side]":
    """Both sides; where one has a column more, its place is looked for on eight images, and printed."""
    if a.background == b.background:
        return a, b
    from common.deploy.diagnosis import with_background

    chosen = sorted({int(i) for i in np.linspace(0, len(index) - 1, 8).round()})
    a, b, note = with_background(a, b, *_decoded(index, chosen), config.batch_size)
    print(note)
    return a, b


def _images(config: CompareConfig, a: "Side", b: "Side") -> "tuple[FolderIndex, bool]":
    """(images whose labels are classes, whether these are known)."""
    from common.data import file_tree, packed
    from common.data.index import of_files
    from common.evaluation.predict import list_images

    root = pathlib.Path(config.data)
    if not root.is_dir():
        raise UserError(f"--data: {root} is not a folder")
    folder = root / "val" if (root / "val").is_dir() else root
    num_classes, names = a.num_outputs - a.background, a.classes or b.classes
    is_labeled = (folder.parent / "val_label.txt").is_file() or packed.is_packed(folder)
    if not is_labeled:
        found = {file_tree.nfc(name) for name in file_tree.class_names(str(folder))[0]}
        is_labeled = not found.isdisjoint(map(file_tree.nfc, names)) if names else len(found) == num_classes
        if found and not is_labeled:
            print(f"note: the folders of {folder} ({min(found)}, ...) are not the classes; its images have no labels")
    if is_labeled:
        model = program.EvalModel(lambda pixels: np.empty(0), num_classes, 0, names)
        index = program.load_index(program.EvalConfig(data=config.data, label_numbers=config.label_numbers), model, 0)
    else:
        paths = list_images(str(folder))
        index = of_files(paths, [0] * len(paths))
    if config.max_images and config.max_images < len(index):
        chosen = set(np.linspace(0, len(index) - 1, config.max_images).round().astype(int).tolist())
        index = index.without({index.name(i) for i in range(len(index)) if i not in chosen})
    return index, is_labeled


class _Largest:
    """The images with the largest values among all that were added."""

    def __init__(self, count: int) -> None:
        self._count, self._heap = count, list[tuple[float, int]]()

    def add(self, values: np.ndarray, indices: Sequence[int]) -> None:
        self._heap = heapq.nlargest(self._count, [*self._heap, *zip(values.tolist(), indices, strict=True)])

    def indices(self) -> list[int]:
        """Largest value first."""
        return [index for _, index in self._heap]


def _compare(
    config: CompareConfig, a: "Side", b: "Side", index: "FolderIndex", is_labeled: bool, most_different: _Largest
) -> Comparison:
    """Both sides on all images; sides that crop alike share their pixels."""
    from common.data.loader import EvalLoader
    from common.deploy.sides import Crops

    pipelines = [side.pipeline for side in (a, b) if side.pipeline is not None]
    if len(pipelines) == 2 and pipelines[0].same_pixels(pipelines[1]):
        del pipelines[1]
    crops, background = Crops(pipelines), (a.background, b.background)

    def logits_of(side: "Side", number: int) -> "Callable[[Batch], np.ndarray]":
        def logits(batch: "Batch") -> np.ndarray:
            has_input = side.pipeline is not None
            pixels_NHWC = crops.split(batch.pixels_NHWC.numpy())[number] if has_input else np.empty(0)
            return side.logits(pixels_NHWC, [index.path(i) for i in batch.indices_N.tolist()])

        return logits

    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(_changes_writer(config.changes)) if config.changes else None
        names = class_names.names(a.classes or b.classes, a.num_outputs - a.background)

        def observe(batch: "Batch", logits_a: np.ndarray, logits_b: np.ndarray) -> None:
            a_NK, b_NK = aligned(logits_a, logits_b, background)
            indices = batch.indices_N.tolist()
            most_different.add(np.abs(a_NK - b_NK).max(axis=1), indices)
            if writer is not None:
                labels = [names[label] if is_labeled else "" for label in batch.labels_N.tolist()]
                writer.writerows(_changes(a_NK, b_NK, labels, [index.path(i) for i in indices], names))

        workers = parallel.dataloader_workers(config.workers, 1)
        loader = EvalLoader(index, crops, config.batch_size, "fail", 0, 1, workers, False)
        stack.callback(loader.close)
        return compare(logits_of(a, 0), logits_of(b, -1), loader, background, observe=observe)


@contextlib.contextmanager
def _changes_writer(path: str) -> Iterator[Any]:
    """A CSV writer of --changes; the file appears when the block ends without an error."""
    with (
        files.atomic_path(pathlib.Path(path)) as draft,
        open(draft, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        yield writer


def _changes(
    a_NK: np.ndarray, b_NK: np.ndarray, labels: Sequence[str], paths: Sequence[str], names: Sequence[str]
) -> Iterator[list[Any]]:
    """Rows of --changes of a batch."""
    for row_a, row_b, label, path in zip(a_NK, b_NK, labels, paths, strict=True):
        best_a, best_b = int(row_a.argmax()), int(row_b.argmax())
        if best_a != best_b:
            difference = f"{np.abs(row_a - row_b).max():.4g}"
            probabilities = [f"{softmax(row)[best]:.6g}" for row, best in ((row_a, best_a), (row_b, best_b))]
            yield [path, label, names[best_a], probabilities[0], names[best_b], probabilities[1], difference]


def _print(a: "Side", b: "Side", found: Comparison, is_labeled: bool) -> None:
    for letter, side, counts in (("A", a, found.a), ("B", b, found.b)):
        accuracy = ""
        if is_labeled:
            accuracy = ", ".join(f"top-{k} {counts.percent(k):.3f} % ({counts.correct[k - 1]})" for k in _ks(counts))
            accuracy = f"{accuracy} of {counts.seen} images"
        milliseconds = found.ms_per_image(letter.lower())
        speed = f"{milliseconds:.2f} ms an image" if found.timed and side.pipeline is not None else ""
        print(f"{letter}: {side.name}: {', '.join(part for part in (accuracy, speed) if part) or 'no labels'}")
    print(
        f"agreement of top-1: {found.agreement:.3f} % ({found.agreed} of {found.seen}); logits: largest difference "
        f"{found.max_difference:.4g}, mean {found.mean_difference:.4g}, relative error {found.relative_error:.2g}, "
        f"cosine {found.cosine:.6f}",
        flush=True,
    )


def _ks(counts: Any) -> list[int]:
    return [k for k in (1, 5) if k in counts.printed_k]


def _summary(
    a: "Side", b: "Side", found: Comparison, offset: str, finding: Any, layers: Sequence[tuple[str, float]]
) -> dict[str, Any]:
    """Content of --json."""
    sides = {
        letter: dict(
            name=side.name,
            correct=counts.correct.tolist(),
            top1=counts.percent(1),
            top5=counts.percent(5),
            milliseconds_per_image=found.ms_per_image(letter) if side.pipeline is not None else None,
        )
        for letter, side, counts in (("a", a, found.a), ("b", b, found.b))
    }
    numbers = dict(
        images=found.seen,
        agreed=found.agreed,
        agreement=found.agreement,
        drop=found.drop,
        largest_difference=found.max_difference,
        mean_difference=found.mean_difference,
        relative_error=found.relative_error,
        cosine=found.cosine,
    )
    explained = {} if finding is None else finding._asdict()
    causes = [*([offset] if offset else []), *explained.pop("causes", ())]
    return {
        **sides,
        **numbers,
        "causes": causes or None,
        "explained": explained or None,
        "layers": [dict(name=name, error=error) for name, error in layers],
    }


def _check_gates(config: CompareConfig, found: Comparison, is_labeled: bool) -> None:
    if config.max_drop is not None:
        if not is_labeled:
            raise UserError("--max-drop: the images of --data have no labels; use --min-agreement")
        if found.drop > config.max_drop:
            raise RunError(
                f"--max-drop: top-1 of B is {found.drop:.3f} points below A's, allowed are {config.max_drop:g}"
            )
    if config.min_agreement is not None and found.agreement < config.min_agreement:
        raise RunError(
            f"--min-agreement: top-1 agrees for {found.agreement:.3f} % of the images, asked for are "
            f"{config.min_agreement:g} %"
        )


def _diagnose(config: CompareConfig, a: "Side", b: "Side", index: "FolderIndex", most_different: Sequence[int]) -> Any:
    """explain on the most different images, among evenly spread ones."""
    from common.deploy.diagnosis import FIRST, explain

    count = config.sample - len(most_different)
    spread = [int(i) for i in np.linspace(0, len(index) - 1, count).round()]
    both = [i for pair in itertools.zip_longest(most_different, spread) for i in pair if i is not None]
    chosen = list(dict.fromkeys(both))
    if os.isatty(2):
        print(f"looking for the cause on {len(chosen)} images", flush=True)
    images, paths = _decoded(index, chosen)
    return explain(a, b, images, paths, config.batch_size, lambda: _decoded(index, range(min(FIRST, len(index)))))


def _of_int8(a: "Side", b: "Side") -> str:
    """End of a line, where one side is an int8 file."""
    from common.deploy.sides import ModelSide
    from common.evaluation.engines import EngineClassifier

    for side in (a, b):
        classifier = side.classifier if isinstance(side, ModelSide) else None
        if isinstance(classifier, EngineClassifier) and "quantization" in classifier.engine.metadata:
            return f"; {side.name} is an int8 file, it may be its rounding"
    return ""


def _decoded(index: "FolderIndex", chosen: Sequence[int]) -> "tuple[list[Image.Image], list[str]]":
    return [index.image(i) for i in chosen], [index.path(i) for i in chosen]


def _per_layer(a: "Side", b: "Side", index: "FolderIndex") -> list[tuple[str, float]]:
    from common.deploy.layer_errors import layer_errors

    if a.pipeline is None or b.pipeline is None:
        raise UserError("--per-layer: needs two models, and one side is a folder of results")
    chosen = sorted({int(i) for i in np.linspace(0, len(index) - 1, 8).round()})
    found, note = layer_errors(a, b, _decoded(index, chosen)[0])
    if note:
        print(note)
    print(f"{'block':40}  error of B, relative to the root mean square of A")
    for name, error in sorted(found, key=lambda each: -each[1]):
        print(f"{name:40}  {error:.2e}")
    return found
