"""What the server of processes imports, once, so that those forked from it need not.

None of it may touch a GPU, which a process forked afterwards could not use. transformers imports
torchao where that is installed, and torchao asks a GPU for its kind as it is imported: it is hidden
meanwhile. Who trains with it imports it then.
"""

import importlib
import sys
from contextlib import suppress

IMPORTED = [
    f"{__package__}.scaling", f"{__package__}.training.end_to_end", "rankpo_fast.train.contrastive",
    "rankpo_fast.retrieval.evaluate", "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3",
    "datasets", "accelerate", "sentence_transformers.sentence_transformer.losses",
]  # fmt: skip

hidden = sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]
for name in IMPORTED:
    with suppress(ModuleNotFoundError):  # what is not installed is skipped
        importlib.import_module(name)
if hidden is None:
    del sys.modules["torchao"]
