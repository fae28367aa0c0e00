"""Why two models differ: known mistakes of conversions, each undone on a sample of the images.

A hypothesis changes the input, the network or the columns of one side. One explains the difference if the other side's
logits are then met, but for a quarter of the error at most. Several mistakes at once are found one after the other.
All hypotheses run on a few images, the best of them on the whole sample.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from common.deploy.sides import ModelSide, Side
from common.evaluation.comparison import aligned
from common.evaluation.engines import EngineClassifier
from common.evaluation.input_pipeline import NO_ANTIALIAS, InputPipeline
from common.evaluation.metrics import log_softmax, softmax
from common.evaluation.torch_classifier import TorchClassifier
from common.spec import HALF_RANGE, IMAGENET

_EXPLAINS = 0.25  # share of the error that may be left
_ROUNDS = 3  # mistakes at once
_SCREENED = 8  # images that every hypothesis runs on
_FINALISTS = 3  # hypotheses that run on the whole sample
_EXACT = 1e-3  # error that leaves nothing to explain
_SAME_SCALE = 0.02  # logits that differ by a smaller share are not called scaled
FIRST = 64  # images at the start, of which batches without eval() are made
_NO_STD = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
_BYTES = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
_CAFFE = ((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255, 1 / 255, 1 / 255))
_SIGNED_BYTES = ((0.5, 0.5, 0.5), (1 / 255, 1 / 255, 1 / 255))

_Pair = tuple[np.ndarray, np.ndarray]
_Function = Callable[[np.ndarray], np.ndarray]


class Finding(typing.NamedTuple):
    """What explains a difference.

    Attributes:
      causes: of _hypotheses, in the order in which they were found.
      agreement, error: share of equal top-1 in percent, and relative error of the logits, before and with the causes.
    """

    causes: tuple[str, ...]
    num_images: int
    agreement_before: float
    agreement: float
    error_before: float
    error: float

    def __str__(self) -> str:
        if self.error == self.error_before:  # seen without the other side
            return f"cause: {'; and '.join(self.causes)}"
        return (
            f"cause: {'; and '.join(self.causes)}. On {self.num_images} images top-1 then agrees for "
            f"{self.agreement:.1f} % instead of {self.agreement_before:.1f} %, error of the logits {self.error:.2g} "
            f"instead of {self.error_before:.2g}"
        )


@dataclasses.dataclass(frozen=True)
class _State:
    """Both sides as a hypothesis sees them; `columns` maps B's class columns to A's."""

    a: Side
    b: Side
    columns: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] = lambda a_NK, b_NK: (a_NK, b_NK)


class _Sample:
    """Images, and the logits of both sides on them.

    Args:
      batch_size: of the comparison; it matters to a network without eval().
    """

    def __init__(self, images: Sequence[Image.Image], paths: Sequence[str], batch_size: int) -> None:
        self.images, self.paths, self._batch_size = images, paths, batch_size
        self._known: dict[int, tuple[Side, np.ndarray]] = {}

    def logits(self, side: Side) -> np.ndarray:
        if id(side) not in self._known:
            rows = []
            for i in range(0, len(self.images), self._batch_size):
                part = self.images[i : i + self._batch_size]
                crops = [side.pipeline.crop(image) for image in part] if side.pipeline else []
                rows.append(
                    side.logits(np.stack(crops) if crops else np.empty(0), self.paths[i : i + self._batch_size])
                )
            self._known[id(side)] = (side, np.concatenate(rows))  # the side is kept, so that its id stays its own
        return self._known[id(side)][1]

    def pair(self, state: _State) -> tuple[np.ndarray, np.ndarray]:
        a_NK, b_NK = aligned(self.logits(state.a), self.logits(state.b), (state.a.background, state.b.background))
        return state.columns(a_NK, b_NK)

    def error(self, state: _State) -> float:
        """Root mean square of the differences, relative to that of A's logits about the mean of each class."""
        a_NK, b_NK = self.pair(state)
        scale = np.sqrt(((a_NK - a_NK.mean(axis=0)) ** 2).mean()) or 1.0
        return float(np.sqrt(((a_NK - b_NK) ** 2).mean()) / scale)

    def agreement(self, state: _State) -> float:
        a_NK, b_NK = self.pair(state)
        return 100.0 * float((a_NK.argmax(axis=1) == b_NK.argmax(axis=1)).mean())


