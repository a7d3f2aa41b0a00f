"""What is done to a backbone's layers for training, whatever the model: checkpointed, compiled."""

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Layers:
    """Those of a backbone. Both methods change it in place, and no parameter's name.

    Attributes:
        checkpointed: whether a layer keeps what goes into it alone, and is computed again for the
            backward pass. It changes no bit of the gradient.
    """

    def __init__(self, backbone: "PreTrainedModel"):
        self._backbone = backbone
        self._compiled: list[nn.Module] = []
        self.checkpointed = False

    @property
    def can_checkpoint(self) -> bool:
        return self._backbone.supports_gradient_checkpointing

    @property
    def compiled(self) -> bool:
        return bool(self._compiled)

    def checkpoint(self, on: bool = True) -> None:
        """From now on, or no longer."""
        if on:
            self._change("enable", {"use_reentrant": False})
        elif self.checkpointed:
            self._change("disable")
        self.checkpointed = on
        if self._compiled:
            self.compile()

    def _change(self, how: str, *arguments: Any) -> None:
        older = getattr(
            self._backbone, f"gradient_checkpointing_{how}"
        )  # in the first versions of 5
        getattr(self._backbone, f"activation_checkpointing_{how}", older)(*arguments)

    def compile(self) -> None:
        """Each layer by itself: they share one build, and between them nothing is gained.

        Of checkpointed layers the parts: where something in a layer cannot be compiled (attention
        on the CPU), the compiler gives up a checkpointed one as a whole, and only where there are
        gradients, so that dropout would not be drawn again as it was.
        """
        self.uncompile()
        layers = outermost_layers(self._backbone) or [self._backbone]
        if self.checkpointed:
            layers = [part for layer in layers for part in layer.children()]
        for layer in layers:
            layer.compile(dynamic=True)
        self._compiled = layers

    def uncompile(self) -> None:
        for module in self._compiled:
            module._compiled_call_impl = None  # what nn.Module.compile set; it has no way back
        self._compiled = []


def outermost_layers(backbone: nn.Module) -> list[nn.Module]:
    """Those of the backbone's lists of modules that lie in no other."""
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList)]
    inner = {id(m) for outer in lists for m in outer.modules() if m is not outer}
    return [layer for module in lists if id(module) not in inner for layer in module]
