"""A model whose decoder layers stay on disk: each is read when its turn comes and dropped behind it.

So a model of any depth takes the memory of its embeddings and of one layer. The model's own forward runs; only its
layers are fetched for it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from scaleot_core.common import distributed
from scaleot_core.common.errors import UserError, one_line
from scaleot_core.models.families import decoder_layers, family
from scaleot_core.models.forward import hidden_of, last_hidden_state, swapped_layers
from scaleot_core.models.loading import empty_model, load_model, read_config

LayerHook = Callable[[int, nn.Module], AbstractContextManager[object]]
"""Called with a layer's index and the layer with its weights; entered before the pass through it, left behind it."""
LayerLoader = Callable[[], AbstractContextManager[nn.Module]]


class Place(NamedTuple):
    """Where a tensor is stored."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]


class StreamedModel:
    """A causal language model in safetensors files, `files` or those of a folder, which is read part by part.

    Tensors have the model's own names there, or these without the base model's prefix. `model` is on the meta device,
    but for the weights that a block here puts in. UserError for a tensor that is missing, of another shape, or in a
    damaged file.
    """

    def __init__(
        self,
        folder: Path,
        config: PretrainedConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        files: Iterable[Path] = (),
    ) -> None:
        self.folder, self.device, self.dtype = folder, device, dtype
        self.model = empty_model(config, dtype, buffers_too=False).eval().requires_grad_(False)
        for name, buffer in self.model.named_buffers():  # what a model computes for itself
            owner, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(owner), last, buffer.to(device))
        self.path, self._layers = family(config).layers, list(decoder_layers(self.model))
        tied, inside = set(self.model.all_tied_weights_keys), f"{self.path}."
        self._shapes = {n: tuple(tensor.shape) for n, tensor in self.model.state_dict().items() if n not in tied}
        self.outside = [name for name in self._shapes if not name.startswith(inside)]
        """Names of the tensors outside of decoder layers: embeddings, norm, head."""
        self.places: dict[str, Place] = {}
        """Where each tensor is stored, by its name in the model."""
        for file in files or sorted(folder.glob("*.safetensors")):
            self._find(file)

    def _find(self, file: Path) -> None:
        with self._sound(file), safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118
                longer = f"{self.model.base_model_prefix}.{name}"
                shape = tuple(stream.get_slice(name).get_shape())
                self.places[longer if longer in self._shapes else name] = Place(file, name, shape)

    @property
    def is_whole(self) -> bool:
        """Whether the files have all of the model's tensors in its shapes."""
        return all(name in self.places and self.places[name].shape == shape for name, shape in self._shapes.items())

    @contextmanager
    def _sound(self, file: Path) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file}: the model can't be loaded ({one_line(error)}); fetch it again") from error

    def read(self, name: str) -> Tensor:
        """Read one tensor as a copy, since a view would keep the mapped file in memory."""
        place = self.places.get(name)
        with self._sound(place.file if place else self.folder):
            if place is None:
                raise ValueError(f"tensor {name!r} is missing")
            if place.shape != self._shapes[name]:
                raise ValueError(f"tensor {name!r} is {place.shape}, not {self._shapes[name]}")
            with safe_open(place.file, framework="pt") as stream:
                return stream.get_tensor(place.name).to(self.device, self.dtype, copy=True)

    def read_stored(self, name: str) -> Tensor | None:
        """Read one tensor in the dtype that it has on disk; None if the model has none of that name."""
        place = self.places.get(name) if name in self._shapes else None
        if place is None:
            return None
        with self._sound(place.file), safe_open(place.file, framework="pt") as stream:
            return stream.get_tensor(place.name).clone()

    @property
    def names(self) -> Iterable[str]:
        """The names of all of the model's tensors."""
        return self._shapes.keys()

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read the named tensors one after the other, each with its name."""
        return ((name, self.read(name)) for name in names)

    def layer_tensors(self, index: int, layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of what is in a decoder layer's place, by their names in the model."""
        return ((f"{self.path}.{index}.{name}", tensor) for name, tensor in layer.state_dict().items())

    def _fill(self, module: nn.Module, prefix: str, names: list[str]) -> None:
        module.load_state_dict({n.removeprefix(prefix): self.read(n) for n in names}, strict=False, assign=True)
        module.requires_grad_(False)

    @contextmanager
    def _filled(self, module: nn.Module, prefix: str, names: list[str]) -> Iterator[None]:
        self._fill(module, prefix, names)
        try:
            yield
        finally:
            empty = {name: tensor.to("meta") for name, tensor in module.state_dict().items()}
            module.load_state_dict(empty, assign=True)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Yield a decoder layer with its weights, which are dropped when the block ends."""
        with self._filled(*self._part(index)):
            yield self._layers[index]

    @contextmanager
    def without_layers(self) -> Iterator[PreTrainedModel]:
        """Yield the model with the weights of embeddings, norm and head, which are dropped when the block ends."""
        with self._filled(self.model, "", self.outside):
            self.model.tie_weights()
            yield self.model

    def _part(self, index: int) -> tuple[nn.Module, str, list[str]]:
        layer, prefix = self._layers[index], f"{self.path}.{index}."
        return layer, prefix, [f"{prefix}{name}" for name in layer.state_dict()]

    def load(self) -> PreTrainedModel:
        """Load the model's weights; of layers that are split over processes only this one's part."""
        self._fill(self.model, "", self.outside)
        self.model.tie_weights()
        for index, layer in enumerate(self._layers):
            self._fill(*self._part(index))
            distributed.shard_layers([layer])
        return self.model

    @torch.no_grad()
    def run(self, blocks: Tensor, around: LayerHook, batch_blocks: int = 8) -> None:
        """Run blocks (N, T) through the stack, `batch_blocks` at once, and all through a layer before the next.

        Memory: a layer, the embeddings, and twice the N · T · D numbers of the hidden states.
        """
        last, in_tuple = len(self._layers) - 1, family(self.model.config).in_tuple
        passing = {
            i: StreamedLayer(
                partial(self.layer, i), partial(around, i), batch_blocks, last=i == last, in_tuple=in_tuple
            )
            for i in range(len(self._layers))
        }
        stack = f"{self.model.base_model_prefix}."
        with (
            self._filled(self.model, "", [name for name in self.outside if name.startswith(stack)]),
            swapped_layers(self.model, passing),
        ):
            last_hidden_state(self.model, blocks)


def load_sharded(folder: Path, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model as `load_model` does; where processes split its layers, no process holds the whole model."""
    if not distributed.fsdp_enabled():
        return load_model(folder, device=device, dtype=dtype)
    return StreamedModel(folder, read_config(folder), device=device, dtype=dtype).load()