def with_background(
    a: Side, b: Side, images: Sequence[Image.Image], paths: Sequence[str], batch_size: int
) -> tuple[Side, Side, str]:
    """Both sides, and a note on the column that one of them has more.

    It is the first one (a background class, as TensorFlow's weights have it), unless the top-1 of more images of the
    sample agree, or the logits fit much better, without the last one, which then becomes the first.
    """
    state, sample = _State(a, b), _Sample(images, paths, batch_size)
    name, side, other = next(each for each in _sides(state) if each[1].background > each[2].background)
    place = "first"
    if side.order is None:
        order = [side.num_outputs - 1, *range(side.num_outputs - 1)]
        last = dataclasses.replace(state, **{name: dataclasses.replace(side, order=order)})  # type: ignore[arg-type]
        agreements = [sample.agreement(each) for each in (state, last)]
        fits = agreements[0] == agreements[1] and sample.error(last) < 0.5 * sample.error(state)
        if agreements[1] > agreements[0] or fits:
            state, place = last, "last"
    return state.a, state.b, f"note: {side.name} has a column more than {other.name}; its {place} one is left out"


def explain(
    a: Side,
    b: Side,
    images: Sequence[Image.Image],
    paths: Sequence[str],
    batch_size: int,
    first: "Callable[[], tuple[Sequence[Image.Image], Sequence[str]]]",
) -> Finding | None:
    """The known mistakes that explain the difference between two sides, or None.

    Args:
      images, paths: the sample, most different images first; 8 images of different classes tell mistakes apart.
      batch_size: of the comparison.
      first: called where nothing else explains the difference; returns the first images of the data and their paths.
    """
    state = _State(a, b)
    sample, small = (_Sample(images[:count], paths[:count], batch_size) for count in (None, _SCREENED))
    before, agreement_before = sample.error(state), sample.agreement(state)
    seen_alone = (check(side, small) for check in (_constant, _unsteady) for side in (b, a))
    if mistake := next(filter(None, seen_alone), None):
        return Finding((mistake,), len(small.images), agreement_before, agreement_before, before, before)
    error, causes = before, list[str]()
    for _ in range(_ROUNDS):
        best: tuple[float, list[str], _State] | None = None
        for found_causes, changed in _finalists(state, sample, small):
            found = sample.error(changed)
            # Where two explain equally well, the first one: it changes fewer things, and rather B than A.
            if np.isfinite(found) and (best is None or found < 0.9 * best[0]):
                best = (found, found_causes, changed)
        if best is None or not best[0] < 0.8 * error:
            break
        error, state = best[0], best[2]
        causes += best[1]
        if error <= _EXPLAINS * before and error < 0.05:
            break
    if causes and error <= _EXPLAINS * before and sample.agreement(state) >= agreement_before:
        return Finding(tuple(causes), len(images), agreement_before, sample.agreement(state), before, error)
    return _train_mode(_State(a, b), *first(), batch_size)


def _finalists(state: _State, sample: _Sample, small: _Sample) -> Iterator[tuple[list[str], _State]]:
    """Hypotheses for the whole sample: all that only change the columns, and the best others on the small one."""
    for cause, reordered in _columns(state, sample):
        yield [cause], reordered
    screened = []
    for causes, changed in _hypotheses(state, small):
        error = small.error(changed)
        if np.isfinite(error):
            screened.append((max(error, _EXACT), causes, changed))
        if error <= _EXACT:
            break
    for _, causes, changed in sorted(screened, key=lambda each: each[0])[:_FINALISTS]:
        yield causes, changed


