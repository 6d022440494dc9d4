"""Reading files of the user within bounds: ValueError for a file that is larger or nested deeper."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any, NoReturn

MOST_BYTES = 2**28
"""Largest size of a data file, packed and unpacked."""
MOST_TEXT = 2**24
"""Largest size of a JSON file or a list of names."""
DEEPEST = 32
"""Deepest nesting of lists and objects in JSON."""


def read(path: Path, most: int) -> bytes:
    """Return the content of a file of at most ``most`` bytes."""
    with path.open("rb") as file:
        return _bounded(file, most, f"{path} has")


def unpacked(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return the content of a file, unpacked if it is gzipped; packed and unpacked at most ``most`` bytes."""
    content = read(path, most)
    if content[:2] != b"\x1f\x8b":
        return content
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            return _bounded(file, most, f"{path} unpacks to")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated gzip file ({error})") from error


def _bounded(file: Any, most: int, start: str) -> bytes:
    content: bytes = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{start} more than {most} bytes")
    return content


def read_json(path: Path, most: int = MOST_TEXT) -> Any:
    """Return the content of a JSON file with finite numbers, integers of 64 bits, and nesting of at most `DEEPEST`."""
    return parse_json(read(path, most), path)


def parse_json(content: bytes, path: Path) -> Any:
    """Return `read_json` of ``content``, the bytes that were read from ``path``."""
    try:
        value = json.loads(content.decode(), parse_int=_integer, parse_float=_finite, parse_constant=_refuse)
        if _deeper(value, DEEPEST):
            raise RecursionError
    except RecursionError:
        raise ValueError(f"{path} is nested deeper than {DEEPEST}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    return value


def _deeper(value: Any, levels: int) -> bool:
    """Return whether lists and objects are nested on more than ``levels`` levels, without recursion."""
    nested = [value]
    for _ in range(levels + 1):
        nested = [x for v in nested if isinstance(v, (dict, list)) for x in (v.values() if isinstance(v, dict) else v)]
    return bool(nested)


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        _refuse(text)
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) < float("inf") else _refuse(text)


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{shown(text, 40)} is no finite number of 64 bits")


def shown(text: object, most: int = 500) -> str:
    """Return ``text`` for a message: at most ``most`` characters, with escapes for characters that do not print."""
    whole = str(text)
    cut = whole if len(whole) <= most else whole[:most] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
