"""Top-1 and top-5 accuracy of Xception, over every image of a folder of class folders.

    python xception/eval.py --device_target GPU --checkpoint_path ckpt_0/Xception-rank0-250_1251.ckpt \\
        --dataset_path /dataset/val

Reads checkpoints of this repository, MindSpore, Keras, timm and Cadene, and .onnx and .om files. `Loss` is the smoothed
loss, as in training. The result is also appended to eval.log (Ascend) or eval_gpu.log in the current folder.
"""

import dataclasses
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs from any folder

from common import cli, files
from common.evaluation import program
from xception.src import config as recipes
from xception.src.run_log import EVAL_LOGS, result_line


@dataclasses.dataclass(frozen=True)
class XceptionEvalConfig(program.EvalConfig):
    """EvalConfig under the option names of the original package."""

    data: str = cli.renamed(program.EvalConfig, "data", "--dataset-path")
    resume: str = cli.renamed(program.EvalConfig, "resume", "--checkpoint-path")
    device: str = recipes.device_option(program.EvalConfig)
    label_smooth_factor: float = cli.option(0.1, "smoothing of the reported loss", low=0, high=1)
    log_file: str = cli.option("", "file to add the result to; default eval.log on Ascend, else eval_gpu.log")


def main() -> None:
    config, _ = cli.parse(XceptionEvalConfig(), __doc__)
    config = dataclasses.replace(config, device=recipes.DEVICES.get(config.device, config.device))
    log = config.log_file or EVAL_LOGS["Ascend" if config.device == "npu" else "GPU"]
    files.check_file(log, "--log-file")
    program.check_outputs(config, log_file=log)
    from common.train.losses import torch_smoothing

    counts, model = program.evaluate_folder(
        recipes.SPEC, config, lambda num_outputs: torch_smoothing(config.label_smooth_factor, "others", num_outputs)
    )
    print(result_line(counts))
    program.write_metrics(config, counts, model)
    with open(log, "a", encoding="utf-8") as file:
        file.write(result_line(counts) + "\n")


if __name__ == "__main__":
    with cli.exit_on_error():
        main()