def _constant(side: Side, sample: _Sample) -> str:
    """Whether the logits do not depend on the image."""
    rows = sample.logits(side)
    is_constant = len(rows) > 1 and bool((rows == rows[0]).all())
    return f"constant: {side.name} gives the same logits for all images of the sample" if is_constant else ""


def _unsteady(side: Side, sample: _Sample) -> str:
    """Whether an exported network gives other logits for the same image: it was exported in training mode."""
    if not isinstance(side, ModelSide) or not isinstance(side.classifier, EngineClassifier) or not side.pipeline:
        return ""
    pixels = np.stack([side.pipeline.crop(image) for image in sample.images])
    rows = side.logits(pixels, sample.paths)
    alone = [side.logits(pixels[i : i + 1], sample.paths[i : i + 1]) for i in range(len(pixels))]
    scale = float(rows.std()) or 1.0
    for others, text in (
        (side.logits(pixels, sample.paths), "when it is run again: dropout is active"),
        (np.concatenate(alone), "in another batch, as batch norm does that takes the statistics of each batch"),
    ):
        if float(np.sqrt(((others - rows) ** 2).mean())) > 10 * _EXACT * scale:
            return f"train mode: {side.name} gives other logits for an image {text}; export it after eval()"
    return ""


def _train_mode(state: _State, images: Sequence[Image.Image], paths: Sequence[str], batch_size: int) -> Finding | None:
    """Whether one side's logits are those of the other's network without eval(), on batches from the start of the data.

    Dropout, which was then active too, leaves an error that nothing explains: half of it may remain.
    """
    best: Finding | None = None
    for name, side, _ in _sides(state):
        if not isinstance(side, ModelSide) or not isinstance(side.classifier, TorchClassifier):
            continue
        training = dataclasses.replace(side, classifier=side.classifier.with_batch_statistics())
        changed = dataclasses.replace(state, **{name: training})  # type: ignore[arg-type]  # a or b
        for size in sorted({min(each, len(images)) for each in (1, 8, 16, 32, batch_size, FIRST)}):
            count = min(len(images), max(size, _SCREENED) // size * size)
            sample = _Sample(images[:count], paths[:count], size)
            try:
                error, before = sample.error(changed), sample.error(state)
            except ValueError:  # one value per channel has no variance
                continue
            agreement = sample.agreement(changed)
            if error <= 0.5 * before and agreement >= sample.agreement(state) and (not best or error < best.error):
                cause = f"train mode: batch norm takes the statistics of batches of {size}, eval() was forgotten"
                best = Finding((cause,), count, sample.agreement(state), agreement, before, error)
    return best


def _hypotheses(state: _State, sample: _Sample) -> Iterator[tuple[list[str], _State]]:
    """One mistake in the input or the network, or in the columns, or one of each: columns cost no computation."""
    for causes, changed in [([], state), *(([cause], changed) for cause, changed in _inputs(state))]:
        if causes:
            yield causes, changed
        yield from ((causes + [cause], reordered) for cause, reordered in _columns(changed, sample))


def _sides(state: _State) -> Iterator[tuple[str, Side, Side]]:
    """(Field of the state, its side, the other side)."""
    yield "b", state.b, state.a
    yield "a", state.a, state.b


def _inputs(state: _State) -> Iterator[tuple[str, _State]]:
    for name, side, other in _sides(state):
        if not isinstance(side, ModelSide) or side.pipeline is None:
            continue
        for cause, pipeline in _pipelines(side.pipeline, other.pipeline):
            changed = side.with_pipeline(pipeline)
            yield cause, dataclasses.replace(state, **{name: changed})  # type: ignore[arg-type]


def _columns(state: _State, sample: _Sample) -> Iterator[tuple[str, _State]]:
    """Hypotheses about the order of the classes."""
    before = state.columns

    def shifted(by: int) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        def columns(a_NK: np.ndarray, b_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            a_NK, b_NK = before(a_NK, b_NK)
            return (a_NK[:, :-1], b_NK[:, 1:]) if by > 0 else (a_NK[:, 1:], b_NK[:, :-1])

        return columns

    a_NK, b_NK = sample.pair(state)
    for name, rows_NK, other_NK in (("B", b_NK, a_NK), ("A", a_NK, b_NK)):
        other = "A" if name == "B" else "B"
        for text, are_outputs, outputs_of in _OUTPUTS:
            if are_outputs(rows_NK) and not are_outputs(other_NK):

                def outputs(a_NK: np.ndarray, b_NK: np.ndarray, of: _Function = outputs_of) -> _Pair:
                    a_NK, b_NK = before(a_NK, b_NK)
                    return of(a_NK), of(b_NK)

                yield f"{text[0]}: {name} gives {text[1]}, {other} logits", dataclasses.replace(state, columns=outputs)
                break
    if (factor := _factor(a_NK, b_NK)) is not None:

        def scaled(a_NK: np.ndarray, b_NK: np.ndarray, by: float = factor) -> _Pair:
            a_NK, b_NK = before(a_NK, b_NK)
            return a_NK, b_NK / by

        yield f"scale: B's logits are {factor:.4g} times A's", dataclasses.replace(state, columns=scaled)
    if a_NK.shape[1] > 2:
        yield (
            "column shift: B's columns come one later than A's (1001 classes with a background, read as 1000)",
            dataclasses.replace(state, columns=shifted(1)),
        )
        yield (
            "column shift: B's columns come one earlier than A's (a background column was cut off twice)",
            dataclasses.replace(state, columns=shifted(-1)),
        )
    order = _order(a_NK, b_NK)
    if order is not None and not (order == np.arange(len(order))).all():

        def reordered(a_NK: np.ndarray, b_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            a_NK, b_NK = before(a_NK, b_NK)
            return a_NK, b_NK[:, order]

        moved = np.flatnonzero(order != np.arange(len(order)))
        yield (
            f"class order: {len(moved)} of {len(order)} columns stand elsewhere in B; A's column {moved[0]} is B's "
            f"{order[moved[0]]}",
            dataclasses.replace(state, columns=reordered),
        )


def _are_probabilities(rows_NK: np.ndarray) -> bool:
    return bool((rows_NK >= 0).all() and np.allclose(rows_NK.sum(axis=1), 1, atol=1e-2))


def _are_logarithms(rows_NK: np.ndarray) -> bool:
    return bool((rows_NK <= 0).all() and np.allclose(np.exp(rows_NK).sum(axis=1), 1, atol=1e-2))


def _are_of_sigmoid(rows_NK: np.ndarray) -> bool:
    return bool((rows_NK >= 0).all() and (rows_NK <= 1).all())


def _probabilities(rows_NK: np.ndarray) -> np.ndarray:
    """Probabilities of logits; probabilities stay as they are."""
    return rows_NK if _are_probabilities(rows_NK) else softmax(rows_NK)


def _of_sigmoid(rows_NK: np.ndarray) -> np.ndarray:
    return rows_NK if _are_of_sigmoid(rows_NK) else np.exp(-np.logaddexp(0, -rows_NK))


# (name, what one side gives), whether rows are that, and the function that makes it of logits.
_OUTPUTS = (
    (("softmax", "probabilities"), _are_probabilities, _probabilities),
    (("log-softmax", "logarithms of probabilities"), _are_logarithms, log_softmax),
    (("sigmoid", "a probability for each class"), _are_of_sigmoid, _of_sigmoid),
)


def _factor(a_NK: np.ndarray, b_NK: np.ndarray) -> float | None:
    """What B's logits are multiples of A's by, for example -1 or the inverse of a temperature; None if they are not."""
    squares = float((a_NK**2).sum())
    factor = float((a_NK * b_NK).sum()) / squares if squares else 0.0
    rest = float(((b_NK - factor * a_NK) ** 2).sum())
    is_multiple = rest <= (_EXPLAINS * _SAME_SCALE) ** 2 * float((b_NK**2).sum())
    return factor if factor and is_multiple and abs(factor - 1) > _SAME_SCALE else None


def _order(a_NK: np.ndarray, b_NK: np.ndarray) -> np.ndarray | None:
    """B's column of each of A's, by the logits on the sample; None if none fits."""
    squares = (a_NK**2).sum(axis=0)[:, None] + (b_NK**2).sum(axis=0)[None]
    order = np.argmin(squares - 2 * a_NK.T @ b_NK, axis=1)
    return order if len(set(order.tolist())) == len(order) else None


def _pipelines(pipeline: InputPipeline, other: InputPipeline | None) -> Iterator[tuple[str, InputPipeline]]:
    """Inputs that programs are known to make instead."""

    def changed(cause: str, **fields: typing.Any) -> Iterator[tuple[str, InputPipeline]]:
        found = dataclasses.replace(pipeline, **fields)
        if found != pipeline:
            yield cause, found

    size, colors = pipeline.size, "BGR" if pipeline.colors == "RGB" else "RGB"
    yield from changed("color order: one side takes BGR, the other RGB", colors=colors)
    mean, std = tuple(pipeline.mean[::-1]), tuple(pipeline.std[::-1])
    if (mean, std) != (tuple(pipeline.mean), tuple(pipeline.std)):
        cause = "color order: one side takes BGR with mean and std in that order, the other RGB"
        yield from changed(cause, colors=colors, mean=mean, std=std)
    norms = {
        "ImageNet's mean and std": IMAGENET,
        "0.5/0.5": HALF_RANGE,
        "values in 0..1": _NO_STD,
        "values in 0..255": _BYTES,
        "values in -127.5..127.5": _SIGNED_BYTES,
        "Caffe's means and values in 0..255": _CAFFE,
        "ImageNet's mean without std": (IMAGENET[0], _NO_STD[1]),
        "ImageNet's std without mean": (_NO_STD[0], IMAGENET[1]),
    }
    if other is not None:
        norms.setdefault("the other side's", (other.mean, other.std))
    current = next((name for name, pair in norms.items() if pair == (pipeline.mean, pipeline.std)), "another")
    for name, (mean, std) in norms.items():
        yield from changed(f"normalization: one side takes {name}, the other {current}", mean=mean, std=std)
    yield from changed("layout: HWC pixels are read as CHW", layout="HWC")
    yield from changed("layout: height and width are exchanged", layout="CWH")
    yield from changed("EXIF: one side turns images upright by their EXIF orientation", exif=not pipeline.exif)
    rounding = "floor" if pipeline.rounding == "round" else "round"
    yield from changed("crop rounding: the center crops start one pixel apart", rounding=rounding)
    resizes = {size, round(size / 0.875), int(size / 0.875), round(size / 0.897), round(size * 256 / 224)}
    if other is not None and other.size == size:
        resizes.add(other.resize)
    for resize in sorted(resizes - {pipeline.resize}):
        yield from changed(f"crop: one side resizes to {resize} pixels, the other to {pipeline.resize}", resize=resize)
    for geometry, name in (
        ("center", "crops the center"),
        ("squash", "squashes to a square"),
        ("central", "cuts out the central 87.5 % and squashes it"),
    ):
        fields = dict(geometry=geometry) if geometry != "squash" else dict(geometry=geometry, resize=size)
        yield from changed(f"crop: one side {name}", **fields)
    for interpolation in ("bilinear", "bicubic", "nearest", "lanczos", NO_ANTIALIAS):
        yield from changed(
            f"interpolation: one side resizes by {interpolation}, the other by {pipeline.interpolation}",
            interpolation=interpolation,
        )
