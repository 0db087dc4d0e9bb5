"""JSON that can be read and written again: no NaN, no infinity, no half of a surrogate pair, no bottomless nesting.

Place in the flow: `manifest.py` reads its lines and `tables.py` the cells of a table with it.
"""

from __future__ import annotations

import json
from typing import Any

from mmi_engine.errors import RowError


def loads(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        json.JSONDecodeError: it is no JSON.
        RowError: it is, but cannot be taken as it is (`bad_json`, `bad_encoding`).
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise RowError("JSON nested too deeply", code="bad_json") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # an integer of thousands of digits, or NaN
        raise RowError(f"broken JSON: {error}", code="bad_json") from None
    if "\\ud" in text or "\\uD" in text:  # half of a surrogate pair cannot be written out again
        try:
            json.dumps(data, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            message = "text holds half of a surrogate pair"
            raise RowError(message, remedy="fix the \\u escape", code="bad_encoding") from None
    return data


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        short = digits if len(digits) <= 20 else digits[:19] + "…"
        raise ValueError(f"{short} is beyond the range of numbers")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
