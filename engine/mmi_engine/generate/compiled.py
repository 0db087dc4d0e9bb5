"""`--compile`: the U-Net's blocks through `torch.compile`.

Place in the flow: `engine.py` comes here after the weights are loaded. Blocks are compiled one by one where they stand,
so names, weights and what runs between them (MMFS with its own kernels) stay as they are. Results differ in their last
bits. The language model is not compiled: its contexts grow by a column with every token.
"""

from __future__ import annotations

import torch

from mmi_engine.errors import BackendError
from mmi_engine.model.interleaved import MMInterleaved


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
    decoder = model.image_decoder
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
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackendError(
            f"the U-Net cannot be compiled here: {first}",
            remedy="leave out --compile, or install a C++ compiler (on CUDA also Triton)",
        ) from error
