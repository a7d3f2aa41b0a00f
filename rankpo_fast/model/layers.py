"""What is done to a backbone's layers for training, whatever the model: checkpointed, compiled."""

from typing import TYPE_CHECKING

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

    def checkpoint(self) -> None:
        """From now on."""
        older = self._backbone.gradient_checkpointing_enable  # its name in the first versions of 5
        enable = getattr(self._backbone, "activation_checkpointing_enable", older)
        enable({"use_reentrant": False})
        self.checkpointed = True
        if self._compiled:
            self.compile()

    def compile(self) -> None:
        """Each layer by itself: they share one build, and between them nothing is gained.

        Of checkpointed layers the parts: where something in a layer cannot be compiled (attention
        on the CPU), the compiler gives up a checkpointed one as a whole, and only where there are
        gradients, so that dropout would not be drawn again as it was.
        """
        for module in self._compiled:
            module._compiled_call_impl = None  # what nn.Module.compile set; it has no way back
        lists = [m for m in self._backbone.modules() if isinstance(m, nn.ModuleList)]
        inner = {id(m) for outer in lists for m in outer.modules() if m is not outer}
        layers = [layer for m in lists if id(m) not in inner for layer in m] or [self._backbone]
        if self.checkpointed:
            layers = [part for layer in layers for part in layer.children()]
        for layer in layers:
            layer.compile(dynamic=True)
        self._compiled = layers
