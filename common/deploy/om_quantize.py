"""quantize.py --for om: int8 for atc by AMCT's command line, with the same calibration images and the same limits.

AMCT writes two files: one for atc, whose operators only an NPU has, and one that computes the same in ONNX Runtime.
The second one measures the loss of the first. docs/QUANTIZE.md names the sources.
"""

import pathlib
import shlex
import shutil
from collections.abc import Callable

from common import files, processes
from common.deploy import file_names, quantize
from common.errors import RunError, UserError
from common.evaluation import engines, onnx_metadata
from common.spec import ModelSpec

TOOL = "amct_onnx"
INSTALL = (
    f"{TOOL}: not on the PATH; it comes with CANN's AMCT package (Ascend-cann-amct, the wheel amct_onnx); install it "
    "and run the command above, or this program again"
)


def amct_command(
    source: pathlib.Path, prefix: pathlib.Path, input_shape: str, data: pathlib.Path, batches: int
) -> list[str]:
    """The arguments of a calibration over files of one batch each."""
    return [
        TOOL,
        "calibration",
        f"--model={source}",
        f"--save_path={prefix}",
        f"--input_shape={input_shape}",
        f"--data_dir={data}",
        "--data_types=float32",
        f"--batch_num={batches}",
    ]


def quantize_for_om(
    source: str, target: str, config: quantize.QuantizeConfig, spec_of: Callable[[str], ModelSpec]
) -> quantize.Trial:
    """Run AMCT and keep its deployable model as `target`.

    Raises:
      UserError: AMCT is not installed; its command was printed, and its calibration files stay.
      RunError: AMCT failed, or the loss is above the limits.
    """
    quantize.check_target(source, target)
    network = quantize.FloatNetwork(source, config, spec_of)
    search = quantize.Search(network, config, pathlib.Path(f"{target}.work"))
    folder = search.folder.absolute()
    data = folder / "calibration"
    data.mkdir(exist_ok=True)
    batch, num_batches = network.batch, search.num_images // network.batch
    if not num_batches:
        raise UserError(f"--images: {search.num_images}, AMCT takes whole batches of {batch}")
    for i in range(num_batches):
        search.images(i * batch, batch).tofile(data / f"batch_{i:05d}.bin")
    name = network.prepared.graph.input[0].name
    command = amct_command(
        pathlib.Path(source).absolute(),
        folder / "amct",
        f"{name}:{batch},3,{network.size},{network.size}",
        data,
        num_batches,
    )
    for flag, path in (("IN", pathlib.Path(source).absolute()), ("OUT", folder)):
        file_names.check_characters(flag, path, "atc")
    print(shlex.join(command), flush=True)
    if shutil.which(TOOL) is None:
        raise UserError(INSTALL)
    done = processes.run_program(command, cwd=folder)
    deploy, fake = folder / "amct_deploy_model.onnx", folder / "amct_fake_quant_model.onnx"
    if done.returncode or not deploy.is_file() or not fake.is_file():
        last = [line for line in done.stdout.splitlines() if line.strip()][-1:] or ["no output"]
        raise RunError(f"{TOOL}: exit status {done.returncode}, {last[0][:200]}; its logs are in {folder}/amct_log")
    best = search.measure(engines.OnnxEngine(fake, threads=config.threads), "amct")
    print(f"{quantize.HEADER}\n{best}", flush=True)
    best.check(config, folder)
    import onnx

    proto = onnx.load(deploy)
    noted = quantize.record(best, config, search, source, library=f"{TOOL} (AMCT)", activations="int8")
    metadata = onnx_metadata.OnnxMetadata(**{**network.engine.metadata, "quantization": noted})
    onnx.helper.set_model_props(proto, onnx_metadata.encode(metadata))
    with files.atomic_path(target, ".tmp.onnx") as draft:
        onnx.save(proto, draft)
    shutil.rmtree(folder)
    print(
        f"{target}: int8 for atc, top-1 {best.acc1_before:.3f} -> {best.acc1_after:.3f} % of {best.images} images, "
        f"agreement {best.agreements}; next: python tools/run_atc.py --model {target} "
        f"--batch {batch} (int8 takes no --dynamic-batch)"
    )
    return best
