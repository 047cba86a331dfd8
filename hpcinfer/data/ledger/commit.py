"""How a file comes into being in a run directory: whole, durable, and under a name that nobody else uses.

Readers see a file by its final name only after all of its bytes are on disk: temporary name with O_EXCL, write, fsync,
close, rename, fsync of the folder. Killed between any two of these calls, a writer leaves at most a temporary file,
which no reader looks at.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path

from hpcinfer.errors import RunDirectoryError

TEMPORARY_PREFIX = ".tmp-"
# Troubles of the storage that may pass: full, over quota, a server away, a device error on one write.
TRANSIENT_ERRNOS = frozenset(
    (
        errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN,
        errno.ENOTCONN, errno.EHOSTDOWN, errno.ESHUTDOWN, errno.ENOLCK, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
        errno.EREMOTEIO,
    )
)
# What file systems without hard links answer to link().
_NO_LINKS = frozenset((errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK, errno.EINVAL))


def is_transient(error: OSError) -> bool:
    """Whether trying again later may help."""
    return error.errno in TRANSIENT_ERRNOS


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Writes every byte; a write may take fewer than it is given (signals, nearly full disks)."""
    view = memoryview(data)
    while view:
        written = os.write(descriptor, view)
        if written <= 0:
            raise OSError(errno.EIO, "write() took no bytes")
        view = view[written:]


def create_new(path: Path) -> int:
    """A descriptor of a new file, open for writing. Raises FileExistsError, OSError."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def fsync_folder(folder: Path) -> None:
    """Makes names in the folder durable. File systems that cannot fsync a folder (EINVAL) do it with the file."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


def temporary_path(folder: Path, name: str) -> Path:
    """A name that no reader looks at and no other process draws; it keeps `name`, so that its owner can be told."""
    return folder / f"{TEMPORARY_PREFIX}{name}.{os.getpid()}.{os.urandom(4).hex()}"


def _write_temporary(folder: Path, name: str, data: bytes, *, durable: bool) -> Path:
    temporary = temporary_path(folder, name)
    descriptor = create_new(temporary)
    try:
        try:
            write_all(descriptor, data)
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        remove_quietly(temporary)
        raise
    return temporary


def remove_quietly(path: Path) -> None:
    """Removes a file of our own; that it cannot be removed must not hide the error that led here."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def commit_bytes(folder: Path, name: str, data: bytes) -> None:
    """Commits `data` as `folder/name`. When it returns the bytes and the name are on disk.

    After an error (OSError) nothing is counted, and calling again with the same arguments is right: a file of that
    name and content, left by an attempt whose last call failed, is taken as it is. The caller owns the name (it holds
    its writer id).

    Raises OSError; RunDirectoryError where another file has that name.
    """
    final = folder / name
    if final.exists():
        if final.read_bytes() != data:
            raise RunDirectoryError(
                f"{final} exists with another content",
                found=f"{final.stat().st_size} bytes there, {len(data)} to write",
                fix="two writers share an id: was the run directory copied while it was in use?",
            )
        _fsync_file(final)
    else:
        temporary = _write_temporary(folder, name, data, durable=True)
        try:
            os.rename(temporary, final)
        except OSError:
            remove_quietly(temporary)
            raise
    fsync_folder(folder)


def _fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_bytes(folder: Path, name: str, data: bytes, *, durable: bool = False, owner: str = "") -> None:
    """Puts `data` in the place of `folder/name`: readers see the old or the new content, never a mixture. `owner`, a
    writer id, goes into the temporary name where `name` does not hold it. Raises OSError.
    """
    temporary = _write_temporary(folder, f"{owner}{name}", data, durable=durable)
    try:
        os.replace(temporary, folder / name)
    except OSError:
        remove_quietly(temporary)
        raise
    if durable:
        fsync_folder(folder)


def create_exclusive(folder: Path, name: str, data: bytes) -> None:
    """Creates `folder/name` with its content at once and durably; of several callers one succeeds.

    Raises FileExistsError to the others; OSError.
    """
    temporary = _write_temporary(folder, name, data, durable=True)
    try:
        _link_exclusive(temporary, folder / name, data)
    finally:
        remove_quietly(temporary)
    fsync_folder(folder)


def _link_exclusive(temporary: Path, final: Path, data: bytes) -> None:
    try:
        os.link(temporary, final)
    except FileExistsError:
        # NFS may answer EEXIST to the repetition of a link() that had worked: the link count tells (open(2)).
        if os.stat(temporary).st_nlink != 2:
            raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # Without hard links the name appears before its content; readers of such files wait for it.
        descriptor = create_new(final)
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def claim_name(folder: Path, name: str, owner: str, identity: Path) -> bool:
    """Creates `folder/name`, unless it exists, as a hard link to the `identity` file of `owner` (a JSON object with
    an "id"). Returns whether the name is now this owner's.

    A link comes into being with its content, in one call, and takes no inode: no kill leaves a claim that names
    nobody. Where links are not possible the file is created with O_EXCL and the id written into it. Not durable: a
    claim that a power cut takes away costs work done twice, no more. Raises OSError.
    """
    try:
        os.link(identity, folder / name)
        return True
    except FileExistsError:
        # The answer to a repeated NFS request says EEXIST for what the first one created: read before deciding.
        return read_owner(folder, name) == owner
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:
        descriptor = create_new(folder / name)
    except FileExistsError:
        return read_owner(folder, name) == owner
    try:
        write_all(descriptor, json.dumps({"id": owner}).encode())
    except OSError as error:
        # The name is taken, which is what counts. Others see a claim without an owner, and take it over after a while.
        if not is_transient(error):
            raise
    finally:
        os.close(descriptor)
    return True


def read_owner(folder: Path, name: str) -> str | None:
    """The owner in a claim file; "" where none is written (yet); None where there is no such file. Raises OSError."""
    try:
        facts = json.loads((folder / name).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return ""
    return str(facts.get("id", "")) if isinstance(facts, dict) else ""
