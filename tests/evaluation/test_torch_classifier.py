"""A network as a function from pixels to logits."""

import numpy as np
import torch

from common.device.device import Device
from common.evaluation.torch_classifier import Normalizer, TorchClassifier
from inception_v4.spec import SPEC


def test_small_batches_of_a_compiled_network_are_filled_up_and_cut_again():
    sizes = []

    class Mean(torch.nn.Module):
        def forward(self, images):
            sizes.append(len(images))
            return images.mean(dim=(2, 3))

    device, rng = Device("cpu"), np.random.default_rng(0)
    normalizer = Normalizer(SPEC, device, "nchw")
    pixels = torch.from_numpy(rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8))
    plain = TorchClassifier(Mean(), normalizer, device)(pixels)
    compiled = TorchClassifier(Mean(), normalizer, device, compiled_batch=5)(pixels)
    assert sizes == [3, 5] and np.array_equal(plain, compiled)
    expected = (pixels.numpy() / 127.5 - 1).mean(axis=(1, 2))
    np.testing.assert_allclose(plain, expected, atol=1e-6)
