"""Every error that `mmi` raises on purpose, in one tree.

    MMIError                       code             exit
    ├── UsageError                 usage            2   a command line that cannot be met
    ├── ConfigError                config           2   recipe, model or settings file that cannot be used
    ├── ManifestError              manifest         2   the manifest as a whole cannot be read
    ├── ModelError                 model            1   a checkpoint is missing, incomplete or of another kind
    ├── DeviceError                device           1   the device, dtype or kernel that was asked for is not there
    ├── BackendError               backend          1   a sampling kernel cannot run here
    ├── OutputError                output           1   the output directory cannot be written
    │   ├── OutputMismatchError    output_mismatch  2   it was made with another manifest, model or settings
    │   └── OutputBusyError        output_busy      1   another run works on the same part of it
    ├── VerifyError                verify           1   this installation computes other numbers than it should
    ├── StoppedError               stopped          3   the first failing item ended a run (`--on-error stop`)
    ├── Interrupted                interrupted      130 Ctrl-C; everything finished so far is on disk
    └── ItemError                  (own code)       3   one manifest row cannot be done; the others go on
        ├── RowError               bad_row, bad_json, bad_encoding, duplicate_id, bad_id, no_prompt, bad_options, …
        ├── ImageError             image_not_found, image_unreadable, image_too_large, url_refused, bad_map, …
        ├── TextTooLongError       text_too_long
        └── GenerationError        generation_failed, out_of_memory, not_finite, no_box

`code` is short and stable: it is what `errors.jsonl` and `--log-format json` show and what scripts
may compare. `exit_code` is what the process returns when the error ends it. `remedy` is the sentence that
tells the reader what to do; `str(error)` is cause and remedy in one line.
"""

from __future__ import annotations

# torch's allocator; C++; oneDNN, which has no memory for a convolution's code or scratch space
NO_MEMORY = ("DefaultCPUAllocator", "std::bad_alloc", "could not create a primitive")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of this process or of a device. On a CPU torch says so in plain RuntimeErrors."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)


class MMIError(Exception):
    """Base of all errors with a cause, a place and a remedy.

    Args:
        message: cause and place, without a final full stop, e.g. ``'model directory "x" not found'``.
        remedy: what the reader can do about it, or None when nothing can be advised.
        code: overrides the class's short stable code.
    """

    code: str = "error"
    exit_code: int = 1

    def __init__(self, message: str, *, remedy: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class UsageError(MMIError):
    """The command line asks for something contradictory or unknown."""

    code = "usage"
    exit_code = 2


class ConfigError(MMIError):
    """A recipe, model configuration or settings file is malformed or holds an unknown key."""

    code = "config"
    exit_code = 2


class ManifestError(MMIError):
    """The manifest as a whole cannot be read (missing file, a directory, no permission)."""

    code = "manifest"
    exit_code = 2


class ModelError(MMIError):
    """A checkpoint is missing, incomplete, or does not fit its configuration."""

    code = "model"


class DeviceError(MMIError):
    """The device, dtype or number of threads that was asked for cannot be had."""

    code = "device"


class BackendError(MMIError):
    """The deformable-sampling kernel that was asked for cannot run here."""

    code = "backend"


class OutputError(MMIError):
    """The output directory cannot be created, read or written."""

    code = "output"


class OutputMismatchError(OutputError):
    """The output directory was made with another manifest, model or other settings."""

    code = "output_mismatch"
    exit_code = 2


class OutputBusyError(OutputError):
    """Another process works on the same or an overlapping part of the output directory."""

    code = "output_busy"


class VerifyError(MMIError):
    """The numeric self-check found other numbers than the golden bundle holds."""

    code = "verify"


class StoppedError(MMIError):
    """An item failed and the caller asked to stop at the first failure."""

    code = "stopped"
    exit_code = 3


class Interrupted(MMIError):
    """Ctrl-C: what was finished is on disk and the same command resumes."""

    code = "interrupted"
    exit_code = 130


class ItemError(MMIError):
    """One item cannot be done. It becomes a row of `errors.jsonl`; the other items go on."""

    code = "item"
    exit_code = 3


class RowError(ItemError):
    """A manifest row is broken: JSON, encoding, types, id."""

    code = "bad_row"


class ImageError(ItemError):
    """An image named by a row cannot be loaded."""

    code = "image_unreadable"


class TextTooLongError(ItemError):
    """The row's text does not fit into the model's context."""

    code = "text_too_long"


class GenerationError(ItemError):
    """The model could not produce the missing pieces of an item."""

    code = "generation_failed"
