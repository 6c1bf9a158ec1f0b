"""The only file that knows torch's versions: what the package asks of it, from 2.0 on.

2.0 has all that the float model computes with. Compiling (`torch.compile` with a static cache) was tested on 2.13 only;
the op of int8 and int4 layers is seen by the compiler from 2.4 on (`torch.library.custom_op`), and runs outside of
compiled graphs before.
"""

import torch
import torch.nn.functional as F

if hasattr(torch, "compiler") and hasattr(torch.compiler, "is_compiling"):
    is_compiling = torch.compiler.is_compiling
else:  # delete with torch 2.2

    def is_compiling():
        """Whether this call is being traced by torch.compile: taken for False, which breaks a graph, never a result."""
        return False


if hasattr(F, "rms_norm"):
    rms_norm = F.rms_norm
else:  # delete with torch 2.4

    def rms_norm(x, shape, weight, eps):
        """x / sqrt(mean(x^2) + eps) * weight in float32, cast once at the end."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (weight * wide).to(x.dtype)


def is_watched(x):
    """Whether a call with x is followed by something besides its caller, which has to be told by an op of torch's.

    A gradient, a compiler, a trace, a mode that sees every op, a subclass of Tensor. Eager inference has none of them,
    and is spared the dispatch: 10 to 25 microseconds, which a token would pay at each of its layers.
    """
    return (
        x.requires_grad
        or type(x) is not torch.Tensor
        or is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def autocast_dtype(kind):
    """The dtype that autocast computes in on devices of this kind ("cpu", "cuda"), or None where it is off."""
    if kind == "meta":
        return None
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if kind == "cpu":  # delete with torch 2.4
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
