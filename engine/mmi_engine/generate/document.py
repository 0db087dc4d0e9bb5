"""A document in the making: its pieces, its pictures as they were encoded, and what was read of it.

Place in the flow: `interleave.py` makes one of every item and fills in piece after piece.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mmi_engine.generate.reading import Read
from mmi_engine.generate.reuse import Encoded
from mmi_engine.pieces import Piece


@dataclass
class Document:
    """A document in the making."""

    pieces: list[Piece]
    seed: int
    free: int
    given: int = 0  # pieces of the document as it came; what follows is free
    encoded: list[Encoded] = field(default_factory=list)
    read: Read | None = None
    ended: bool = False
    made: int = 0

    def next_missing(self) -> int | None:
        """Index of the next piece to make, ``None`` when all have values."""
        return next((i for i, piece in enumerate(self.pieces) if piece.value is None), None)

    @property
    def unfinished(self) -> bool:
        """Whether anything is still to be made."""
        return self.next_missing() is not None or (self.free > 0 and not self.ended)

    def give(self, index: int, value: Any, scores: tuple[float, ...] = ()) -> None:
        """Piece ``index`` has been made."""
        self.made += 1
        self.pieces[index] = replace(self.pieces[index], value=value, scores=scores)

    def goes_on(self, index: int) -> bool:
        """Whether something is to be made after piece ``index``."""
        return self.free > 0 or any(piece.value is None for piece in self.pieces[index + 1 :])

    def generator(self, index: int) -> torch.Generator:
        """Random numbers of piece ``index``."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + index) % 2**63)
