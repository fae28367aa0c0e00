"""Files that appear whole or not at all, places that one program at a time may write, text files of any encoding."""

import codecs
import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from typing import IO

from common.errors import UserError

StrPath = str | os.PathLike[str]


@contextlib.contextmanager
def atomic_path(target: StrPath, suffix: str = ".tmp") -> Iterator[pathlib.Path]:
    """Path of a draft beside `target`, which takes its place at the end of the block.

    An exception in the block removes the draft and leaves `target` as it was. A killed process leaves the draft; the
    next writer of the same `target` overwrites it.

    Args:
      target: file to write or to replace. Where several processes may write it at once, see `claimed`.
      suffix: appended to the name of `target`.
    Raises:
      OSError: of the block; it names `target` where it named the draft, or no file and the disk is full.
    """
    draft = pathlib.Path(f"{os.fspath(target)}{suffix}")
    try:
        yield draft
        os.replace(draft, target)
    except OSError as error:
        _name_target(error, draft, target)
        raise
    finally:  # also after os.replace, which does nothing where draft and target are hard links to one file
        with contextlib.suppress(OSError):
            os.unlink(draft)


def _name_target(error: OSError, draft: pathlib.Path, target: StrPath) -> None:
    """Name in an error what the user asked for: write() names no file where the disk is full, open() the draft."""
    is_draft = error.filename is not None and pathlib.Path(os.fsdecode(error.filename)).is_relative_to(draft)
    if not is_draft and (error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT)):
        return
    status = os.statvfs(existing_folder(draft))  # the full disk may be that of standard output
    if is_draft or error.errno == errno.EDQUOT or status.f_bavail * status.f_frsize < 1 << 20:
        error.filename = os.fspath(target)


@contextlib.contextmanager
def atomic_folder(target: StrPath, suffix: str = ".incomplete") -> Iterator[pathlib.Path]:
    """Path of a new folder beside `target`, which becomes it at the end of the block.

    An exception in the block removes the new folder and leaves `target` as it was.

    Args:
      target: absent, or an empty folder, which stays and gets the files.
      suffix: appended to the name of `target`.
    """
    target = pathlib.Path(target).absolute()
    draft = target.with_name(f"{target.name}{suffix}")
    shutil.rmtree(draft, ignore_errors=True)  # of a killed process
    draft.mkdir(parents=True)
    try:
        yield draft
        if target.is_dir():
            for path in draft.iterdir():
                shutil.move(path, target / path.name)
        else:
            draft.rename(target)
    except OSError as error:
        _name_target(error, draft, target)
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_atomic(
    target: StrPath,
    *parts: str | bytes | memoryview,
    mode: int = 0o666,
    mtime_ns: int | None = None,
    suffix: str = "",
) -> None:
    """Write the parts, text as UTF-8, one after the other; of several processes at once, the last one's file stays.

    Args:
      target: file to write or to replace.
      mode: permissions of a new file, before the umask.
      mtime_ns: modification time to give to the file.
      suffix: see `atomic_path`; default: one that no other process has.
    Raises:
      OSError: the disk is full or the folder cannot be written; `target` is as it was.
    """
    with atomic_path(target, suffix or f".{secrets.token_hex(8)}.tmp") as draft:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        try:
            for part in parts:
                view = memoryview(part.encode(errors="surrogateescape") if isinstance(part, str) else part)
                view = view.cast("B") if view.nbytes else memoryview(b"")
                while view:  # a raw write may stop short on a full disk without an error; the next one says why
                    view = view[os.write(descriptor, view) :]
            if mtime_ns is not None:
                os.utime(descriptor, ns=(mtime_ns, mtime_ns))
        finally:
            os.close(descriptor)


_CLAIM = ".lock"


@contextlib.contextmanager
def claimed(target: StrPath, flag: str) -> Iterator[None]:
    """Keep other programs from writing a file or a folder until the end of the block.

    The claim is the kernel's lock on the file TARGET.lock, for a folder that exists FOLDER/.lock, which is removed at
    the end. A killed process leaves the file, not the lock. Where the file cannot be made (the parent of `target` does
    not exist yet), the block runs without a claim.

    Args:
      flag: of `target`, for the message.
    Raises:
      UserError: another process has claimed it, or it cannot be written to.
    """
    check_writable(target, flag)
    path = os.path.join(target, _CLAIM) if os.path.isdir(target) else f"{os.fspath(target)}{_CLAIM}"
    try:
        file = _claim(path)
    except BlockingIOError as error:
        raise UserError(
            f"{flag}: {os.fspath(target)} is being written by another program; wait for its end, or name another place"
        ) from error
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)
            file.close()


