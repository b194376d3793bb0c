"""A device that does not exist: tensors that say they are on "pretend", computed on the CPU.

It is as strict as a GPU where a GPU is strict: an operator with one tensor here and one there is an error (tensors of
no dimension apart, and copies, which are what copies are for), and so is reading memory from Python. It counts what a
GPU would have to wait for: `pretend.counts`. Autograd, `device=` arguments and modules' `.to` work as with any device.

It takes torch's PrivateUse1 for the whole process and must be there before the first backward, so the checks that use
it run in a process of their own (test_devices.py).
Left out: streams, memory limits, other numerics, kernels that a real device lacks or orders differently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)
aten = torch.ops.aten

# what a GPU must finish its work for, because the shape of the result or a number in Python depends on it
WAITS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten._unique2, aten.unique_dim,
    aten.equal, aten.is_nonzero, aten.unique_consecutive,
}  # fmt: skip
COPIES = {aten._to_copy, aten.copy_, aten._copy_from}


class WrongDevice(RuntimeError):
    """Two devices in one operator."""


class Pretend(Tensor):
    """A tensor on the device; `inner` holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretend:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self, **how: Any) -> str:
        return f"Pretend({self.inner})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **how: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy; copy it to host memory first")

    def __deepcopy__(self, memo: dict[int, Any]) -> Pretend:
        made = Pretend(self.inner.clone())
        made.requires_grad_(self.requires_grad)
        return torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


counts: Counter[str] = Counter()


class _Generator(torch.Generator):
    """torch.Generator, for the device too: draws on one device need a generator of that device."""

    pretends: bool

    def __new__(cls, device: Any = "cpu") -> _Generator:
        pretends = torch.device(device).type == NAME
        made = super().__new__(cls, "cpu" if pretends else device)
        made.pretends = pretends
        return made


torch.Generator = _Generator  # type: ignore[misc]


def _tensors(of: Any) -> Iterator[Tensor]:
    if isinstance(of, Tensor):
        yield of
    elif isinstance(of, list | tuple):
        for each in of:
            yield from _tensors(each)
    elif isinstance(of, dict):
        yield from _tensors(list(of.values()))


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if torch.is_inference_mode_enabled() and func._can_decompose():  # what autograd would have taken apart before
        with _Watch():
            return func.decompose(*args, **kwargs)
    given = list(_tensors([args, kwargs]))
    here = [t for t in given if isinstance(t, Pretend)]
    there = [t for t in given if not isinstance(t, Pretend)]
    packet = func.overloadpacket
    device = kwargs.get("device")
    goes_there = torch.device(device).type == NAME if device is not None else bool(here)
    if not here and not goes_there:
        return func(*args, **kwargs)
    if packet in COPIES:
        from_here = isinstance(args[0] if packet is aten._to_copy else args[1], Pretend)
        to_here = goes_there if packet is aten._to_copy else isinstance(args[0], Pretend)
        if from_here != to_here:
            counts["to the CPU" if from_here else "from the CPU"] += 1
    elif here and any(t.ndim > 0 for t in there):
        shapes = [f"{'pretend' if isinstance(t, Pretend) else 'cpu'} {tuple(t.shape)}" for t in given]
        raise WrongDevice(f"{func}: tensors of two devices: {', '.join(shapes)}")
    if packet in WAITS or (packet in (aten.index, aten.index_put_) and _by_mask(args[1])):
        counts["waits"] += 1
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, Pretend) else x, (args, kwargs))
    if device is not None:
        inner_kwargs["device"] = torch.device("cpu")
    if packet is aten._conj:  # a lazy conjugate would be forgotten: below here nobody resolves it
        func = aten._conj_physical.default
    found = func(*inner_args, **inner_kwargs)
    owners = {id(t.inner): t for t in here}
    for wrapper in here:
        assert wrapper.shape == wrapper.inner.shape, f"{func} changed a shape in place"

    # a view of an ordinary tensor is ordinary, in inference mode too
    infers = torch.is_inference_mode_enabled() and not (here and _is_view(func) and not here[0].is_inference())

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor) or not goes_there:
            return x
        if id(x) in owners:
            return owners[id(x)]
        with torch.inference_mode(infers):
            return Pretend(x)

    return tree_map(wrap, found)


def _is_view(func: Any) -> bool:
    return any(each.alias_info is not None for each in func._schema.returns)


def _by_mask(indices: Any) -> bool:
    return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in indices)


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Draws(TorchFunctionMode):
    """Random numbers of a device come from a generator of that device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawn = kwargs.get("generator")
        if drawn is not None:
            there = next((isinstance(t, Pretend) for t in _tensors(args)), None)
            there = torch.device(kwargs.get("device") or "cpu").type == NAME if there is None else there
            if there != getattr(drawn, "pretends", False):
                raise WrongDevice(f"{func}: a generator of the other device")
        return func(*args, **kwargs)


def _synchronize(device: torch.device) -> None:
    if device.type != NAME:
        raise WrongDevice(f"{device} has no work to wait for")
    counts["synchronised"] += 1


@contextmanager
def pretending() -> Iterator[Counter[str]]:
    """Inside, "pretend" is a device; the counts begin at nothing."""
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) copies where we can see it
    counts.clear()
    try:
        with _Draws(), _Watch(), patch.object(torch.accelerator, "synchronize", _synchronize):
            yield counts
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
