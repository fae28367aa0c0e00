"""Command lines: a frozen dataclass declares every option once; argparse, checks and --help are derived from it."""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common.environment import name_user, set_torch_defaults, use_utf8
from common.errors import (
    EXIT_FINAL,
    EXIT_PEER_LOST,
    EXIT_USER_ERROR,
    NothingToDo,
    PeerLost,
    RunError,
    UserError,
    discard_output,
    missing_package,
    print_error,
    print_once,
)

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Errors of the operating system about a file that only the user can mend.
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG)
DEVICES = ("auto", "npu", "cuda", "cpu")  # choices of every --device; auto: npu, then cuda, then cpu
Config = typing.TypeVar("Config", bound="DataclassInstance")


def option(
    default: Any,
    help: str,
    *flags: str,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Sequence[str] | None = None,
    group: str = "options",
    name: str | None = None,
    required: str = "",
    auto: Any = None,
) -> Any:
    """Declare a field of a config dataclass as a command-line option.

    Args:
      default: its value when the flag is absent.
      help: one line, with the unit; range and default are added by --help.
      flags: further spellings of the flag, for example "-b"; `--field-name` always exists.
      low, high: smallest and largest allowed value, inclusive.
      above: exclusive lower bound.
      choices: the allowed words.
      group: heading in --help.
      name: long flag that --help and messages show in place of `--field-name`, which stays valid.
      required: what to give, for the message when the value is empty; empty: the option may be left out.
      auto: value that the word "auto" stands for; None: the option does not take it.
    """
    metadata = dict(
        help=help,
        flags=flags,
        low=low,
        high=high,
        above=above,
        choices=choices,
        group=group,
        name=name,
        required=required,
        auto=auto,
    )
    return dataclasses.field(default=default, metadata=metadata)


def renamed(config_class: "type[DataclassInstance]", field_name: str, name: str, **changes: Any) -> Any:
    """The option of a base dataclass under another long flag, for a subclass that declares the field again.

    Args:
      config_class: dataclass that has the option.
      field_name: its field.
      name: the long flag to show, "--epoch-size"; the old spellings stay valid.
      changes: arguments of `option` that differ, `default` among them.
    """
    field = config_class.__dataclass_fields__[field_name]
    meta = {**field.metadata, "default": field.default, **changes, "name": name}
    return option(meta.pop("default"), meta.pop("help"), *meta.pop("flags"), **meta)


def flag_of(field: "dataclasses.Field[Any]") -> str:
    """The long flag of a dataclass field: its own name for it, else batch_size -> --batch-size."""
    return field.metadata.get("name") or _field_flag(field)


def _field_flag(field: "dataclasses.Field[Any]") -> str:
    return "--" + field.name.replace("_", "-")


def _value_type(field: "dataclasses.Field[Any]", hints: dict[str, Any]) -> type:
    """The scalar type of a field: int for both `int` and `int | None`."""
    kind = hints[field.name]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
    return kind


def _allowed(meta: "types.MappingProxyType[Any, Any]") -> str:
    """The range of an option in words, or an empty string."""
    if meta["choices"]:
        return "one of " + ", ".join(meta["choices"])
    words = {"low": "at least", "above": "above", "high": "at most"}
    limits = " and ".join(f"{word} {meta[key]}" for key, word in words.items() if meta[key] is not None)
    return limits if meta["auto"] is None else f"{limits}, or auto"


def _number_or_auto(kind: type, meta: "types.MappingProxyType[Any, Any]") -> Callable[[str], Any]:
    """argparse's `type` of an option that takes the word auto; the value that stands for it is no number to give."""

    def parse(text: str) -> Any:
        if text == "auto":
            return meta["auto"]
        if (value := kind(text)) == meta["auto"]:
            raise argparse.ArgumentTypeError(f"{text}, must be {_allowed(meta)}")
        return value

    parse.__name__ = kind.__name__
    return parse


def check_ranges(config: "DataclassInstance") -> None:
    """Raise UserError for the first field of a config dataclass that is outside its declared range."""
    for field in dataclasses.fields(config):
        value, meta = getattr(config, field.name), field.metadata
        if value is None or not meta or (meta["auto"] is not None and value == meta["auto"]):
            continue
        wrong = (
            (meta["choices"] and value not in meta["choices"])
            or (meta["low"] is not None and not value >= meta["low"])
            or (meta["above"] is not None and not value > meta["above"])
            or (meta["high"] is not None and not value <= meta["high"])
        )
        if wrong:
            raise UserError(f"{flag_of(field)}: {value}, must be {_allowed(meta)}")


def check_required(config: "DataclassInstance") -> None:
    """Raise UserError for the first field that is declared as required and empty."""
    for field in dataclasses.fields(config):
        if field.metadata.get("required") and getattr(config, field.name) in ("", None):
            raise UserError(f"{flag_of(field)}: missing; give {field.metadata['required']}")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors, and which accepts `_` for `-` in long flags and no abbreviations."""

    def __init__(self, description: str, add_help: bool = True) -> None:
        super().__init__(
            description=description,
            allow_abbrev=False,
            add_help=add_help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            near = difflib.get_close_matches(rest[0].partition("=")[0], self._option_string_actions, n=1, cutoff=0.7)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"{rest[0]}: unknown option; {hint}--help lists them all")
        return known

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        dashed = [_dashed(arg) for arg in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(dashed, namespace)

    def error(self, message: str) -> typing.NoReturn:
        # argparse writes "argument -b/--batch-size: invalid int value: 'x'"; ours starts with the long flag.
        if message.startswith("argument "):
            flags, _, reason = message[len("argument ") :].partition(": ")
            long = [flag for flag in flags.split("/") if flag.startswith("--")] or [flags]
            message = f"{long[0].split()[0]}: {reason}"
        raise UserError(message)


def _dashed(arg: str) -> str:
    """--print_freq=5 -> --print-freq=5; everything that is no long flag stays as it is."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value


