"""`rankpo-fast plan`: what a training takes of a GPU, and the settings that fit it best."""

import json

from rankpo_fast.config import ModelConfig, PlanConfig
from rankpo_fast.data.files import whole_file
from rankpo_fast.errors import InputError
from rankpo_fast.plan.gpus import gpu_of
from rankpo_fast.plan.report import as_json, as_text, shortage
from rankpo_fast.plan.search import Asked, find, would_fit


def run(model: ModelConfig, config: PlanConfig) -> None:
    """InputError where nothing fits, after what was found has been printed."""
    asked = Asked(
        model=model,
        gpu=gpu_of(config.gpu),
        rows=config.per_device_train_batch_size,
        negatives=config.num_negatives,
        optim=config.optim,
        offload=tuple(config.offload),
        shard=config.shard,
        processes=config.processes,
        host_bytes=None if config.host_gb is None else config.host_gb * 1e9,
        method=config.method,
    )
    plan = find(asked)
    print(json.dumps(as_json(plan), indent=2) if config.json else as_text(plan))
    if config.picture is not None:
        from rankpo_fast.plan.picture import png

        with whole_file(config.picture) as temporary:
            temporary.write_bytes(png(plan))
    if not plan.fits:
        raise InputError(shortage(plan, would_fit(asked)), "gpu")
