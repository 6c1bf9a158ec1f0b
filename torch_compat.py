"""The only file that depends on the version of torch, from 2.0 on.

The float model needs only torch 2.0. `torch.compile` with a static cache was tested on 2.13 and 2.14 only. The ops of
the package are parts of compiled graphs from 2.4 on (`torch.library.custom_op`); before, int8 and int4 layers cause a
graph break.
"""

import contextlib
import inspect
import zipfile

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

if hasattr(torch, "compiler") and hasattr(torch.compiler, "is_compiling"):
    is_compiling = torch.compiler.is_compiling
else:  # delete with torch 2.2

    def is_compiling():
        """Whether torch.compile is tracing this call. A wrong False can cause a graph break, but no wrong result."""
        return False


if hasattr(F, "rms_norm"):
    rms_norm = F.rms_norm
else:  # delete with torch 2.4

    def rms_norm(x, shape, weight, eps):
        """x / sqrt(mean(x^2) + eps) * weight in float32, cast once at the end."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (weight * wide).to(x.dtype)


def load_without_data(path):
    """The tensors of a file by `torch.save`, on the meta device. From torch 2.1 on their data is not read from disk."""
    lazy = {"mmap": True} if "mmap" in inspect.signature(torch.load).parameters and zipfile.is_zipfile(path) else {}
    return torch.load(path, map_location="meta", weights_only=True, **lazy)


def has_accelerator():
    """Whether there is a device to which a model is likely to be moved after loading."""
    if hasattr(torch, "accelerator"):
        return torch.accelerator.is_available()
    return torch.cuda.is_available() or torch.backends.mps.is_available()  # delete with torch 2.6


def needs_dispatch(x):
    """Whether an op on x must go through torch's dispatcher.

    It must for gradients, compilation, tracing, dispatch modes, torch.func, forward-mode gradients and Tensor
    subclasses. Eager inference uses none of them and saves 10 to 25 microseconds per layer and token.
    """
    return (
        x.requires_grad
        or type(x) is not torch.Tensor
        or is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def has_global_hooks():
    """Whether hooks are registered for the forward of all modules."""
    module = torch.nn.modules.module
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


def changes_forward(module):
    """Whether calling the module does something else than its class's `forward`: hooks, compile(), or its own."""
    own = module.__dict__
    return module._forward_hooks or module._forward_pre_hooks or "forward" in own or own.get("_compiled_call_impl")


@contextlib.contextmanager
def without_cudnn_attention(lengths_vary):
    """Disable cuDNN's attention kernel if lengths vary from call to call, and another fused one is enabled.

    cuDNN builds a plan for every new length, which takes 40 ms on an H200: once per token while decoding.
    """
    flags = torch.backends.cuda
    avoided = lengths_vary and (flags.flash_sdp_enabled() or flags.mem_efficient_sdp_enabled())
    if not (avoided and hasattr(flags, "enable_cudnn_sdp") and flags.cudnn_sdp_enabled()):  # missing before torch 2.5
        yield
        return
    flags.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        flags.enable_cudnn_sdp(True)


def is_shared(*tensors):
    """Whether other tensors lie in the storage of these, which have one storage; True where torch cannot tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    owners = len(tensors) + 1  # with the object that stands for the storage here
    return count is None or count(tensors[0].untyped_storage()._cdata) > owners


@contextlib.contextmanager
def other_random_numbers():
    """The current GPU's generator has another state here: a capture that begins takes it, to refuse other threads."""
    if torch.__version__ >= (2, 13):  # a generator has a state for each capture
        yield
        return
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(torch.Generator(generator.device))
    try:
        yield
    finally:
        generator.graphsafe_set_state(state)


def forget_capture(pool):
    """Let torch allocate as before after a capture into this pool has failed, if it does not do so itself."""
    names = "_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"  # the second before torch 2.8
    end = next(getattr(torch._C, name) for name in names if hasattr(torch._C, name))
    with contextlib.suppress(RuntimeError):
        end(torch.cuda.current_device(), pool)


def autocast_dtype(kind):
    """The autocast dtype of this device type ("cpu", "cuda"), or None if autocast is disabled."""
    if kind == "meta":
        return None
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if kind == "cpu":  # delete with torch 2.4
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