def parser_for(config: "DataclassInstance", description: str) -> Parser:
    """A parser with one option per field of a config dataclass instance, whose values are the defaults."""
    parser = Parser(description)
    hints, groups = typing.get_type_hints(type(config)), dict[str, Any]()
    for field in dataclasses.fields(config):
        meta, default = field.metadata, getattr(config, field.name)
        group = groups.get(meta["group"]) or groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        kind, allowed = _value_type(field, hints), _allowed(meta)
        notes = [note for note in (allowed if not meta["choices"] else "", _default_note(kind, default)) if note]
        help_text = (meta["help"] + (f" [{'; '.join(notes)}]" if notes else "")).replace("%", "%%")
        short = [flag for flag in meta["flags"] if not flag.startswith("--")]
        long = [flag_of(field), _field_flag(field), *(flag for flag in meta["flags"] if flag.startswith("--"))]
        flags = [*short, *dict.fromkeys(long)]
        # SUPPRESS: the namespace then holds only what the user gave, so "explicit" can be told from "default".
        options: dict[str, Any] = dict(dest=field.name, default=argparse.SUPPRESS, help=help_text)
        if kind is bool:
            options["action"] = "store_true" if default is False else argparse.BooleanOptionalAction
        else:
            metavar = "{" + ",".join(meta["choices"]) + "}" if meta["choices"] else kind.__name__.upper()
            takes_auto = meta["auto"] is not None
            options.update(type=_number_or_auto(kind, meta) if takes_auto else kind, metavar=metavar)
        group.add_argument(*flags, **options)
    return parser


def _default_note(kind: type, default: Any) -> str:
    if kind is bool:
        return "default on" if default else ""
    return "" if default is None or default == "" else f"default {default}"


def parse(
    defaults: Config, description: str, argv: Sequence[str] | None = None, require: bool = True
) -> tuple[Config, frozenset[str]]:
    """Override a config dataclass instance from the command line.

    Args:
      require: check that options declared as required have a value.
    Returns:
      (config, explicit): the new instance, and the names of the fields that the user gave.
    Raises:
      UserError: unknown option, malformed value, a value outside its range, or a required option that is missing.
    """
    given = vars(parser_for(defaults, description).parse_args(argv))
    config = dataclasses.replace(defaults, **given)
    if require:
        check_required(config)
    return config, frozenset(given)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Body of every program: set torch's environment, and turn an exception into the documented exit status.

    A UserError and a package that is not installed end with status 2 and one line, a RunError with 1 and one line,
    anything else with a traceback.
    """
    use_utf8()
    name_user()
    set_torch_defaults()
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell (`>&-`): the next file would take its descriptor
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115  open until the end
    try:
        yield
        _flush_output()
    except SystemExit as end:
        if not end.code:
            _flush_output()
        raise
    except UserError as error:
        if not error.every_rank or os.environ.get("RANK", "0") == "0":
            print_error(f"error: {error}")
        sys.exit(EXIT_USER_ERROR)
    except NothingToDo as done:
        print(done)
        _flush_output()
    except PeerLost:
        sys.exit(EXIT_PEER_LOST)
    except RunError as error:
        print_error(f"error: {error}")
        sys.exit(EXIT_FINAL if error.is_final and "WORLD_SIZE" in os.environ else 1)
    except ModuleNotFoundError as error:
        if not (message := missing_package(error)):
            raise
        print_once(error, f"error: {message}")
        sys.exit(EXIT_USER_ERROR)
    except BrokenPipeError:  # standard output was closed (`... | head`)
        discard_output()
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            _flush_output("\n")  # where that fails too, standard output is the cause
        elif error.errno in _NO_ACCESS:
            print_error(
                f"error: {error.filename}: {os.strerror(error.errno)}; name another file or folder, or change this one"
            )
            sys.exit(EXIT_USER_ERROR)
        raise
    except KeyboardInterrupt:
        sys.exit(130)


def _flush_output(last: str = "") -> None:
    """Raise SystemExit(1) where standard output cannot take what was printed; the interpreter would end with 120."""
    try:
        sys.stdout.write(last)
        sys.stdout.flush()
    except OSError as error:
        discard_output()
        if not isinstance(error, BrokenPipeError):
            print_error(f"error: standard output: {error.strerror}")
        sys.exit(1)


@contextlib.contextmanager
def rank_exit_on_error() -> Iterator[None]:
    """`exit_on_error` for a program that may be one of several ranks, which then skips Python's own shutdown.

    gloo's threads may still release tensors of the last collective. If one needs the interpreter while it shuts down,
    the C++ runtime aborts, and a training that succeeded would end with status 134.
    """
    if "WORLD_SIZE" not in os.environ:  # torchrun's agent sets it
        with exit_on_error():
            yield
        return
    status: Any = 0
    try:
        with exit_on_error():
            yield
    except SystemExit as end:
        status = end.code or 0
    except BaseException as error:  # noqa: BLE001  print and exit as the interpreter would
        print_once(error)
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)
