"""`--compile`: the language model's step and the U-Net's blocks through `torch.compile`.

Place in the flow: `engine.py` comes here after the weights are loaded; each part is run once, so that what fails does
so before the work begins. A token's step is compiled whole, over buffers (`fixed.py`) of any number of rows, columns
and images: one compilation for one row and one for several, each with no, one and several images, six in all. The
U-Net's blocks are compiled one by one where they stand, so names, weights and what runs between them (MMFS with its
own kernels) stay as they are. Results differ in their last bits.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.fx.experimental import _config as _fx

from mmi_engine.errors import BackendError, is_out_of_memory
from mmi_engine.generate.fixed import token
from mmi_engine.generate.graphs import Graphs, refuse_model
from mmi_engine.generate.interleave import fill
from mmi_engine.generate.settings import Settings
from mmi_engine.generate.step import token_step
from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.model.packed import packed
from mmi_engine.model.rows import steady
from mmi_engine.pieces import Piece

OPTION = "--compile"


class CompiledToken:
    """`fixed.token` through `torch.compile`, for one model.

    Args:
        backend: of `torch.compile`.

    Raises:
        BackendError: (when called) shapes of another kind than before cannot be compiled.
    """

    def __init__(self, backend: str) -> None:
        # Compilations are counted and bounded per code object: those for another model are none of this one's.
        own = FunctionType(token.__code__.replace(), token.__globals__)
        self._call: Any = torch.compile(own, backend=backend, dynamic=True, fullgraph=True)

    def __call__(self, *arguments: Any) -> Tensor:
        """See `fixed.token`."""
        try:
            # Sizes that happen to be equal (rows and heads, say) are not the same size for all shapes to come.
            with _fx.patch(use_duck_shape=False):
                logits: Tensor = self._call(*arguments)
        except TorchDynamoException as error:
            raise _refusal("the language model's step", error) from error
        return logits


@torch.no_grad()
def compile_text(model: MMInterleaved, rows: int, *, beams: int = 1, backend: str = "inductor") -> bool:
    """Compile a token's step, and write two tokens behind a picture so that whatever fails does so here.

    Args:
        model: on its device.
        rows: of a batch; beams: of every row.
        backend: of `torch.compile`.

    Returns:
        False where the step of `step.py` serves: that is the faster one (docs/bench.md), and nothing is compiled.

    Raises:
        BackendError: it cannot be compiled here, or the language model's step has no fixed shape.
    """
    if token_step(model, model.language.new_cache()) is not None:
        return False
    refuse_model(model, OPTION)
    side = model.config.vision.image_size
    pieces = [Piece("image", Image.new("RGB", (side, side))), Piece("text")]
    try:
        model.graphs = Graphs(model.device, CompiledToken(backend))
        fill(model, [pieces], [0], Settings(max_new_tokens=2, min_new_tokens=2, beams=beams), rows)
    except Exception as error:  # whatever compiler and library raise
        model.graphs = None
        if isinstance(error, BackendError) or is_out_of_memory(error):
            raise
        raise _refusal("the language model's step", error) from error
    return True


@torch.no_grad()
def compile_unet(model: MMInterleaved, rows: int, *, guided: bool = True, backend: str = "inductor") -> None:
    """Compile, and run once for a batch so that whatever fails does so here.

    Args:
        model: on its device.
        rows: pictures of a batch; guided: whether both halves of guidance run together.
        backend: of `torch.compile`.

    Raises:
        BackendError: it cannot be compiled here.
    """
    decoder = packed(steady(model)).image_decoder  # as generation has its layers: others would be compiled again
    unet = decoder.unet.unet
    vae = decoder.config.vae
    dtype = decoder.unconditional.dtype
    latents = torch.zeros(rows, vae.latent_channels, vae.latent_size, vae.latent_size, device=model.device, dtype=dtype)
    context = decoder.unconditional.expand((1 + guided) * rows, -1, -1)
    try:
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            block.compile(backend=backend)
        decoder.unet.compiled = True
        decoder.unet(latents, torch.tensor(0, device=model.device), context)
    except Exception as error:  # whatever compiler and library raise
        raise _refusal("the U-Net", error) from error


def _refusal(what: str, error: Exception) -> BackendError:
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    if rest and first.endswith("raised:"):  # torch names the compiler first, then what it said
        first = rest[0]
    return BackendError(
        f"{what} cannot be compiled here: {first}",
        remedy=f"leave out {OPTION}, or install a C++ compiler (on CUDA also Triton)",
    )
