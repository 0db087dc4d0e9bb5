"""The one error of its own that this package raises; wrong shapes are plain `ValueError`s."""

from __future__ import annotations


class KernelUnavailable(RuntimeError):
    """A backend was asked for by name and cannot serve the call here.

    Attributes:
        code: stable short code, "kernel_unavailable".
        remedy: what the caller can do about it, one sentence.
    """

    code = "kernel_unavailable"

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(f"{message}; {remedy}")
        self.remedy = remedy
