"""`--cuda-graphs`: one token and one denoising step recorded once per shape, then replayed as a whole.

Place in the flow: `engine.py` asks `refuse_elsewhere` and `refuse_model`, then sets ``model.graphs``; `text.Decoder`
and `image.denoise` look there. A step is an ordinary function of buffers that stay where they are (`fixed.py`, and
`FixedUNet` here): what it reads is copied in, what it gives is copied out before the buffers are used again. On a CUDA
device the function is recorded by its first use; on any other it is simply called, which tests compare with the other
path.

With ``--compile`` the token's step lies in the same store, compiled instead of recorded (`compiled.py`).
Recordings serve a model whose weights stay as they are. Source: torch.cuda.graphs, "CUDA semantics" of its manual.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmi_engine.errors import BackendError, UsageError, is_out_of_memory
from mmi_engine.model.interleaved import MMInterleaved
from mmi_engine.model.kept import Kept
from mmi_engine.model.unet import ImageVision, text_keys, text_once
from mmi_engine.runtime import no_collection

MOST = 16
"""Recordings that are kept at most, the least recently used dropped first."""
SHARE = 8
"""Beyond this part of the device's memory (1/8) only the newest is kept."""
WARM_UPS = 3
"""Runs before recording: kernels are compiled, libraries choose their algorithms and take their memory."""
UNFIT_ROTATIONS = ("dynamic", "longrope")
OPTION = "--cuda-graphs"

Buffers = TypeVar("Buffers", bound="FixedUNet | Any")


def refuse_elsewhere(device: str, kernel: str, unfit: Mapping[str, Any]) -> None:
    """Raises BackendError or UsageError where the option cannot be met, before any weights are read.

    Args:
        device, kernel: as resolved: "cpu" or "cuda", "cuda", "torch" or "numba".
        unfit: options that do not go together with this one, by name, and their values.
    """
    if device != "cuda":
        raise BackendError(f"{OPTION} needs a CUDA device, the run is on {device}", remedy=f"leave out {OPTION}")
    if kernel != "cuda":
        raise BackendError(
            f"{OPTION} needs the CUDA kernel, the run's is {kernel!r}: it copies from the host in every call",
            remedy=f"install CuPy (see mmi doctor) and leave out --kernel, or leave out {OPTION}",
        )
    for name, value in unfit.items():
        if value:
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{OPTION} does not go together with {option}", remedy="leave out one of them")


def refuse_model(model: MMInterleaved, option: str = OPTION) -> None:
    """Raises BackendError where the language model's step has no fixed shape, which ``option`` needs."""
    body: Any = model.language.body
    why = ""
    if any(getattr(layer, "is_sliding", False) for layer in model.language.new_cache().layers):
        why = "its attention has a sliding window"
    elif getattr(getattr(body, "rotary_emb", None), "rope_type", "default") in UNFIT_ROTATIONS:
        why = "its rotary positions depend on the length"
    if why:
        raise BackendError(f"{option} does not serve this language model: {why}", remedy=f"leave out {option}")


