"""quantize.py: float32 ONNX -> int8 ONNX by ONNX Runtime's static quantization, written with its measured loss.

docs/QUANTIZE.md says why this library and these settings.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import shutil
import statistics
import subprocess
import time
import typing
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from common import cli, cpuinfo, files, parallel
from common.data import labels
from common.data.transforms import normalize_into
from common.deploy import calibrate, channel_scales, float_fallback, int8_graph, int8_network, rounding
from common.errors import RunError, UserError, printable
from common.evaluation import engines, onnx_metadata, openvino_engine, program
from common.files import write_atomic
from common.spec import ModelSpec

if typing.TYPE_CHECKING:
    import onnx

    from common.data.batch import Batch
    from common.data.index import FolderIndex
    from common.evaluation.comparison import Comparison

BATCH = 8  # images of one calibration batch, and of the speed that is printed, where the file leaves it open
DAMAGE_BATCHES = 2  # calibration batches that rank the layers
SPEED_BATCHES = 4  # calibration batches, train/ and --calibration-data, of the speed that is printed
SCALED = "scaled "  # begins the names of methods whose network has scaled channels
EQUAL_SHARE = 1e-4  # of the largest logit, as in export: the rewritten float graph must compute the same
FALLBACK_MARGINS = (1, 2, 3)  # times Trial.noise
SAME_SHARE = 1e-5  # of the largest logit of an image: computed by the same network, in another batch


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """Options of tools/quantize.py."""

    target: str = cli.option(
        "cpu", "what OUT is for: ONNX Runtime and OpenVINO, or CANN's atc", name="--for", choices=("cpu", "om")
    )
    data: str = cli.option(
        "",
        "dataset root: train/ calibrates, val/ measures the accuracy",
        required="the folder that holds train/ and val/",
    )
    agreement_data: str = cli.option("", "folder of further photographs without labels, for the agreement")
    calibration_data: str = cli.option("", "folder of further photographs without labels, which calibrate too")
    images: int = cli.option(256, "images of train/, and of --calibration-data, to calibrate with", low=1)
    calibration: str = cli.option(
        "all", "how ranges are found; all: each is tried", choices=("all", *calibrate.METHODS)
    )
    max_drop: float = cli.option(0.5, "largest loss of top-1, points of percent", low=0, high=100)
    min_agreement: float = cli.option(0.0, "smallest share of images with the same top-1, percent", low=0, high=100)
    float_fallback: bool = cli.option(
        False,
        "where no method meets the limits: a file of both networks, which computes again in float32 the images whose "
        "two largest logits are close",
    )
    reduce_range: str = cli.option(
        "auto",
        "weights of 7 bits, for x86 processors without VNNI; auto: what this one has",
        choices=("auto", "on", "off"),
    )
    arch: str = cli.option("", "folder of the model (default: stored in IN)")
    label_numbers: str = labels.numbers_option()
    workers: int = cli.option(2, "processes that decode", "-j", low=0)
    threads: int = cli.option(0, "cores of the network; 0 is all", low=0)

    def __post_init__(self) -> None:
        cli.check_ranges(self)
        if self.float_fallback and self.target == "om":
            raise UserError("--float-fallback: only with --for cpu; atc takes no file of two networks")


@dataclasses.dataclass
class Trial:
    """One quantized network and what was measured of it.

    Attributes:
      method: of calibrate.METHODS, after SCALED where the channels are scaled.
      float_layers: names of convolutions that stay in float32.
      accuracy: both networks on the validation images.
      agreed, seen: images with the same top-1, over validation images and further photographs.
      agreed_further, seen_further: the photographs among them.
      margin: two largest logits that are closer are computed again in float32 (see float_fallback); 0: none are.
      repeated: images that this was done for.
      noise: root mean square of what int8 adds to the difference of the two largest float32 logits.
    """

    method: str
    float_layers: list[str]
    acc1_before: float
    acc1_after: float
    images: int
    agreed: int
    seen: int
    relative_error: float
    agreed_further: int = 0
    seen_further: int = 0
    margin: float = 0.0
    repeated: int = 0
    noise: float = 0.0

    @property
    def drop(self) -> float:
        return self.acc1_before - self.acc1_after

    @property
    def agreement(self) -> float:
        return 100.0 * self.agreed / self.seen

    @property
    def agreements(self) -> str:
        """The agreement in words, of the photographs alone too."""
        text = f"{self.agreement:.3f} % of {self.seen} images"
        if not self.seen_further:
            return text
        agreed, seen = self.agreed - self.agreed_further, self.seen - self.seen_further
        share, further = 100 * agreed / seen, 100 * self.agreed_further / self.seen_further
        return f"{text} ({share:.3f} % of {seen} in val/, {further:.3f} % of {self.seen_further} in --agreement-data)"

    @property
    def network(self) -> str:
        """What was measured, in words."""
        text = f"{self.method}, {len(self.float_layers)} layers in float32"
        again = f", {100 * self.repeated / self.seen:.2f} % of the images again in float32"
        return text + (again if self.margin else "")

    def meets(self, config: QuantizeConfig) -> bool:
        # 1e-9: 95.5 - 95.0 is not exactly 0.5
        return self.drop <= config.max_drop + 1e-9 and self.agreement >= config.min_agreement - 1e-9

    def check(self, config: QuantizeConfig, folder: pathlib.Path) -> None:
        """Raise RunError for a loss above the limits."""
        if not self.meets(config):
            hint = "" if config.float_fallback or config.target == "om" else "; --float-fallback changes fewer images"
            raise RunError(
                f"OUT: not written; the best found ({self.network}) loses {self.drop:.3f} points of top-1 "
                f"({self.acc1_before:.3f} -> {self.acc1_after:.3f} %) and agrees on {self.agreements}; allowed are "
                f"--max-drop {config.max_drop:g} and --min-agreement {config.min_agreement:g}. {folder} keeps the "
                f"trials{hint}"
            )

    def __str__(self) -> str:
        return (
            f"{self.method:17}  {len(self.float_layers):12}  {100 * self.repeated / self.seen:5.2f} %  "
            f"{self.acc1_after:7.3f} %  {self.drop:6.3f}  "
            f"{self.agreement:7.3f} %  {self.relative_error:9.4f}"
        )


HEADER = f"{'method':17}  {'float layers':>12}  {'again':>7}  {'top-1':>9}  {'drop':>6}  {'agreement':>9}  {'error':>9}"


def has_vnni() -> bool:
    """Whether int8 products do not saturate here: VNNI on x86; other processors have no such limit."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return bool({"avx512_vnni", "avx_vnni", "amx_int8"} & set(cpuinfo.field("flags").split()))


