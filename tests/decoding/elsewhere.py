"""A device with memory of its own, played on a CPU: what crosses its border is counted.

Tensors that are *elsewhere* say that they are on a device that no build of torch can run, and hold their values in a
CPU tensor that only the dispatch mode below looks at. So code that asks where tensors are takes the path that it takes
for a GPU, code that mixes both places fails, and each crossing is one operation that the mode sees: ``_to_copy`` to the
CPU and ``_local_scalar_dense`` (``item``, ``bool``, ``int``; ``tolist`` copies first), operations whose result's size
depends on values (``nonzero``, masks as indices), and copies of host tensors to the device.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")
_aten = torch.ops.aten
_VALUES = {_aten.nonzero.default, _aten.masked_select.default, _aten.is_nonzero.default, _aten.equal.default}
"""Operations that make the host wait for values, though they copy no tensor."""


class Elsewhere(torch.Tensor):
    """A tensor on the played device."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held):
        self.held = held

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} runs outside of the mode")


def inside(value):
    return value.held if isinstance(value, Elsewhere) else value


class Border(TorchDispatchMode):
    """Runs operations of the played device and counts crossings.

    Attributes:
        waits: What made the host wait for values, by operation.
        sent: Host tensors that were copied to the device.
        blocked: Of these, how many the host waited for: ``to`` does where it is not told otherwise.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.sent, self.blocked = Counter(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        with self:
            made_of_others = func.decompose(*args, **kwargs)  # what is composed of other operations is not one itself
        if made_of_others is not NotImplemented:
            return made_of_others
        flat, _ = torch.utils._pytree.tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, torch.Tensor)]
        there = [isinstance(tensor, Elsewhere) for tensor in tensors]
        assert not any(tensor.is_meta and not own for tensor, own in zip(tensors, there, strict=True)), (
            f"{func} has a tensor that was made of a host's list right on the device, which waits: use send_numbers"
        )
        to = kwargs.get("device")
        if to is not None:
            kwargs["device"] = torch.device("cpu")
        result_there = any(there) if to is None else torch.device(to).type == DEVICE.type
        if func is _aten._to_copy.default or func is _aten.copy_.default:
            result_there = there[0] if to is None else result_there
            self.sent += result_there and not all(there)
            self.blocked += result_there and not any(there) and not kwargs.get("non_blocking")
            self.waits[func.name()] += any(there) and not result_there
        elif any(there):
            assert all(there) or all(t.dim() == 0 for t, own in zip(tensors, there, strict=True) if not own), (
                f"{func} mixes tensors of both places"
            )
            masks = func.name().startswith("aten::index") and any(t.dtype is torch.bool for t in tensors[1:])
            if func in _VALUES or masks or func is _aten._local_scalar_dense.default:
                self.waits[func.name()] += 1
        result = func(*tree_map(inside, args), **tree_map(inside, kwargs))
        if not result_there:
            return result
        for tensor in tensors:  # what was written in place stays the tensor that it is
            if result is getattr(tensor, "held", None):
                return tensor
        return tree_map(lambda value: Elsewhere(value) if isinstance(value, torch.Tensor) else value, result)


def move(module):
    """Put a module's parameters and buffers on the played device, in place."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    held = Elsewhere(tensor.detach())
                    tensors[name] = (
                        torch.nn.Parameter(held, requires_grad=False) if tensors is part._parameters else held
                    )
    return module