class Recording:
    """A function without arguments, recorded on CUDA; calling it replays.

    Args:
        function: reads and writes tensors that stay where they are, and returns one; runs `WARM_UPS` times first.
        device: of these tensors.
        module: whose kept results (`model/kept.py`) the recording points to.

    Raises:
        BackendError: it cannot be recorded.
    """

    def __init__(self, function: Callable[[], Tensor], device: torch.device, module: nn.Module) -> None:
        self.function, self.bytes = function, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._out: Tensor | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._record()
        # Such a result may be dropped by its module, the recording still reads it.
        self._held = [t.entry for m in module.modules() for t in vars(m).values() if isinstance(t, Kept)]

    def __call__(self) -> Tensor:
        """What the function gives; holds until the next call."""
        if self._graph is None:
            return self.function()
        assert self._out is not None
        self._graph.replay()
        return self._out

    def _record(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self.function()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
        try:
            # Other threads prepare the next items meanwhile: their calls are none of the recording's.
            with no_collection(), torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                self._out = self.function()
        except Exception as error:  # whatever library refuses to be recorded
            if is_out_of_memory(error):
                raise
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BackendError(
                f"a step cannot be recorded as a CUDA graph here: {first}", remedy=f"leave out {OPTION}"
            ) from error
        self._graph, self.bytes = graph, max(0, torch.cuda.memory_reserved() - before)


class Graphs:
    """Buffers with their recordings, by shape; one store serves one model.

    Args:
        device: of the model.
        compiled: `fixed.token` through a compiler: nothing is recorded, and the U-Net is none of this store's.
    """

    def __init__(self, device: torch.device, compiled: Callable[..., Tensor] | None = None) -> None:
        self.compiled = compiled
        self.limit = 2**30
        if device.type == "cuda":
            self.limit = int(torch.cuda.get_device_properties(device).total_memory) // SHARE
        self.made = 0  # recordings since the start
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Buffers]) -> Buffers:
        """What is kept under ``key``, made where there is nothing; it has ``bytes``."""
        found: Buffers | None = self._kept.get(key)
        if found is None:
            self._kept[key] = found = make()
            self.made += 1
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and (len(self) > MOST or sum(b.bytes for b in self._kept.values()) > self.limit):
            self._kept.popitem(last=False)
        return found

    def clear(self) -> None:
        """Drop all, so that their memory can be used otherwise."""
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model has other weights: it starts without."""
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


class FixedUNet:
    """One prediction of the U-Net over buffers: latents, step, text condition with its keys, what MMFS looks at.

    Args:
        model: evaluated without gradients.
        latents, step, tokens, vision: as `MMFSUNet.forward` takes them; their shapes are those of every later call.
    """

    def __init__(
        self, model: MMInterleaved, latents: Tensor, step: Tensor, tokens: Tensor, vision: ImageVision | None
    ) -> None:
        self.unet = model.image_decoder.unet
        self.latents, self.tokens = latents.clone(), tokens.clone()
        self.step = step.to(latents.device, copy=True)
        self.keys = text_keys(self.unet, self.tokens)
        self.vision = _own(vision, {})
        self._recording = Recording(self._predict, latents.device, self.unet)
        buffers = [self.latents, self.tokens, *(known for _, known in self.keys), *_tensors(self.vision)]
        own = {id(buffer): buffer for buffer in buffers}
        self.bytes = self._recording.bytes + sum(t.numel() * t.element_size() for t in own.values())

    def load(self, tokens: Tensor, vision: ImageVision | None) -> None:
        """What all steps of a batch look at."""
        self.tokens.copy_(tokens)
        for (_, mine), (_, new) in zip(self.keys, text_keys(self.unet, tokens), strict=True):
            mine.copy_(new)
        pairs = zip(_tensors(self.vision), _tensors(vision), strict=True)
        for mine, given in {id(mine): (mine, given) for mine, given in pairs}.values():
            mine.copy_(given)

    def __call__(self, latents: Tensor, step: Tensor) -> Tensor:
        """The prediction ``[k·N, C, h, w]``, a tensor of its own; ``step``: a scalar."""
        self.latents.copy_(latents)
        self.step.fill_(step.item() if step.device.type == "cpu" else step)
        return self._recording().clone()

    def _predict(self) -> Tensor:
        with text_once(self.unet, [self.tokens], [self.keys]):
            return self.unet(self.latents, self.step, self.tokens, self.vision)


def fixed_unet(
    model: MMInterleaved, graphs: Graphs, latents: Tensor, step: Tensor, tokens: Tensor, vision: ImageVision | None
) -> FixedUNet:
    """The U-Net over buffers for these shapes, loaded with this batch's condition and images."""
    shapes = tuple((tuple(t.shape), t.dtype) for t in (latents, step, tokens, *_tensors(vision)))
    maps = None if vision is None else (tuple(vision.shapes), vision.sources is None, vision.once is None)
    made = graphs.get(("picture", shapes, maps), lambda: FixedUNet(model, latents, step, tokens, vision))
    made.load(tokens, vision)
    return made


def _tensors(vision: ImageVision | None) -> list[Tensor]:
    """All tensors of what MMFS looks at, some of them twice."""
    if vision is None:
        return []
    own: Sequence[Tensor] = [*vision.values, vision.visible, vision.rows]
    return [*own, *([] if vision.sources is None else [vision.sources]), *_tensors(vision.once)]


def _own(vision: ImageVision | None, copies: dict[int, Tensor]) -> ImageVision | None:
    """The same in tensors of its own; ``copies``: by what they are of."""
    if vision is None:
        return None

    def own(tensor: Tensor) -> Tensor:
        return copies.setdefault(id(tensor), tensor.clone())

    values = [own(value) for value in vision.values]
    sources = None if vision.sources is None else own(vision.sources)
    return ImageVision(values, vision.shapes, own(vision.visible), own(vision.rows), sources, _own(vision.once, copies))