class StreamedLayer(nn.Module):
    """Stands for a decoder layer, which is in memory only while hidden states pass through it in parts."""

    def __init__(
        self,
        layer: LayerLoader,
        around: Callable[[nn.Module], AbstractContextManager[object]],
        rows: int,
        *,
        last: bool,
        in_tuple: bool,
    ) -> None:
        super().__init__()
        self.layer, self.around, self.rows, self.last, self.in_tuple = layer, around, rows, last, in_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        """(B, T, D) to (B, T, D); of the last layer nobody needs more than one sequence."""
        count = len(hidden_states)

        def part(value: Any, at: slice) -> Any:
            """Take some sequences of what has a row for each, or several, as BLOOM's ALiBi."""
            if not isinstance(value, Tensor) or not value.ndim or len(value) % count:
                return value
            rows = len(value) // count
            return value[at.start * rows : at.stop * rows]

        out = torch.empty_like(hidden_states)
        with self.layer() as layer, self.around(layer):
            for start in range(0, count, self.rows):
                at = slice(start, start + self.rows)
                named = {name: part(value, at) for name, value in kwargs.items()}
                out[at] = hidden_of(layer(hidden_states[at], *(part(value, at) for value in args), **named))
        out = out[:1] if self.last else out
        return (out, None) if self.in_tuple else out
