"""Command lines: one frozen dataclass declares every option once; argparse, checks and --help are derived from it."""

import argparse
import contextlib
import dataclasses
import difflib
import os
import sys
import traceback
import types
import typing

from common.environment import set_torch_defaults
from common.errors import EXIT_USER_ERROR, RunError, UserError


def option(default, help, *flags, low=None, high=None, above=None, choices=None, group="options", name=None):
    """A field of a config dataclass.

    Args:
      default: its value when the flag is absent.
      help: one line, with the unit; range and default are added by --help.
      flags: further spellings of the flag, for example "-b"; `--field-name` always exists. A first spelling that
        starts with a single dash and more than one letter is not supported.
      low, high: smallest and largest allowed value, inclusive.
      above: exclusive lower bound.
      choices: the allowed words.
      group: heading in --help.
      name: long flag that --help and messages show in place of `--field-name`, which stays valid.
    """
    metadata = dict(help=help, flags=flags, low=low, high=high, above=above, choices=choices, group=group, name=name)
    return dataclasses.field(default=default, metadata=metadata)


def renamed(config_class, field_name, name, **changes):
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


def flag_of(field):
    """The long flag of a dataclass field: its own name for it, else batch_size -> --batch-size."""
    return field.metadata.get("name") or _field_flag(field)


def _field_flag(field):
    return "--" + field.name.replace("_", "-")


def _value_type(field, hints):
    """The scalar type of a field: int for both `int` and `int | None`."""
    kind = hints[field.name]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
    return kind


def _allowed(meta):
    """The range of a option in words, or an empty string."""
    if meta["choices"]:
        return "one of " + ", ".join(meta["choices"])
    bounds = []
    if meta["low"] is not None:
        bounds.append(f"at least {meta['low']}")
    if meta["above"] is not None:
        bounds.append(f"above {meta['above']}")
    if meta["high"] is not None:
        bounds.append(f"at most {meta['high']}")
    return " and ".join(bounds)


def check_ranges(config):
    """Raise UserError for the first field of a config dataclass that is outside its declared range."""
    for field in dataclasses.fields(config):
        value, meta = getattr(config, field.name), field.metadata
        if value is None or not meta:
            continue
        wrong = (
            (meta["choices"] and value not in meta["choices"])
            or (meta["low"] is not None and not value >= meta["low"])
            or (meta["above"] is not None and not value > meta["above"])
            or (meta["high"] is not None and not value <= meta["high"])
        )
        if wrong:
            raise UserError(f"{flag_of(field)}: {value}, must be {_allowed(meta)}")


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors, and which takes `_` for `-` in long flags and no abbreviations."""

    def __init__(self, description):
        super().__init__(
            description=description,
            allow_abbrev=False,
            add_help=True,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_args(self, args=None, namespace=None):
        known, rest = self.parse_known_args(
            [_dashed(arg) for arg in (sys.argv[1:] if args is None else args)], namespace
        )
        if rest:
            near = difflib.get_close_matches(rest[0].partition("=")[0], self._option_string_actions, n=1, cutoff=0.7)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"{rest[0]}: unknown option; {hint}--help lists them all")
        return known

    def error(self, message):
        # argparse writes "argument -b/--batch-size: invalid int value: 'x'"; ours starts with the long flag.
        if message.startswith("argument "):
            flags, _, reason = message[len("argument ") :].partition(": ")
            long = [flag for flag in flags.split("/") if flag.startswith("--")] or [flags]
            message = f"{long[0].split()[0]}: {reason}"
        raise UserError(message)


def _dashed(arg):
    """--print_freq=5 -> --print-freq=5; everything that is no long flag stays as it is."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return name.replace("_", "-") + equals + value


def parser_for(recipe, description):
    """An argparse parser with one option per field of the dataclass instance `recipe`, whose values are the defaults."""
    parser = Parser(description)
    hints, groups = typing.get_type_hints(type(recipe)), {}
    for field in dataclasses.fields(recipe):
        meta, default = field.metadata, getattr(recipe, field.name)
        group = groups.get(meta["group"]) or groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        kind, allowed = _value_type(field, hints), _allowed(meta)
        notes = [note for note in (allowed if not meta["choices"] else "", _default_note(kind, default)) if note]
        help_text = (meta["help"] + (f" [{'; '.join(notes)}]" if notes else "")).replace("%", "%%")
        short = [flag for flag in meta["flags"] if not flag.startswith("--")]
        long = [flag_of(field), _field_flag(field), *(flag for flag in meta["flags"] if flag.startswith("--"))]
        flags = [*short, *dict.fromkeys(long)]
        # SUPPRESS: the namespace then holds only what the user gave, so "explicit" can be told from "default".
        options = dict(dest=field.name, default=argparse.SUPPRESS, help=help_text)
        if kind is bool:
            options["action"] = "store_true" if default is False else argparse.BooleanOptionalAction
        else:
            options.update(
                type=kind, metavar="{" + ",".join(meta["choices"]) + "}" if meta["choices"] else kind.__name__.upper()
            )
        group.add_argument(*flags, **options)
    return parser


def _default_note(kind, default):
    if kind is bool:
        return "default on" if default else ""
    return "" if default is None or default == "" else f"default {default}"


def parse(recipe, description, argv=None):
    """Override the dataclass instance `recipe` from the command line.

    Returns:
      (config, explicit): the new instance, and the frozenset of field names the user gave.
    Raises:
      UserError: unknown option, malformed value or a value outside its range.
    """
    given = vars(parser_for(recipe, description).parse_args(argv))
    return dataclasses.replace(recipe, **given), frozenset(given)


@contextlib.contextmanager
def exits():
    """Turn the end of a program into its exit status: 2 and one line for a user's mistake, a traceback otherwise."""
    set_torch_defaults()
    try:
        yield
    except UserError as error:
        if not error.every_rank or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output is gone (`... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@contextlib.contextmanager
def rank_exits():
    """`exits` for a program that may be one rank of several: such a rank then leaves without Python's own shutdown.

    gloo's threads may still be releasing the tensors of the last collective. One that needs Python while Python shuts
    down makes the C++ runtime abort, and a training that is done would end with status 134.
    """
    if "WORLD_SIZE" not in os.environ:  # torchrun's agent sets it
        with exits():
            yield
        return
    status = 0
    try:
        with exits():
            yield
    except SystemExit as end:
        status = end.code or 0
    except BaseException:  # noqa: BLE001  prints what Python would, and ends as Python would
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
