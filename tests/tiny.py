"""Train a network of a few thousand parameters with the real trainer; as a script, what launchers start in tests."""

import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from common.config import Recipe, TrainConfig
from common.spec import ModelSpec
from common.train.program import TrainProgram


def build(num_classes, aux, dropout):
    import torch
    from torch import nn

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(
                nn.Conv2d(3, 8, 3, 2, bias=False),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Conv2d(8, 16, 3, 2, bias=False),
                nn.BatchNorm2d(16),
                nn.ReLU(),
            )
            self.head = nn.Linear(16, num_classes) if aux else None
            self.dropout, self.fc = nn.Dropout(dropout), nn.Linear(16, num_classes)

        def forward(self, x):
            features = torch.flatten(nn.functional.adaptive_avg_pool2d(self.stem(x), 1), 1)
            logits = self.fc(self.dropout(features))
            return (logits, self.head(features)) if self.training and self.head is not None else logits

    return Tiny()


SPEC = ModelSpec(
    name="tiny",
    builder=build,
    build_options={"num_classes": 10, "aux": True, "dropout": 0.25},
    input_size=32,
    min_size=16,
    eval_resize=36,
    aux_weight=0.4,
    training_modules=("head",),
    classifiers=("fc", "head"),
)
RECIPE = dataclasses.replace(
    TrainConfig(), image_size=32, batch_size=12, epochs=3, workers=0, lr=0.1, device="cpu", threads=1, print_freq=2
)
PROGRAM = TrainProgram(SPEC, {"default": Recipe(RECIPE)}, __doc__)

if __name__ == "__main__":
    PROGRAM.main()
