"""MindSpore's CrossEntropySmooth: target 1 - f for the label and f / (K - 1) for each other class.

torch's own label smoothing gives f / K to every class.
"""

import functools

from common.train.losses import smoothed_cross_entropy

CrossEntropySmooth = functools.partial(smoothed_cross_entropy, smoothing_targets="others")