def check_target(source: str, target: str) -> None:
    """Raise UserError for a file of another format, and for the source itself."""
    files.check_distinct(target, "OUT", {"IN": source})
    if pathlib.Path(target).suffix != ".onnx":
        raise UserError(f"OUT: {target}, must end in .onnx")


def quantize(source: str, target: str, config: QuantizeConfig, spec_of: Callable[[str], ModelSpec]) -> Trial:
    """Write the int8 file and print what it lost.

    Args:
      spec_of: ModelSpec of the name that the file or --arch gives.
    Raises:
      UserError: files, data and options that do not fit. RunError: no network meets --max-drop and --min-agreement.
    """
    check_target(source, target)
    network = FloatNetwork(source, config, spec_of)
    search = Search(network, config, pathlib.Path(f"{target}.work"))
    best = search.run()
    print(f"{HEADER}\n" + "\n".join(map(str, search.trials)), flush=True)
    best.check(config, search.folder)
    proto = search.network(best.method, best.float_layers, best.margin)
    metadata = onnx_metadata.OnnxMetadata(
        **{**network.engine.metadata, "quantization": record(best, config, search, source)}
    )
    import onnx

    onnx.helper.set_model_props(proto, onnx_metadata.encode(metadata))
    with files.atomic_path(target, ".tmp.onnx") as draft:
        onnx.save(proto, draft)
        engine = engines.OnnxEngine(draft, threads=config.threads)
        logits = engine.run(search.calibration_batch(0))
        numbers = np.linspace(0, search.num_batches - 1, SPEED_BATCHES).astype(int).tolist()
        ratio = _speed_ratio(network.engine, engine, [search.calibration_batch(i) for i in numbers])
    shutil.rmtree(search.folder)
    sizes = [pathlib.Path(path).stat().st_size / 2**20 for path in (source, target)]
    print(
        f"{target}: int8 ({best.network}), {sizes[0]:.1f} -> "
        f"{sizes[1]:.1f} MiB, top-1 {best.acc1_before:.3f} -> {best.acc1_after:.3f} % of {best.images} images, "
        f"agreement {best.agreements}, {ratio:.2f} times as fast (batch {network.batch})"
    )
    if line := _openvino_line(target, search.calibration_batch(0), logits):
        print(line)
    return best


