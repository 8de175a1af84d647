"""A CUDA device without numbers: tensors on it have shapes, types, strides and bytes; integers and booleans have values
as well, because they decide what happens next.

Host tensors are what they are. Where a float decides (an `isfinite`, a token drawn), the answer is assumed, and what
was assumed is noted with its place. Fake tensors are torch's (`torch._subclasses.fake_tensor`); what is added here is
memory, the values of integers, and the waits of the host.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .ledger import Ledger, place

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
VALUED = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
_MOST_VALUES = 1 << 29  # bytes of one tensor; larger ones have none
_LARGE = 1 << 20  # bytes from which a host copy is memory that nobody has touched
_HUGE = 1 << 28  # and from which host memory has no numbers where nothing is written
# that launch nothing
_VIEWS = {
    "view", "transpose", "permute", "slice", "expand", "unsqueeze", "squeeze", "as_strided", "detach", "alias", "t",
    "select", "split", "split_with_sizes", "unbind", "unfold", "_unsafe_view", "_reshape_alias", "set_", "lift_fresh",
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "record_stream", "_local_scalar_dense",
    "device",
}  # fmt: skip
_TRUE = {"eq", "ne", "isfinite"}  # of floats: with themselves, and with infinity, which is how finite ones are known


def put(owner: Any, **names: Any) -> None:
    """Stand-ins for attributes of a module or a class."""
    for name, value in names.items():
        setattr(owner, name, value)


class _Shapes(FakeTensorMode):
    avoid_device_init = True  # there is nothing to start


class FakeGPU(TorchDispatchMode, Ledger):
    """The mode under which a rank runs.

    Args:
        memory: bytes that the device has.
        name: of it, for the refusal of a run that needs more.
        writes: whether copies of floats to the host are real memory there, which can be written to files.
    """

    def __init__(self, memory: float, name: str, rank: int = 0, writes: bool = True):
        TorchDispatchMode.__init__(self)
        Ledger.__init__(self, memory, name, rank)
        self.writes = writes
        self.shapes = _Shapes(allow_non_fake_inputs=True)
        with self.shapes:
            pass  # it has made torch ready for its device, for good
        self.values: weakref.WeakKeyDictionary[UntypedStorage, Tensor] = weakref.WeakKeyDictionary()
        self.integer = 0  # what an integer is taken for that floats decide
        self.assumed: Counter[str] = Counter()

    def on_host(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """Host memory that a copy of floats would have filled."""
        shape = tuple(shape)
        if (size := int(np.prod(shape, dtype=np.int64)) * dtype.itemsize) < _LARGE:
            return torch.zeros(shape, dtype=dtype)
        if self.writes:  # pages that are not touched until then
            found = torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)
        else:
            with self.shapes:
                found = torch.empty(shape, dtype=dtype)
        self.note_on_host(found)
        return found

    # -- values of integers ------------------------------------------------------------------------------------------

    def value(self, tensor: Tensor) -> Tensor | None:
        """A host tensor with the numbers of a tensor of integers or booleans, which changes with it; None of others."""
        if tensor.dtype not in VALUED:
            return None
        if not isinstance(tensor, FakeTensor):
            return tensor
        base = self.values.get(storage := tensor.untyped_storage())
        if base is None or base.dtype != tensor.dtype:
            return None
        if base.nbytes < storage.nbytes():  # it has grown
            self.values[storage] = base = torch.cat(
                [base, base.new_zeros(storage.nbytes() // base.itemsize - len(base))]
            )
        return torch.as_strided(base, tensor.size(), tensor.stride(), tensor.storage_offset())

    def give(self, tensor: Tensor, value: Tensor | None, otherwise: int | bool = 0) -> None:
        """Sets the numbers of a tensor of integers: to `value`, or all of them to `otherwise`."""
        if tensor.dtype not in VALUED or (storage := tensor.untyped_storage()).nbytes() > _MOST_VALUES:
            return
        base = self.values.get(storage)
        if base is None or base.dtype != tensor.dtype or base.nbytes != storage.nbytes():
            base = torch.zeros(storage.nbytes() // tensor.element_size(), dtype=tensor.dtype)
            self.values[storage] = base
        held = torch.as_strided(base, tensor.size(), tensor.stride(), tensor.storage_offset())
        held.copy_(value) if value is not None else held.fill_(otherwise)

    def numbers(self, tensor: Tensor) -> Tensor:
        """What a copy to the host has."""
        found = self.value(tensor)
        return found.clone() if found is not None else self.on_host(tensor.shape, tensor.dtype)

    def raised(self, host: Tensor) -> Tensor:
        """A device tensor with the values of a host tensor."""
        with self.shapes:
            tensor = torch.empty(host.shape, dtype=host.dtype, device=CUDA)
        self.note(tensor)
        self.give(tensor, host)
        return tensor

    # -- operations --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = list(_tensors((*args, *kwargs.values())))
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        device = kwargs.get("device")
        if not fakes and (device is None or torch.device(device).type != "cuda"):
            if not self.writes and func.overloadpacket.__name__ in ("empty", "zeros") and _size(args, kwargs) >= _HUGE:
                with self.shapes:
                    found = func(*args, **kwargs)
                self.note_on_host(found)
                return found
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if special := _SPECIAL.get(name):
            found = special(self, func, args, kwargs)
            if found is not NotImplemented:
                return found
        elif torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags:
            return self._decided(func, args, kwargs)
        if name not in _VIEWS:
            self.stage.kernels += 1
        try:
            out: Any = self.shapes.dispatch(func, types, args, kwargs)  # to enter the mode would take as long once more
        except RuntimeError as error:
            if len({tensor.device for tensor in tensors}) > 1:
                places = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
                raise self.refusal(f"{name} of tensors on two devices: {places}") from error
            raise
        if name == "resize_":
            self.resized(args[0].untyped_storage(), args[0].untyped_storage().nbytes())
        known = {tensor.untyped_storage()._cdata for tensor in fakes}
        fresh: list[Tensor] = []
        for tensor in _tensors((out,)):
            if isinstance(tensor, FakeTensor) and tensor.untyped_storage()._cdata not in known:
                if tensor.device.type == "cuda":
                    self.note(tensor)
                elif tensor.untyped_storage().nbytes() >= _LARGE:
                    self.note_on_host(tensor)
                if tensor.dtype in VALUED:
                    fresh.append(tensor)
        if fresh or (func._schema.is_mutable and any(tensor.dtype in VALUED for tensor in fakes)):
            self._evaluate(func, args, kwargs, tensors, fresh)
        return out

    def _evaluate(self, func, args, kwargs, tensors: list[Tensor], fresh: list[Tensor]) -> None:
        """Gives integers their values: `func` of those of its arguments, or what is assumed where floats decide."""
        are_valued = all(tensor.dtype in VALUED for tensor in tensors)
        if are_valued and (found := self._on_values(func, args, kwargs)) is not None:
            results = (result for result in _tensors((found,)) if result.dtype in VALUED)
            for tensor, result in zip(fresh, results, strict=False):
                self.give(tensor, result)
            return
        name = func.overloadpacket.__name__
        for tensor in fresh:
            answer: int | bool = name in _TRUE if tensor.dtype is torch.bool else self.integer
            self.give(tensor, None, answer)
            self.assumed[f"{name} gives {answer} at {place()}"] += 1

    def _on_values(self, func, args, kwargs) -> Any:
        missing = False

        def lower(x):
            nonlocal missing
            if isinstance(x, Tensor):
                found = self.value(x)
                missing = missing or found is None
                return found
            return torch.device("cpu") if isinstance(x, torch.device) else x

        args, kwargs = tree_map(lower, (tuple(args), dict(kwargs)))
        return None if missing else func(*args, **kwargs)

    def _decided(self, func, args, kwargs) -> Any:
        """An operation whose result's shape, or whose result on the host, hangs on numbers: the host waits for it."""
        self.wait(func.overloadpacket.__name__)
        self.stage.kernels += 1
        found = self._on_values(func, args, kwargs)
        if found is None:
            raise self.refusal(f"what {func} gives hangs on floats")
        return tree_map(lambda x: self.raised(x) if isinstance(x, Tensor) else x, found)


