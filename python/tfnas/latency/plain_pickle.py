"""Reading pickles of dicts, numbers and strings as data: nothing a file names is imported, nothing in it is run.

The stream of instructions is checked before any of it is followed: only those that build plain data may appear, memo
numbers must fit the file, and tuples may only be the arguments of a dict's constructor. So a file can neither call
anything nor exhaust memory or stack with a few bytes.
"""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
from typing import Any

MAX_BYTES = 64 * 2**20

_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_STRINGS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING")
_CONTAINERS = ("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "MARK")
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_GETS = ("GET", "BINGET", "LONG_BINGET")
_TUPLES = ("EMPTY_TUPLE", "TUPLE", "TUPLE1")
_CALLS = ("GLOBAL", "STACK_GLOBAL", "REDUCE")
_ALLOWED = {"PROTO", "FRAME", "STOP", *_NUMBERS, *_STRINGS, *_CONTAINERS, *_PUTS, *_GETS, *_TUPLES, *_CALLS}

_TYPES = {("collections", "OrderedDict"): collections.OrderedDict, ("builtins", "dict"): dict,
          ("__builtin__", "dict"): dict}  # fmt: skip


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _TYPES:
            raise pickle.UnpicklingError(
                f"it refers to {module}.{name}, and only dicts, lists, numbers and strings are read; the file was "
                "refused and nothing in it was run"
            )
        return _TYPES[module, name]


def load_plain_pickle(data: bytes) -> Any:
    """The dicts, lists, numbers and strings in a pickle of any protocol.

    Raises `pickle.UnpicklingError` for anything else, for damaged or truncated data and beyond `MAX_BYTES`.
    """
    if len(data) > MAX_BYTES:
        raise pickle.UnpicklingError(f"{len(data)} bytes are more than the {MAX_BYTES} that are read")
    try:
        _check_instructions(data)
        return _PlainUnpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:
        # damaged pickles raise nearly anything: EOFError, ValueError, KeyError, IndexError, AttributeError...
        raise pickle.UnpicklingError(f"damaged or truncated ({type(error).__name__}: {error})") from None


def _check_instructions(data: bytes) -> None:
    is_tuple_open = False
    for instruction, argument, position in pickletools.genops(data):
        name = instruction.name
        if name not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"it holds the instruction {name} at byte {position}, and only dicts, lists, numbers and strings are "
                "read; the file was refused and nothing in it was run"
            )
        if name in _PUTS and isinstance(argument, int) and argument >= len(data):
            raise pickle.UnpicklingError(f"memo number {argument} at byte {position} is larger than the file; refused")
        if is_tuple_open and name not in (*_PUTS, "REDUCE"):
            raise pickle.UnpicklingError(f"it holds a tuple before byte {position}; refused")
        is_tuple_open = name in _TUPLES or (is_tuple_open and name in _PUTS)