@contextlib.contextmanager
def claimed_file(target: StrPath, flag: str) -> Iterator[None]:
    """`claimed` for a file, whose folder is created, and removed again where the block raises and leaves it empty.

    Raises:
      UserError: see `claimed`; `target` is a folder, or its folder cannot be created.
    """
    check_file(target, flag)
    folder = pathlib.Path(target).absolute().parent
    existing = existing_folder(folder)
    make_folders(folder, flag)
    try:
        with claimed(target, flag):
            yield
    except BaseException:
        with contextlib.suppress(OSError):
            while folder != existing:
                folder.rmdir()
                folder = folder.parent
        raise


def _claim(path: str) -> IO[str] | None:
    """The open file with this process's lock on it, or None where it cannot be made."""
    while True:
        try:
            # 0o644: ais_bench refuses folders with files that others may write.
            file = open(path, "a", opener=lambda name, flags: os.open(name, flags, 0o644))  # noqa: SIM115
        except OSError:
            return None
        if not lock(file):
            file.close()
            raise BlockingIOError
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file
        file.close()  # the one that had it has removed it since


def lock(file: IO[str]) -> bool:
    """Take the kernel's lock on an open file; whether no other process has it.

    It lasts until the file is closed or this process ends, whatever ends it. Without locks in a file system, every
    process gets it.
    """
    os.register_at_fork(after_in_child=file.close)  # a child that outlives this process must not keep the lock
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        pass
    return True


def is_empty(folder: StrPath) -> bool:
    """Whether a folder holds nothing, or what `claimed` and a `write_atomic` that was killed leave."""
    return all(re.fullmatch(r".*\.lock|.*\.[0-9a-f]{16}\.tmp", name) for name in os.listdir(folder))


def make_folders(folder: StrPath, flag: str, mode: int = 0o777) -> None:
    """Create a folder and its parents with these permissions; os.makedirs gives its `mode` to the last folder only.

    Raises:
      UserError: it cannot be created; the message begins with `flag`.
    """
    parent = os.path.dirname(os.path.abspath(folder))
    if not os.path.isdir(parent):
        make_folders(parent, flag, mode)
    try:
        os.makedirs(folder, mode, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag}: {os.fspath(folder)} cannot be created ({error.strerror})") from error


def read_text(path: StrPath) -> str:
    r"""Text of a file that a user wrote, with "\n" between lines.

    UTF-8, or UTF-16 with a byte order mark, as Windows' editors write it. Bytes that are no UTF-8 become surrogates, as
    in file names.

    Raises:
      OSError: the file cannot be read.
      UnicodeError: UTF-16 without a byte order mark, or damaged.
    """
    content = pathlib.Path(path).read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = content.decode("utf-16")
    else:
        text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    if "\0" in text:
        raise UnicodeError("it holds zero bytes, as UTF-16 without a byte order mark does; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def existing_folder(path: StrPath) -> pathlib.Path:
    """`path`, or the nearest folder above it that exists."""
    folder = pathlib.Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def sha256(path: StrPath) -> str:
    """Hash of a file's content, which is not kept in memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def check_writable(path: StrPath, flag: str) -> None:
    """Check that a file or folder can be made, before the work whose result it will hold.

    Raises:
      UserError: the nearest folder above it that exists cannot be written to.
    """
    target = pathlib.Path(path).absolute()
    folder = existing_folder(target if target.is_dir() else target.parent)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{flag}: {folder} cannot be written to; name a place elsewhere")


def check_file(path: StrPath, flag: str) -> None:
    """check_writable for a file.

    Raises:
      UserError: it is a folder, or its place cannot be written to.
    """
    if os.path.isdir(path):
        raise UserError(f"{flag}: {os.fspath(path)} is a folder; name a file")
    check_writable(path, flag)


def check_distinct(target: StrPath, flag: str, inputs: Mapping[str, StrPath]) -> None:
    """Raise UserError where a file to write is one that the program reads, which would be lost.

    Args:
      flag: that names the file to write; where `target` is empty, nothing is written.
      inputs: flag or name -> path; those that do not exist, or are words such as `torchvision`, are left out.
    """
    if not os.path.exists(target):
        return
    for name, path in inputs.items():
        if os.path.exists(path) and os.path.samefile(path, target):
            raise UserError(f"{flag}: {os.fspath(target)} is {name}; name another file")


def sync_folder(folder: StrPath) -> None:
    """fsync a folder: the renames in it survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
