"""Fields of reference and result rows, read with their place in the message.

Place in the flow: metrics read rows only through these functions, so that every broken field says where it is and what
it should have been.
"""

from __future__ import annotations

import math
from typing import Any

from mmi_engine.data.manifest import json_type
from mmi_engine.errors import RowError


def text(row: dict[str, Any], *keys: str) -> str:
    """The first of `keys` that the row has, a string (possibly empty).

    Raises:
        RowError: none there, or of another type.
    """
    for key in keys:
        if row.get(key) is not None:
            if not isinstance(row[key], str):
                raise RowError(f'"{key}" must be a string, found {json_type(row[key])}', code="bad_row")
            return str(row[key])
    raise RowError(f"no {names(keys)}", code="bad_row")


def texts(row: dict[str, Any], many: str, one: str) -> list[str]:
    """A non-empty list of strings under `many`, or a single one under `one`."""
    value = row.get(many)
    if value is None and row.get(one) is not None:
        value = [row[one]]
    if value is None:
        raise RowError(f"no {names((many, one))}", code="bad_row")
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise RowError(f'"{many}" must be a list of strings', code="bad_row")
    if not value:
        raise RowError(f'"{many}" is empty', code="bad_row")
    return value


def numbers(row: dict[str, Any], key: str, count: int | None = None) -> list[float]:
    """A list of finite numbers, of a given length if any."""
    value = row.get(key)
    if value is None:
        raise RowError(f'no "{key}"', code="bad_row")
    good = isinstance(value, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
    if not good or not all(math.isfinite(v) for v in value):
        raise RowError(f'"{key}" must be a list of finite numbers', code="bad_row")
    if count is not None and len(value) != count:
        raise RowError(f'"{key}" must hold {count} numbers, found {len(value)}', code="bad_row")
    return [float(v) for v in value]


def meta(row: dict[str, Any], key: str) -> Any:
    """A field of the row, or else of its ``meta``; None where neither has it."""
    value = row.get(key)
    inner = row.get("meta")
    return inner.get(key) if value is None and isinstance(inner, dict) else value


def names(keys: tuple[str, ...]) -> str:
    """``"a"`` or ``"a" or "b"``."""
    return " or ".join(f'"{key}"' for key in keys)
