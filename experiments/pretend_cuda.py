"""A pretended GPU, to test the code for CUDA where there is none: inside `pretended_cuda()` tensors
say that they are on cuda:0, and compute on the CPU. What a GPU refuses is refused: an operation on
tensors of two devices (copies and numbers may mix), and, while a graph is captured, whatever waits
for the device or copies between device and host.

A captured graph is a tape of operations. New tensors hold NaN until a replay runs the tape into the
same memory. A number that Python computed during the capture stays what it was, so code that bakes
one in gives wrong tokens. All this proves nothing of speed, rounding, or which kernels a GPU has.
"""

from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock, patch
from weakref import WeakSet

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

MOVES = (Tensor.to, Tensor.cpu, Tensor.new_tensor, torch.tensor, torch.as_tensor)
WAITS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
MEMORY, CAPTURING = WeakSet(), {}       # the storages on the GPU; the graph, while one is captured


def on_gpu(x):                                          # a tensor, a device, or the name of one
    return x.untyped_storage() in MEMORY if isinstance(x, Tensor) else str(x).startswith("cuda")


def refuse_in_capture(what="synchronize"):
    if CAPTURING:
        raise RuntimeError(f"{what}: operation not permitted when stream is capturing")


class Graph(list):      # the tape: (function, args, kwargs, results; None for a view) in order
    @contextmanager
    def capture(self):
        with patch.dict(CAPTURING, graph=self):
            yield
        for x in (x for *_, new in self for x in new if on_gpu(x)):
            x.fill_(torch.nan if x.is_floating_point() else 0)

    def replay(self):
        for function, args, kwargs, new in self:
            for x, result in zip(new, tree_leaves(function(*args, **kwargs))):
                on_gpu(x) and x.copy_(result)


class Operations(TorchDispatchMode):                    # what runs, below Python
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours, hosts = ([x for x in given if on_gpu(x) == here] for here in (True, False))
        waits, copies = WAITS & {*function.tags}, function is torch.ops.aten.copy_.default
        if function is torch.ops.aten.index.Tensor:     # waits only to count what a mask selects
            waits = any(x.dtype == torch.bool for x in given[1:])
        if ours and not copies and any(x.dim() for x in hosts):
            raise RuntimeError(f"{function}: tensors are on two devices, cuda:0 and cpu")
        if ours and (waits or hosts):
            refuse_in_capture(function)
        out = function(*args, **kwargs or {})
        new = [None if on_gpu(x) else x for x in tree_leaves(out)]
        if ours:
            MEMORY.update(x.untyped_storage() for x in new if isinstance(x, Tensor))
        if CAPTURING and (ours or not given):
            CAPTURING["graph"].append((function, args, kwargs or {}, new))
        return out


class Names(TorchFunctionMode):                         # what Python sees
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, x, getter = kwargs or {}, [*args, None][0], getattr(function, "__self__", None)
        if getter in (Tensor.device, Tensor.is_cuda) and on_gpu(x):
            return torch.device("cuda:0") if getter is Tensor.device else True
        if function is torch.bmm and "out_dtype" in kwargs:     # which a CPU has no kernel for
            return torch.bmm(*(factor.to(kwargs["out_dtype"]) for factor in args))
        if function is Tensor.tolist and on_gpu(x):
            refuse_in_capture("tolist")
        device = kwargs.get("device")
        if function in MOVES:
            named = [a for a in (*args[1:], device) if isinstance(a, (str, torch.device, Tensor))]
            device = "cpu" if function is Tensor.cpu else [*named, x][0]
        if device is None:
            return function(*args, **kwargs)
        args, kwargs = tree_map_only((str, torch.device), lambda name: (
            "cpu" if on_gpu(name) else name), (args, kwargs))
        out = function(*args, **kwargs)
        if function in MOVES and on_gpu(out) != on_gpu(device):
            refuse_in_capture("copy between host and device")
            out = out.clone()
        (MEMORY.add if on_gpu(device) else MEMORY.discard)(out.untyped_storage())
        return out


@contextmanager
def pretended_cuda():
    with Operations(), Names(), patch.multiple(
            torch.cuda, is_available=lambda: True, device_count=lambda: 1, CUDAGraph=Graph,
            graph=Graph.capture, synchronize=refuse_in_capture, Stream=MagicMock,
            stream=nullcontext, current_stream=MagicMock):
        yield
