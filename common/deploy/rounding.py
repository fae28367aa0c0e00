"""Rounding of int8 weights that keeps the outputs of a convolution, not each weight, close to the float ones.

Source: GPTQ (Frantar et al., arXiv 2210.17323): the weights of an output channel are rounded one after the other, and
those not rounded yet make up for the error of each, as far as their inputs occur together.

Legend: O output channels, D weights of an output channel (input channels x kernel), M sampled patches.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Mapping

import numpy as np

from common.deploy import int8_graph
from common.deploy.calibrate import open_session
from common.progress import Progress

if typing.TYPE_CHECKING:
    import onnx

PATCHES = 64  # of an image and convolution; the smallest maps have 64 positions
DAMPING = 0.01  # of the mean diagonal of the second moments, as published
BLOCK = 128  # columns whose errors are passed on at once


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """Convolutions of equal geometry see the same patches."""

    source: str
    kernel: tuple[int, int]
    pads: tuple[int, int, int, int]
    strides: tuple[int, int]

    def patches(self, values_NCHW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """At most PATCHES positions of each image, [M, D]."""
        top, left, bottom, right = self.pads
        padded = np.pad(values_NCHW, ((0, 0), (0, 0), (top, bottom), (left, right)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, self.kernel, axis=(2, 3))
        windows = windows[:, :, :: self.strides[0], :: self.strides[1]]
        height, width = windows.shape[2:4]
        chosen = rng.permutation(height * width)[:PATCHES]
        picked = windows[:, :, chosen // width, chosen % width]  # [N, C, positions, kernel]
        return picked.swapaxes(1, 2).reshape(picked.shape[0] * picked.shape[2], -1)


def _geometries(proto: "onnx.ModelProto") -> dict[str, _Geometry]:
    """Weight -> geometry of its convolution; grouped and dilated ones and automatic padding are left out."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    found = {}
    for node in proto.graph.node:
        if node.op_type != "Conv" or len(shapes.get(node.input[1], ())) != 4:
            continue
        options = int8_graph.attributes(node)
        if (
            options.get("group", 1) == 1
            and set(options.get("dilations", [1])) == {1}
            and options.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
        ):
            found[node.input[1]] = _Geometry(
                node.input[0],
                shapes[node.input[1]][2:],
                tuple(options.get("pads", (0, 0, 0, 0))),
                tuple(options.get("strides", (1, 1))),
            )
    return found


class Moments:
    """Second moments of the inputs of the convolutions of a network; collected at the first question, then kept.

    Args:
      proto: float network with inferred shapes.
      batches: number -> images [N, C, H, W], the input of the network.
    """

    def __init__(self, proto: "onnx.ModelProto", batches: Callable[[int], np.ndarray], num_batches: int) -> None:
        self._proto, self._batches, self._num_batches = proto, batches, num_batches

    @functools.cached_property
    def _collected(self) -> dict[_Geometry, np.ndarray]:
        geometries = set(_geometries(self._proto).values())
        return _second_moments(self._proto, geometries, self._batches, self._num_batches)

    def of(self, geometry: _Geometry, factors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Sum of x x^T over patches x, [D, D]; `factors`: tensor -> what its channels are multiplied by beforehand."""
        found = self._collected[geometry]
        if geometry.source not in factors:
            return found
        of_inputs = np.repeat(factors[geometry.source], math.prod(geometry.kernel))
        return found * of_inputs * of_inputs[:, None]


def rounded_weights(
    proto: "onnx.ModelProto",
    quantized: Mapping[str, tuple[np.ndarray, np.ndarray]],
    moments: Moments,
    factors: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """New integers for the weights of the convolutions of `proto`.

    Args:
      proto: float network with inferred shapes.
      quantized: weight -> integers, rounded to the nearest, and scales [O].
      moments, factors: `proto` is the network of `moments` with channels multiplied by `factors`; see Moments.of.
    Returns:
      weight -> integers of the same shape and type; depthwise weights are left out, they keep theirs.
    """
    from onnx import numpy_helper

    geometries = {name: found for name, found in _geometries(proto).items() if name in quantized}
    floats = {tensor.name: tensor for tensor in proto.graph.initializer if tensor.name in geometries}
    result = {}
    with Progress(len(geometries), "rounded layers") as advance:
        for name, geometry in geometries.items():
            nearest, scales = quantized[name]
            weights = numpy_helper.to_array(floats[name]).reshape(len(nearest), -1)
            limit = int(np.abs(nearest.astype(np.int64)).max())  # 127, or 63 or 64 with 7 bits
            rounded = round_rows(weights, scales, moments.of(geometry, factors), limit)
            result[name] = rounded.astype(nearest.dtype).reshape(nearest.shape)
            advance(1)
    return result


def _second_moments(
    proto: "onnx.ModelProto", geometries: set[_Geometry], batches: Callable[[int], np.ndarray], num_batches: int
) -> dict[_Geometry, np.ndarray]:
    """Sum over sampled patches of the products of each two inputs, [D, D] for each geometry."""
    image = proto.graph.input[0].name
    sources = sorted({each.source for each in geometries} - {image})
    session, rng = open_session(proto, sources), np.random.default_rng(0)
    sums: dict[_Geometry, np.ndarray] = {}
    ordered = sorted(geometries, key=repr)
    with Progress(num_batches, "rounding batches") as advance:
        for number in range(num_batches):
            images = batches(number)
            values = dict(zip(sources, session.run(sources, {image: images}), strict=True)) if sources else {}
            values[image] = images
            for geometry in ordered:
                patches = geometry.patches(values[geometry.source], rng)
                product = patches.T @ patches
                sums[geometry] = sums[geometry] + product if geometry in sums else product
            advance(1)
    return sums


def round_rows(weights: np.ndarray, scales: np.ndarray, moments: np.ndarray, limit: int) -> np.ndarray:
    """Integers q [O, D] that make the sum over inputs x of ((weights - scales q) x)^2 small.

    Args:
      weights: [O, D]; scales: [O]; moments: [D, D], sum of x x^T.
      limit: largest absolute integer.
    """
    order = np.argsort(-np.diag(moments), kind="stable")  # the weightiest first: the rest makes up for them
    matrix = moments[np.ix_(order, order)].astype(np.float64)
    matrix[np.diag_indices_from(matrix)] += DAMPING * np.diag(matrix).mean() or 1.0
    # matrix = M M^T with M upper triangular; factor = M^-1, so that matrix^-1 = factor^T factor.
    factor = np.linalg.inv(np.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1])
    rest = weights[:, order].astype(np.float64)
    steps = scales.astype(np.float64)
    found = np.empty_like(rest)
    for start in range(0, rest.shape[1], BLOCK):
        stop = min(start + BLOCK, rest.shape[1])
        errors = np.empty((len(rest), stop - start))
        for column in range(start, stop):
            values = np.clip(np.rint(rest[:, column] / steps), -limit, limit)
            error = (rest[:, column] - values * steps) / factor[column, column]
            rest[:, column:stop] -= error[:, None] * factor[column, column:stop]
            found[:, column], errors[:, column - start] = values, error
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    result = np.empty_like(found)
    result[:, order] = found
    return result
