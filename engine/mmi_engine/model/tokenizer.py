"""Text ↔ ids for the engine: one small face over the two kinds of tokenizer that a model directory may hold.

``tokenizer.json`` is read by the tokenizers library, ``tokenizer.model`` (the released layout) by transformers'
``LlamaTokenizer``. Special tokens never appear here: ``mmi_engine.sequence`` places them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mmi_engine.errors import ModelError


class DirectoryTokenizer:
    """Tokenizer of a model directory.

    Raises:
        ModelError: the directory holds no tokenizer, or one that cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.path = Path(directory) / "tokenizer.json"
        self._library: Any
        if self.path.is_file():
            from tokenizers import Tokenizer

            try:
                self._library = Tokenizer.from_file(str(self.path))
            except Exception as error:  # the library raises bare Exception for a malformed file
                raise ModelError(f"{self.path} cannot be read: {error}", remedy="restore the file") from error
            return
        self.path = Path(directory) / "tokenizer.model"
        if not self.path.is_file():
            raise ModelError(
                f"{directory} holds no tokenizer.json or tokenizer.model", remedy="copy the model's tokenizer there"
            )
        from transformers import LlamaTokenizer

        self._library = LlamaTokenizer.from_pretrained(str(directory))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without special tokens."""
        encoded = self._library.encode(text, add_special_tokens=False)
        return list(encoded if isinstance(encoded, list) else encoded.ids)

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special tokens are left out."""
        return str(self._library.decode(ids, skip_special_tokens=True)).strip()

    @property
    def vocabulary(self) -> int:
        """Entries, special tokens included."""
        count = getattr(self._library, "get_vocab_size", None)
        return int(count() if count is not None else len(self._library))

    def copy_to(self, directory: Path) -> None:
        """Put the tokenizer file into another model directory."""
        target = Path(directory) / self.path.name
        if target.resolve() != self.path.resolve():
            shutil.copyfile(self.path, target)
