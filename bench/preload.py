"""What the server of processes imports, once, so that those forked from it need not.

None of it may touch a GPU, which a process forked afterwards could not use. transformers and
accelerate import torchao and bitsandbytes where these are installed, which ask a GPU for its kind
as they are imported: they are hidden meanwhile. Who trains with them imports them then.
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

HIDDEN = {name for name in ("torchao", "bitsandbytes") if name not in sys.modules}
sys.modules.update(dict.fromkeys(HIDDEN))  # type: ignore[arg-type]  # None: not to be had
for name in IMPORTED:
    with suppress(ModuleNotFoundError):  # what is not installed is skipped
        importlib.import_module(name)
for name in HIDDEN:
    del sys.modules[name]
