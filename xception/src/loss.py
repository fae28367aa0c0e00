"""The seed's CrossEntropySmooth: target 1 - f for the label and f / (K - 1) for each other class.

torch's own smoothing, f / K for every class, differs from it slightly.
"""

import functools

from common.train.losses import smoothed_cross_entropy

CrossEntropySmooth = functools.partial(smoothed_cross_entropy, off="others")
