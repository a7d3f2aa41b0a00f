"""config.json -> the config of a backbone; the one place from which a model's own code is run.

It runs only where it was asked for, and only from a commit of a hub repository that was named in
full: --trust_remote_code --revision COMMIT. Code that lies in a directory never runs, for who may
write there could change it after anybody has read it. An output directory has no copy of the code;
its auto_map says "owner/name--file.Class", and the same flags load it again.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankpo_fast.config import EncoderConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.directories import MODEL_FLAG, blaming, check_no_code, hub_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# transformers reads owner/name--file.Class; a file in a folder or above one is none of these.
REFERENCE = re.compile(r"(?:([\w.-]+/[\w.-]+)--)?(\w+\.\w+)")
CONFIG, MODEL = "AutoConfig", "AutoModel"


@dataclass(frozen=True)
class Code:
    """What may be run: of a repository, where it is known, one commit."""

    repository: str | None  # None: of a directory, whose config names it
    commit: str

    @classmethod
    def of(cls, config: EncoderConfig) -> "Code | None":
        if not config.trust_remote_code:
            return None
        assert config.revision is not None
        repository, _ = hub_name(config.model_name_or_path)
        return cls(repository, config.revision)


def load_config(folder: Path, code: Code | None = None) -> "PreTrainedConfig":
    """InputError for a config that names the model's own code, unless `code` allows it."""
    from transformers import AutoConfig

    path = folder / "config.json"
    if code is not None and _auto_map(path):
        config = _with_code(folder, code)
    else:
        check_no_code(path, MODEL, MODEL_FLAG)
        with blaming(f"{MODEL_FLAG} {folder}"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.is_encoder_decoder:
        raise InputError(f"{MODEL_FLAG} {folder}: an encoder-decoder ({config.model_type}) has no "
                         f"single sequence of states; give an encoder or a decoder")  # fmt: skip
    # Caches of keys and values serve generation alone; left on, packed texts can see each other.
    config.get_text_config().use_cache = False
    return config


def _auto_map(path: Path) -> dict[str, str]:
    """Of the config and the model; other heads are not used."""
    with blaming(f"{MODEL_FLAG} {path}"):
        content = json.loads(path.read_bytes())
    classes = content.get("auto_map") if isinstance(content, dict) else None
    classes = classes if isinstance(classes, dict) else {}
    return {kind: str(classes[kind]) for kind in (CONFIG, MODEL) if classes.get(kind)}


def _with_code(folder: Path, code: Code) -> "PreTrainedConfig":
    """The config by its own class, after which transformers knows the model's class for it."""
    from transformers import AutoModel
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    path = folder / "config.json"
    written = _auto_map(path)
    if written.keys() != {CONFIG, MODEL}:
        raise InputError(f"{MODEL_FLAG} {path}: auto_map must name a class for {CONFIG} and one "
                         f"for {MODEL}, so that no other model is changed")  # fmt: skip
    names = {kind: _reference(name, code, path) for kind, name in written.items()}
    if len({name.partition("--")[0] for name in names.values()}) > 1:
        raise InputError(f"{MODEL_FLAG} {path}: auto_map names classes of two repositories, but "
                         f"--revision is a commit of one")  # fmt: skip
    with blaming(f"{MODEL_FLAG} {folder}: its code at {code.commit}"):
        own: Any
        own, model = (
            get_class_from_dynamic_module(names[kind], str(folder), code_revision=code.commit)
            for kind in (CONFIG, MODEL)
        )
        # Not by transformers' trust_remote_code, which would copy the code into what is saved.
        AutoModel.register(own, model, exist_ok=True)
        config = own.from_pretrained(folder)
    config.auto_map = names
    return config


def _reference(name: str, code: Code, path: Path) -> str:
    """With its repository; InputError unless its code is of the commit."""
    found = REFERENCE.fullmatch(name)
    if found is None:
        raise InputError(f"{MODEL_FLAG} {path}: auto_map names {name!r}, but file.Class or "
                         f"owner/name--file.Class is expected")  # fmt: skip
    repository = found[1] or code.repository
    if repository is None:
        raise InputError(f"{MODEL_FLAG} {path}: auto_map names {name}, code of the directory "
                         f"itself, which is never run: give the model by its hub name")  # fmt: skip
    if code.repository not in (None, repository):
        raise InputError(f"{MODEL_FLAG} {path}: auto_map names code of {repository}, which a "
                         f"commit of {code.repository} does not pin")  # fmt: skip
    if os.path.isdir(repository):  # which transformers would take before the hub's
        raise InputError(f"{MODEL_FLAG} {path}: auto_map names code of {repository}, and a "
                         f"directory of that name is here: work elsewhere")  # fmt: skip
    return f"{repository}--{found[2]}"
