"""A folder that timm opens (`timm.create_model("local-dir:FOLDER")`) and the Hugging Face hub shows."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from common.errors import UserError
from common.files import StrPath, atomic_folder, is_empty
from common.spec import HALF_RANGE, ModelSpec
from common.weights.convert import Conversion, check_same_logits, fitted, write_safetensors
from common.weights.load import HUB_WEIGHTS, load_model

_ROW = ("stage", "device", "devices", "batch_size", "epochs", "acc1", "acc5", "source")


def write(
    source: StrPath, folder: StrPath, spec: ModelSpec, results: StrPath, use_ema: bool | None = None
) -> Conversion:
    """Write model.safetensors, config.json and README.md (a model card) to a new or empty folder.

    Args:
      results: the model's results.json.
      use_ema: see common.weights.load.read_checkpoint.
    Raises:
      UserError: see load_model; timm does not build the network; the folder holds something.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or not is_empty(folder)):
        raise UserError(f"{folder}: exists and is not an empty folder; name a new one")
    model, meta = load_model(source, spec, use_ema)
    build = dict(meta["build"])
    half_range = build.pop("transform_input", False)  # the configuration states mean and std instead
    state_dict, fitting, notes = fitted(
        dict(model.state_dict()),
        {**meta, "build": build},
        "hub",
        spec,
        f"{folder}: not written, {spec.name} in {source}",
    )
    build = {**meta["build"], **fitting}
    state_dict = {
        name: tensor for name, tensor in state_dict.items() if not name.startswith(spec.training_modules or "\0")
    }
    if "aux" in build:
        build["aux"] = False
    config = _config(spec, meta, half_range)
    with atomic_folder(folder) as draft:
        write_safetensors(draft / HUB_WEIGHTS, state_dict, spec, {**meta, "build": build})
        refused = f"{folder}: not written, its logits differ from those of {source}"
        difference = check_same_logits(model, draft / HUB_WEIGHTS, spec, meta["image_size"], refused)
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (draft / "README.md").write_text(_card(spec, config, meta, pathlib.Path(results)), encoding="utf-8")
    return Conversion(meta["format"], "hub", build, difference, meta["taken"], notes)


def crop_pct(side: int, resize: int) -> float:
    """The share from which timm computes the short side after the resize: floor(side / crop_pct)."""
    share = side / resize
    return share if math.floor(side / share) == resize else math.nextafter(share, 0.0)


def _config(spec: ModelSpec, meta: Mapping[str, Any], half_range: bool) -> dict[str, Any]:
    """timm's config.json."""
    side = meta["image_size"]
    mean, std = HALF_RANGE if half_range else (spec.mean, spec.std)
    config: dict[str, Any] = {
        "architecture": spec.timm_name,
        "num_classes": meta["num_classes"],
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": crop_pct(side, spec.resize_for(side)),
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": meta["num_classes"],
            "classifier": spec.classifiers[0],
        },
    }
    if meta["classes"] and len(meta["classes"]) == meta["num_classes"]:
        config["label_names"] = list(meta["classes"])
    return config


def training_facts(meta: Mapping[str, Any]) -> list[str]:
    """What a checkpoint of a run says of its training, one line each; none for other files."""
    config = meta.get("config")
    if not config:
        return []
    data = f"{meta['num_images']} images" if meta.get("num_images") else "images"
    facts = [f"trained on {data} of {len(meta['classes'] or ())} classes, {config['image_size']} pixels"]
    start = pathlib.Path(config["pretrained"]).name if config.get("pretrained") else "random weights"
    done = f"{meta['epoch']} of {config['epochs']} epochs"
    facts.append(f"recipe {config['recipe']} from {start}, seed {config['seed']}, {done}")
    if meta.get("best_epoch"):
        own = meta["best_epoch"] == meta["epoch"] and not meta["step"]
        whose = "these weights" if own else f"the run in epoch {meta['best_epoch']}, not of these weights"
        facts.append(f"best validation top-1: {meta['best_acc1']:.3f} %, of {whose}")
    if meta.get("weights") == "ema":
        facts.append(f"averaged weights, decay {config['ema']}")
    return facts


def _card(spec: ModelSpec, config: Mapping[str, Any], meta: Mapping[str, Any], results: pathlib.Path) -> str:
    """Model card: what the checkpoint says about itself, how to open it, published results of the network."""
    front = "---\ntags:\n- image-classification\n- timm\nlibrary_name: timm\n---\n"
    side = meta["image_size"]
    facts = [
        f"{meta['num_classes']} classes, images of {side} x {side} pixels, mean {config['pretrained_cfg']['mean']}"
    ]
    facts += training_facts(meta)
    rows = json.loads(results.read_text(encoding="utf-8")) if results.exists() else []
    table = [" | ".join(["", *_ROW, ""]).strip(), "|---" * len(_ROW) + "|"]
    for row in rows:
        values = ("-" if row.get(key) is None else str(row[key]) for key in _ROW)
        table.append(f"| {' | '.join(values)} |")
    facts_text = "\n".join(f"* {fact}" for fact in facts)
    return (
        f"{front}\n# {spec.name}\n\n{facts_text}\n\n"
        '```python\nimport timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n```\n\n'
        "## Results of the network\n\nNot of these weights, unless they are the published ones.\n\n"
        + "\n".join(table)
        + "\n"
    )
