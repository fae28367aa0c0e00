"""Class names for people: those of a model file, or of --class-names."""

import json
import re
from collections.abc import Sequence
from typing import Any

from common.errors import UserError
from common.files import StrPath, read_text

_SYNSET_LINE = re.compile(r"(n\d{8})\s+(\S.*)")  # of synset_words.txt
_EXPECTED = (
    "expected one name per line, a JSON list of names, or a class_index.json {index: [synset, name]}, {index: name}, "
    "{name: index} or {synset: name}"
)


def names(stored: Sequence[str] | None, num_classes: int, path: StrPath = "") -> list[str]:
    """One name per class.

    Args:
      stored: the model's names, which are those of its class folders; None where it has none.
      num_classes: without a background class.
      path: value of --class-names; its names replace synsets among the stored ones, or else count in its own order.
    Returns:
      the file's names, else the model's, else ImageNet's for 1000 classes and numbers otherwise.
    Raises:
      UserError: a file of another form, or of another number of classes.
    """
    if path:
        return _from_file(path, stored, num_classes)
    if stored or num_classes != 1000:
        found = list(stored or [])
        return found + [f"class {k}" for k in range(len(found), num_classes)]
    from torchvision.models import ResNet50_Weights

    return ResNet50_Weights.DEFAULT.meta["categories"]


def _from_file(path: StrPath, stored: Sequence[str] | None, num_classes: int) -> list[str]:
    try:
        text = read_text(path)
        text.encode()
    except OSError as error:
        raise UserError(f"--class-names: {path} cannot be read ({error.strerror})") from error
    except UnicodeError as error:
        raise UserError(f"--class-names: {path} is neither UTF-8 nor UTF-16 text; {_EXPECTED}") from error
    if text.lstrip().startswith(("{", "[")):
        try:
            ordered, by_synset = _parse(json.loads(text))
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(f"--class-names: {path} is JSON of another form; {_EXPECTED}") from error
    else:
        lines = text.strip().splitlines()
        pairs = [(match[1], match[2]) for line in lines if (match := _SYNSET_LINE.fullmatch(line.strip()))]
        by_synset = dict(pairs) if len(pairs) == len(lines) else {}
        ordered = [name for _, name in pairs] if by_synset else [line.strip() for line in lines]
    if stored and all(name in by_synset for name in stored):
        return names([by_synset[name] for name in stored], num_classes)
    if len(ordered) != num_classes:
        raise UserError(f"--class-names: {path} names {len(ordered)} classes, the model has {num_classes}")
    if stored and ordered != [*stored] and sorted(ordered) == sorted(stored):
        raise UserError(
            f"--class-names: {path} has the names of the model's classes in another order; leave the option out"
        )
    return ordered


def _parse(content: Any) -> tuple[list[str], dict[str, str]]:
    """(names in the order of their indices, {synset: name}) of a JSON file.

    Raises:
      ValueError, TypeError, LookupError: none of the known forms.
    """
    if isinstance(content, list):
        content = dict(enumerate(content))
    elif all(isinstance(value, int) for value in content.values()):
        content = {index: name for name, index in content.items()}
    elif not all(key.isdecimal() for key in content):
        return [_text(name) for name in content.values()], {key: _text(name) for key, name in content.items()}
    entries = [{int(key): value for key, value in content.items()}[k] for k in range(len(content))]
    pairs = [entry if isinstance(entry, list) else [entry, entry] for entry in entries]
    return [_text(pair[-1]) for pair in pairs], {_text(pair[0]): _text(pair[-1]) for pair in pairs}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value
