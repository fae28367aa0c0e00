"""A batch of images on the host, and the loader of evaluations that need no torch.

Legend: N batch, H W pixel, C channel.
"""

import typing
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

from common import parallel
from common.data.decode import BadImage, open_rgb
from common.data.index import FolderIndex

Array: typing.TypeAlias = typing.Any  # torch.Tensor; np.ndarray of a ThreadLoader
Transform = Callable[[Image.Image], np.ndarray]
_AHEAD = 2  # batches per thread that are decoded before they are asked for


class Batch(typing.NamedTuple):
    """One batch on the host.

    Attributes:
      pixels_NHWC: uint8.
      labels_N: int64.
      indices_N: int64, positions in the FolderIndex.
      bad: (path, reason) of every file that does not decode.
      failed: whether a bad file must stop the run.
      bad_indices: positions of the images whose place no other image takes, as in evaluation; those of `bad` there.
    """

    pixels_NHWC: Array
    labels_N: Array
    indices_N: Array
    bad: list[tuple[str, str]]
    failed: bool
    bad_indices: Sequence[int] = ()

    def raise_if_failed(self) -> None:
        """Raise BadImage for the first bad file where `failed`."""
        if self.failed:
            raise BadImage(*self.bad[0])


def fill(
    keys: Sequence[typing.Any],
    candidates: Callable[[typing.Any], Iterable[int]],
    read: Callable[[int, Array | None], np.ndarray],
    label_of: Callable[[int], int],
    empty: Callable[[tuple[int, ...]], Array],
    as_array: Callable[[list[int]], Array],
) -> Batch:
    """The images of `keys` that decode.

    Args:
      candidates: key -> positions of its image and of those that may replace it.
      read: (position, where to write the pixels) -> pixels [H, W, C], written there unless that is None.
      empty: shape -> uint8.
      as_array: positions or labels -> int64 [N].
    """
    pixels_NHWC: Array | None = None
    labels, indices, lost, bad = list[int](), list[int](), list[int](), list[tuple[str, str]]()
    for key in keys:
        for i in candidates(key):
            try:
                pixels = read(i, None if pixels_NHWC is None else pixels_NHWC[len(labels)])
            except BadImage as error:
                bad.append((error.path, error.reason))
                continue
            if pixels_NHWC is None:
                pixels_NHWC = empty((len(keys), *pixels.shape))
                np.asarray(pixels_NHWC)[0] = pixels
            labels.append(label_of(i))
            indices.append(i)
            break
        else:
            lost.append(i)
    good = empty((0, 1, 1, 3)) if pixels_NHWC is None else pixels_NHWC[: len(labels)]
    return Batch(good, as_array(labels), as_array(indices), bad, bool(lost), lost)


class ThreadLoader:
    """Batches of a split in order, as those of common.data.loader.EvalLoader, decoded by threads of this process.

    It starts at once and without torch. PIL and the engines of exported files leave Python's lock to other threads, so
    that decoding and the network share the cores of a CPU.

    Args:
      sizes: images of each batch; their sum is the number of images.
      threads: 0 decodes in the thread that iterates.
    """

    def __init__(
        self, index: FolderIndex, transform: Transform, sizes: Iterable[int], on_bad_image: str, threads: int
    ) -> None:
        self._index, self._transform, self._skips = index, transform, on_bad_image == "skip"
        ends = np.cumsum(list(sizes)).tolist()
        spans = [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        self._batches = parallel.in_order(self._batch, spans, threads, _AHEAD)

    def _batch(self, positions: range) -> Batch:
        def read(i: int, out_HWC: np.ndarray | None) -> np.ndarray:
            pixels = self._transform(open_rgb(self._index.path(i), self._index.read(i)))
            if out_HWC is not None:
                out_HWC[...] = pixels
            return pixels

        label_of: Callable[[int], int] = lambda i: int(self._index.labels[i])  # noqa: E731
        empty: Callable[[tuple[int, ...]], np.ndarray] = lambda shape: np.empty(shape, np.uint8)  # noqa: E731
        batch = fill(positions, lambda i: [i], read, label_of, empty, lambda values: np.array(values, np.int64))
        return batch._replace(failed=batch.failed and not self._skips)

    def __iter__(self) -> Iterator[Batch]:
        return self._batches

    def close(self) -> None:
        """Stop decoding."""
        self._batches.close()
