"""What a user may choose about generation. Imports nothing heavy: the command line reads it.

Text is greedy unless asked otherwise; a task brings its own defaults where it has some. Steps, guidance and scheduler
default to what the model directory states.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmi_engine.errors import UsageError

SCHEDULERS = ("ddpm", "ddim", "dpm++", "unipc")


@dataclass(frozen=True)
class Settings:
    """Decoding choices of one run.

    Attributes:
        steps: denoising steps, ≥ 1; ``None``: the model's own.
        guidance: classifier-free guidance scale, 1 switches it off; ``None``: the model's own.
        scheduler: one of ``SCHEDULERS``; ``None``: the model's own.
        beams: 1 for greedy or sampled text, more for beam search.
        temperature: 0 for greedy text.
        top_p: nucleus of sampled text, (0, 1].
        max_new_tokens, min_new_tokens: bounds of one generated text, in tokens.
        repetition_penalty: > 1 discourages tokens already generated.
        length_penalty: exponent of the length in beam scores.
    """

    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 90
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        checks = (
            (self.steps is None or self.steps >= 1, "steps must be at least 1"),
            (self.guidance is None or self.guidance >= 0, "guidance must not be negative"),
            (self.scheduler is None or self.scheduler in SCHEDULERS, f"scheduler must be one of {SCHEDULERS}"),
            (self.beams >= 1, "beams must be at least 1"),
            (self.temperature >= 0, "temperature must not be negative"),
            (0 < self.top_p <= 1, "top-p must lie in (0, 1]"),
            (self.max_new_tokens >= 1, "max-new-tokens must be at least 1"),
            (0 <= self.min_new_tokens <= self.max_new_tokens, "min-new-tokens must lie in 0 … max-new-tokens"),
            (self.repetition_penalty > 0, "repetition-penalty must be positive"),
            (self.beams == 1 or self.temperature == 0, "beams and temperature exclude each other"),
        )
        for good, message in checks:
            if not good:
                raise UsageError(message)