def record(
    best: Trial, config: QuantizeConfig, search: "Search", source: str, library: str = "", activations: str = "uint8"
) -> dict[str, Any]:
    """What the metadata of an int8 file says; `library` is ONNX Runtime by default."""
    root = pathlib.Path(__file__).resolve().parents[2]
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    return {
        "source": pathlib.Path(source).name,
        "source_sha256": files.sha256(source),
        "library": library or f"onnxruntime {importlib.metadata.version('onnxruntime')}, QDQ, weights rounded by GPTQ",
        "method": best.method,
        "calibration_images": search.num_images,
        "activations": activations,
        "weights": "int8 per channel, symmetric" + (", 7 bits" if search.reduce_range else ""),
        "float_layers": best.float_layers,
        "fallback_margin": best.margin,
        "fallback_images": best.repeated,
        "images": best.images,
        "acc1_before": best.acc1_before,
        "acc1_after": best.acc1_after,
        "agreement": best.agreement,
        "agreement_images": best.seen,
        "agreed_further": best.agreed_further,
        "further_images": best.seen_further,
        "relative_error": best.relative_error,
        "max_drop": config.max_drop,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
    }


class FloatNetwork:
    """The file to quantize.

    Attributes:
      batch: images of a run.
      proto: the network at int8_graph.OPSET or later.
      prepared: rewritten by int8_graph, with the names of its convolutions in `layers`.
    Raises:
      UserError: a file that is no float32 classifier of a known network.
    """

    def __init__(self, source: str, config: QuantizeConfig, spec_of: Callable[[str], ModelSpec]) -> None:
        import onnx

        if pathlib.Path(source).suffix != ".onnx":
            raise UserError(f"IN: {source} is no .onnx file; the export script of the model writes one")
        engine = engines.open_engine(source, threads=config.threads)
        assert isinstance(engine, engines.OnnxEngine)
        proto = onnx.load(source)
        if any(node.op_type in ("QuantizeLinear", "QLinearConv") for node in proto.graph.node):
            raise UserError(f"IN: {source} is quantized already; give the float32 file")
        if engine.dtype != np.float32 or any(
            tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in proto.graph.initializer
        ):
            raise UserError(f"IN: {source} computes in or takes float16; export it in float32")
        if engines.takes_channels_last(engine.sample_shape, engine.dtype):
            raise UserError(f"IN: {source} takes N x S x S x 3; export it with the channels first, N x 3 x S x S")
        name = onnx_metadata.network(engine.metadata) or config.arch
        if config.arch and config.arch != name:
            raise UserError(f"--arch: {config.arch}, but {source} holds {printable(name)}; leave the option out")
        if not name:
            raise UserError("--arch: missing; IN does not say which model it is, name its folder")
        self.path, self.engine, self.spec = source, engine, spec_of(name)
        self.size = engine.metadata.get("image_size") or next(
            (side for side in engine.sample_shape[1:] if isinstance(side, int)), self.spec.input_size
        )
        self.batch = engine.batch or BATCH
        self.proto = int8_graph.raised(proto)
        self.prepared = int8_graph.prepare(self.proto)
        self.layers = [node.name for node in self.prepared.graph.node if node.op_type == "Conv"]

    def normalized(self, pixels_NHWC: np.ndarray) -> np.ndarray:
        images = np.empty((len(pixels_NHWC), 3, self.size, self.size), np.float32)
        for planes, pixels in zip(images, pixels_NHWC, strict=True):
            normalize_into(planes, pixels, self.spec.mean, self.spec.std)
        return images


class _Recorded:
    """A classifier that runs once over a stream and then repeats its logits."""

    def __init__(self, classifier: Callable[[Any], np.ndarray]) -> None:
        self._classifier, self._logits, self._next = classifier, list[np.ndarray](), 0

    def rewind(self) -> None:
        self._next = 0

    def __call__(self, pixels_NHWC: Any) -> np.ndarray:
        if self._next == len(self._logits):
            self._logits.append(self._classifier(pixels_NHWC))
        self._next += 1
        return self._logits[self._next - 1]