def _size(args, kwargs) -> int:
    """Bytes of numbers that are asked for; plain bytes are a place that copies go to, and are not touched by them."""
    if kwargs.get("dtype") is torch.uint8:
        return 0
    return int(np.prod(args[0], dtype=np.int64)) * (kwargs.get("dtype") or torch.float32).itemsize


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


# -- operations that are not what shapes make of them -----------------------------------------------------------------


def _to_copy(gpu: FakeGPU, func, args, kwargs):
    device = kwargs.get("device")
    if args[0].device.type == "cpu" or device is None or torch.device(device).type != "cpu":
        return NotImplemented
    if not kwargs.get("non_blocking", False):
        gpu.wait("copy to the host")
    gpu.stage.kernels += 1
    found = gpu.numbers(args[0])
    return found.to(kwargs.get("dtype") or found.dtype)


def _copy(gpu: FakeGPU, func, args, kwargs):
    target, source = args[0], args[1]
    if target.device.type != source.device.type:
        gpu.stage.moved += target.nbytes
    if target.device.type == "cuda" or source.device.type == "cpu":
        return NotImplemented
    if not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False)):
        gpu.wait("copy to the host")
    gpu.stage.kernels += 1
    if (found := gpu.value(source)) is not None:
        target.copy_(found)
    return target


def _item(gpu: FakeGPU, func, args, kwargs):
    gpu.wait("item")
    found = gpu.value(args[0])
    if found is not None:
        return found.item()
    gpu.assumed[f"item gives 1.0 at {place()}"] += 1
    return 1.0 if args[0].dtype.is_floating_point else 0


def _index(gpu: FakeGPU, func, args, kwargs):
    """By booleans, which are made indices first."""
    if not any(isinstance(i, Tensor) and i.dtype is torch.bool for i in args[1]):
        return NotImplemented
    gpu.wait("nonzero of a mask")
    places: list[Any] = []
    for i in args[1]:
        if isinstance(i, Tensor) and i.dtype is torch.bool:
            value = gpu.value(i)
            assert value is not None
            places += [gpu.raised(part) for part in value.nonzero().unbind(1)]
        else:
            places.append(i)
    with gpu:
        return func(args[0], places, *args[2:], **kwargs)


def _masked_select(gpu: FakeGPU, func, args, kwargs):
    with gpu:
        x, mask = torch.broadcast_tensors(*args)
        return aten.index.Tensor(x, [mask])


def _equal(gpu: FakeGPU, func, args, kwargs):
    gpu.wait("equal")
    one, other = (gpu.value(x) for x in args)
    return one is None or other is None or torch.equal(one, other)


_SPECIAL: dict[str, Callable] = {
    "_to_copy": _to_copy, "copy_": _copy, "_local_scalar_dense": _item, "index": _index, "index_put_": _index,
    "index_put": _index, "_index_put_impl_": _index, "masked_select": _masked_select, "equal": _equal,
}  # fmt: skip
