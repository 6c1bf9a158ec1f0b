"""Which blocks compute what their classes say, so that code which computes all of them at once may stand in for them.

That code is blocks_cpu on a CPU and blocks_cuda on a GPU; the modules are the reference of both.
"""

from typing import Optional, Sequence, Tuple

from torch import Tensor, nn

from .quantization import QuantizedLinear
from .torch_compat import autocast_dtype, changes_forward, has_global_hooks
from .transformers_compat import growing_layers

FUNCTIONS = ("rotate", "gated", "linear", "rms_norm")  # of modeling_chatglm, which the modules call


class NotServed(Exception):
    """The modules have to compute these blocks."""


def require(served: bool) -> None:
    if not served:
        raise NotServed


class PlainBlocks:
    """Blocks of these classes, as they are now: GLMBlock, SelfAttention, MLP, RMSNorm and Linear.

    Blocks with adapters or hooks, of subclasses, or with methods or functions that other code has replaced are left to
    the modules. `namespace` is that of their file.
    """

    def __init__(self, namespace: dict, block: type, attention: type, mlp: type, norm: type, linear: type):
        self.namespace, self.functions = namespace, {name: namespace[name] for name in FUNCTIONS}
        self.block, self.attention, self.mlp = (block,), (attention,), (mlp,)  # what may stand in which place
        self.norm, self.linear = (norm,), (linear, QuantizedLinear)
        classes = *self.block, *self.attention, *self.mlp, *self.norm, *self.linear
        self.methods = {cls: {k: v for k, v in vars(cls).items() if callable(v)} for cls in classes}

    def layers(self, blocks: Sequence[nn.Module], x: Tensor, cache) -> list:
        """The cache's layers, which hold tokens, one for each block; nothing changes what the classes compute."""
        require(autocast_dtype(x.device.type) is None and not has_global_hooks() and self.is_unchanged())
        layers = growing_layers(cache)
        require(0 < len(layers) == len(blocks))
        return layers

    def is_unchanged(self) -> bool:
        functions = all(self.namespace.get(name) is function for name, function in self.functions.items())
        return functions and all(vars(c).get(k) is v for c, methods in self.methods.items() for k, v in methods.items())

    def parts(self, block: nn.Module, i: int) -> Tuple[nn.Module, Sequence[nn.Module], Sequence[nn.Module]]:
        """The attention, the norms and the linear layers of block i, which has to compute what its classes say."""
        check = self.check
        parts = check(block, self.block)._modules.get
        attention, mlp = check(parts("self_attention"), self.attention), check(parts("mlp"), self.mlp)
        norms = check(parts("input_layernorm"), self.norm), check(parts("post_attention_layernorm"), self.norm)
        linears = [attention._modules.get(name) for name in ("query_key_value", "dense")]
        linears += [mlp._modules.get(name) for name in ("dense_h_to_4h", "dense_4h_to_h")]
        for linear in linears:
            require("bias" in check(linear, self.linear)._parameters)  # not an attribute or a buffer, which none reads
        dropout = parts("dropout")
        require(dropout is not None and not (dropout.training or attention.training))
        require(not (block.residual_after_norm or "add" in vars(block)))
        require(attention.layer_idx == i and not attention.interleaved)
        return attention, norms, linears

    @staticmethod
    def check(module: Optional[nn.Module], classes: Tuple[type, ...]) -> nn.Module:
        """The module, if it is of one of these classes and calling it does what its class says."""
        require(type(module) in classes and not changes_forward(module))
        return module
