"""The element that documents are made of: a text or a picture, given or still to be made.

Place in the flow: tasks build lists of pieces from manifest rows, `sequence.py` turns them into token ids, `generate/`
replaces those without a value. Light: the command line and the tasks use it without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Piece:
    """One element of an interleaved document.

    Attributes:
        kind: ``"text"`` or ``"image"``.
        value: the text or the RGB picture; None asks the model for it.
        options: of a missing text: it must be one of these, the one the model finds most likely.
        scores: what the model found: summed log-probability of each option, or of a picture among candidates the score
            that ranks it.
    """

    kind: Literal["text", "image"]
    value: Any = None
    options: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
