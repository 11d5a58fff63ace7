"""Files that are never half written, readers whose errors name the file, and names as text."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

# What `write_bytes_atomically` calls its files: a dot, the final name, eight characters of `tempfile`, `.tmp`.
_TEMPORARY_NAME = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """`write_bytes_atomically` of UTF-8 `text`."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` so that `path` holds either its old content or all of the new one, whenever the process dies.

    The parent folder must exist. A link stays, and what it points to is written; a device or a pipe (`/dev/stdout`) is
    written to, not replaced. An `OSError` names `path`.
    """
    try:
        if _is_standard_output(path):
            with open(1, "wb", closefd=False) as output:  # at its own place, whatever else is printed
                output.write(data)
        elif os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as device:
                device.write(data)
        else:
            _replace(Path(os.path.realpath(path)), data)
    except OSError as error:
        error.filename = os.fspath(path)
        del error.filename2  # the temporary file's, which None would show as "-> None"
        raise


def _is_standard_output(path: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:
        return False


def _replace(target: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a result is as readable as any other file its user writes
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what writers of files in `folder` left behind when they were killed. Only where none is at work."""
    for path in list(folder.iterdir()):
        if _TEMPORARY_NAME.fullmatch(path.name) and path.is_file():
            path.unlink()


def read_json(path: str | os.PathLike[str]) -> object:
    """Parse a UTF-8 JSON file. A `ValueError` names the file and the line for anything that is not JSON."""
    data = Path(path).read_bytes()
    try:
        value: object = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
        if b"\\ud" in data.lower() and not is_text(json.dumps(value, ensure_ascii=False)):
            raise ValueError("an escape stands for half a character")
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON, perhaps truncated ({error})") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number JSON knows")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} appears twice")
        result[key] = value
    return result


def shown(path: str | bytes | os.PathLike[str]) -> str:
    """`path` as printable text: bytes that are not UTF-8 become `\\xNN`, so that no message or file fails on a name."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_text(value: str) -> bool:
    """Whether `value` can be a name in a file written as UTF-8.

    Not with a NUL, which ends names, nor with lone surrogates, as which Python keeps the bytes of a name that is not
    text.
    """
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value)