def _photographs(root: str, flag: str) -> "FolderIndex":
    """Images of any folder, without labels."""
    from common.data import index
    from common.evaluation import predict

    if not pathlib.Path(root).is_dir():
        raise UserError(f"{flag}: {root} is not a folder")
    paths = predict.list_images(root)
    return index.of_files(paths, [0] * len(paths))


class Search:
    """Tries methods and float layers until the loss is as small as asked for.

    Attributes:
      trials: what was measured, in order; kept in `folder`, so that an interrupted search goes on.
    """

    def __init__(self, network: FloatNetwork, config: QuantizeConfig, folder: pathlib.Path) -> None:
        from common.data import index
        from common.data.transforms import eval_transform

        self._network, self._config, self.folder = network, config, folder
        self.reduce_range = config.reduce_range == "on" or (config.reduce_range == "auto" and not has_vnni())
        train = pathlib.Path(config.data) / "train"
        if not train.is_dir():
            raise UserError(
                f"--data: {config.data} has no train/; quantization calibrates with its images"
                f"{index.how_to_divide(config.data)}"
            )
        calibrating, self._pixels = [index.load_folder(train)], list[np.ndarray]()
        if config.calibration_data:
            calibrating.append(_photographs(config.calibration_data, "--calibration-data"))
        transform = eval_transform(network.spec, network.size)
        for images in calibrating:
            chosen = np.random.default_rng(0).permutation(len(images))[: config.images]
            self._pixels += [transform(images.image(i)) for i in sorted(chosen.tolist())]
        self.num_images = len(self._pixels)
        if network.engine.batch:  # whole batches only
            del self._pixels[self.num_images // network.batch * network.batch :]
        if not self._pixels:
            raise UserError(f"--images: {self.num_images}, but {network.path} is fixed to batches of {network.batch}")
        self.num_images = len(self._pixels)
        evaluated = program.EvalConfig(
            data=config.data, resume=network.path, label_numbers=config.label_numbers, threads=config.threads
        )
        model = program.load_evaluated_model(network.spec, evaluated)
        self._background = network.spec.background_columns(model.num_outputs)
        self._streams = [program.load_index(evaluated, model, self._background)]
        if config.max_drop < (share := 100 / len(self._streams[0])) < 100:
            print(
                f"note: one of the {len(self._streams[0])} images of val/ is {share:.2g} points of top-1, so that "
                f"--max-drop {config.max_drop:g} allows no loss; --max-drop {share + 0.05:.1f} allows one image",
                flush=True,
            )
        if config.agreement_data:
            self._streams.append(_photographs(config.agreement_data, "--agreement-data"))
        self._recorded = [_Recorded(model.classifier) for _ in self._streams]
        self._variants: dict[str, int8_network.Int8Network] = {}
        self._moments = rounding.Moments(network.prepared, self.calibration_batch, self.num_batches)
        self.trials: list[Trial] = []
        self._damage: dict[str, float] = {}
        indexes = (*calibrating, *self._streams)
        content = [pathlib.Path(network.path).read_bytes(), *(each.fingerprint.encode() for each in indexes)]
        settings = (config.images, self.reduce_range, network.size, config.label_numbers)
        digest = hashlib.sha256(repr(settings).encode())
        for part in content:
            digest.update(part)
        self.key = digest.hexdigest()
        files.make_folders(folder, "OUT")
        self._notes = folder / "trials.json"
        try:
            kept = json.loads(self._notes.read_text())
        except (OSError, ValueError):
            kept = {}
        if kept.get("key") == self.key:
            self.trials = [Trial(**each) for each in kept["trials"]]
            self._damage = kept["damage"]
            print(f"{len(self.trials)} trials are kept from before ({self._notes})", flush=True)

    @property
    def num_batches(self) -> int:
        return -(-self.num_images // self._network.batch)

    def images(self, first: int, count: int) -> np.ndarray:
        """Calibration images as the network takes them."""
        return self._network.normalized(np.stack(self._pixels[first : first + count]))

    def calibration_batch(self, number: int) -> np.ndarray:
        return self.images(number * self._network.batch, self._network.batch)

    def run(self) -> Trial:
        """The first trial that meets the limits, else the best one."""
        methods = calibrate.METHODS if self._config.calibration == "all" else (self._config.calibration,)
        found: list[Trial] = []
        for prefix in ("", SCALED):
            variant = self._variant(prefix)
            self._check_equal(variant.proto)
            variant.calibrate(with_histograms=tuple(methods) != ("minmax",))
            found += [self._try(f"{prefix}{method}", []) for method in methods]
            best = min(found, key=self._rank)
            if best.meets(self._config):
                return best
        if self._config.float_fallback:
            for factor in FALLBACK_MARGINS:
                found.append(self._try(best.method, [], factor * best.noise))
                if found[-1].meets(self._config):
                    return found[-1]
            return min(found, key=self._rank)
        order = self._by_damage(best.method)
        count = 1
        while count < len(order):
            trial = self._try(best.method, order[:count])
            if trial.meets(self._config):
                return trial
            found.append(trial)
            count *= 2
        return min(found, key=self._rank)

    def _variant(self, method: str) -> int8_network.Int8Network:
        """The network as it is, or with scaled channels where the name of the method begins so."""
        prefix = SCALED if method.startswith(SCALED) else ""
        if prefix not in self._variants:
            proto, of_tensors = self._network.prepared, channel_scales.Factors()
            if prefix:
                factors = self._factors()
                of_tensors = channel_scales.Channels(proto).of_tensors(factors)
                proto = channel_scales.scaled(proto, factors)
            store = self.folder / prefix.strip()
            self._variants[prefix] = int8_network.Int8Network(
                proto,
                self.calibration_batch,
                self.num_batches,
                store,
                self.key,
                self.reduce_range,
                self._moments,
                of_tensors,
            )
        return self._variants[prefix]

    def _factors(self) -> channel_scales.Factors:
        """Factors of the channels by the calibration images, or those that were kept."""
        store = self.folder / "factors.npz"
        if (kept := int8_network.read_kept(store, self.key)) is not None:
            return kept
        channels = channel_scales.Channels(self._network.prepared)
        factors = channels.factors(self.calibration_batch, self.num_batches)
        int8_network.keep(store, self.key, factors)
        return factors

    def quantized(
        self, method: str, float_layers: Sequence[str], operators: Sequence[str] = int8_network.OPERATORS
    ) -> "onnx.ModelProto":
        """The int8 network; `float_layers` keep their weights, and Gemm is in no `operators`."""
        return self._variant(method).quantized(method.removeprefix(SCALED), float_layers, operators)

    def network(self, method: str, float_layers: Sequence[str], margin: float) -> "onnx.ModelProto":
        """The int8 network, with the float32 one beside it where there is a margin."""
        proto = self.quantized(method, float_layers)
        return float_fallback.joined(proto, self._network.proto, margin) if margin else proto

    def _check_equal(self, proto: "onnx.ModelProto") -> None:
        """A rewritten float graph computes the same as the file."""
        images = self.calibration_batch(0)
        expected, actual = self._network.engine.run(images), _run(proto, images, self._config.threads)
        difference, largest = float(np.abs(actual - expected).max()), float(np.abs(expected).max())
        if not difference <= EQUAL_SHARE * max(1.0, largest):
            raise RunError(f"IN: the graph rewritten for int8 differs by {difference:.3g} of {largest:.3g}")

    def _rank(self, trial: Trial) -> tuple[bool, float, float]:
        return not trial.meets(self._config), -trial.agreement, trial.relative_error

    def _try(self, method: str, float_layers: Sequence[str], margin: float = 0.0) -> Trial:
        """Measure one network, unless that was done before."""
        for trial in self.trials:
            if (trial.method, trial.float_layers, trial.margin) == (method, list(float_layers), margin):
                return trial
        path = self.folder / "trial.onnx"
        import onnx

        onnx.save(self.network(method, float_layers, margin), path)
        engine = engines.OnnxEngine(path, threads=self._config.threads)
        trial = self.measure(engine, method, float_layers, margin)
        print(
            f"tried: {trial.network}: drop {trial.drop:.3f}, agreement {trial.agreements}, "
            f"error {trial.relative_error:.4f}",
            flush=True,
        )
        self.trials.append(trial)
        self._keep()
        return trial

    def measure(
        self, engine: engines.Engine, method: str, float_layers: Sequence[str] = (), margin: float = 0.0
    ) -> Trial:
        """Accuracy and agreement of an engine, compared with the float32 file."""
        classifier = engines.EngineClassifier(engine, self._network.spec)
        errors_N, equal_N = list[np.ndarray](), list[np.ndarray]()

        def observe(_: "Batch", before_NK: np.ndarray, after_NK: np.ndarray) -> None:
            largest_N2 = np.argsort(-before_NK, axis=1, kind="stable")[:, :2]
            error_NK = after_NK - before_NK
            errors_N.append(np.diff(np.take_along_axis(error_NK, largest_N2, axis=1))[:, 0])
            equal_N.append(np.abs(error_NK).max(axis=1) <= SAME_SHARE * np.abs(before_NK).max(axis=1))

        found = [self._compare(stream, classifier, observe) for stream in range(len(self._streams))]
        return Trial(
            method,
            list(float_layers),
            found[0].a.percent(1),
            found[0].b.percent(1),
            found[0].seen,
            sum(each.agreed for each in found),
            sum(each.seen for each in found),
            found[-1].relative_error,
            sum(each.agreed for each in found[1:]),
            sum(each.seen for each in found[1:]),
            margin,
            int(np.concatenate(equal_N).sum()) if margin else 0,
            float(np.sqrt(np.mean(np.concatenate(errors_N) ** 2))),
        )

    def _compare(
        self,
        stream: int,
        classifier: engines.EngineClassifier,
        observe: "Callable[[Batch, np.ndarray, np.ndarray], None]",
    ) -> "Comparison":
        from common.data.loader import EvalLoader
        from common.data.transforms import eval_transform
        from common.evaluation.comparison import compare

        index, network = self._streams[stream], self._network
        workers = parallel.dataloader_workers(self._config.workers, 1)
        self._recorded[stream].rewind()
        loader = EvalLoader(index, eval_transform(network.spec, network.size), 4 * BATCH, "fail", 0, 1, workers, False)
        try:
            return compare(
                lambda batch: self._recorded[stream](batch.pixels_NHWC),
                lambda batch: classifier(batch.pixels_NHWC),
                loader,
                (self._background, self._background),
                self._background,
                observe,
            )
        finally:
            loader.close()

    def _by_damage(self, method: str) -> list[str]:
        """Convolutions, the one first whose quantization alone changes the logits most."""
        from common.progress import Progress

        batches = [self.calibration_batch(i) for i in range(min(DAMAGE_BATCHES, self.num_batches))]
        proto = self._variant(method).proto
        exact = [_run(proto, images, self._config.threads) for images in batches]
        with Progress(len(self._network.layers), "layers") as advance:
            for layer in self._network.layers:
                if layer not in self._damage:
                    others = [each for each in self._network.layers if each != layer]
                    session = engines.cpu_session(self.quantized(method, others, ("Conv",)), self._config.threads)
                    name = session.get_inputs()[0].name
                    error = sum(
                        float(((session.run(None, {name: images})[0] - logits) ** 2).sum())
                        for images, logits in zip(batches, exact, strict=True)
                    )
                    self._damage[layer] = error
                    self._keep()
                advance(1)
        return sorted(self._network.layers, key=lambda layer: -self._damage[layer])

    def _keep(self) -> None:
        trials = [dataclasses.asdict(trial) for trial in self.trials]
        write_atomic(self._notes, json.dumps(dict(key=self.key, trials=trials, damage=self._damage)))


def _run(proto: "onnx.ModelProto", images: np.ndarray, threads: int) -> np.ndarray:
    session = engines.cpu_session(proto, threads)
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def _speed_ratio(before: engines.Engine, after: engines.Engine, batches: Sequence[np.ndarray], pairs: int = 5) -> float:
    """Median of the ratios of time, in turns."""

    def seconds(engine: engines.Engine) -> float:
        start = time.perf_counter()
        for images in batches:
            engine.run(images)
        return time.perf_counter() - start

    seconds(before), seconds(after)
    return statistics.median(seconds(before) / seconds(after) for _ in range(pairs))


def _openvino_line(path: str, images: np.ndarray, logits: np.ndarray) -> str:
    """How far OpenVINO's logits are from ONNX Runtime's, or nothing where it is not installed."""
    if not openvino_engine.is_installed():
        return ""
    # By default it computes in bfloat16 where the processor can.
    model = openvino_engine.core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = model(images)[0]
    share = float(np.abs(found - logits).max() / (np.abs(logits).max() or 1))
    same = int((found.argmax(1) == logits.argmax(1)).sum())
    return (
        f"OpenVINO {importlib.metadata.version('openvino')}: the same top-1 for {same} of {len(images)} images of "
        f"train/, largest difference from ONNX Runtime {share:.1e} of the largest logit"
    )
