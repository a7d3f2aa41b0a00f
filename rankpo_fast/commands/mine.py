"""`rankpo-fast mine`: rows of stage 1 with the hard negatives that a model finds for them."""

from functools import partial

from rankpo_fast.config import ComputeConfig, EncoderConfig, MineConfig, MineOutputConfig
from rankpo_fast.data.rows import write_jsonl
from rankpo_fast.functions import mined
from rankpo_fast.model.load import load_encoder
from rankpo_fast.ranks import Ranks


def run(
    model: EncoderConfig, config: MineConfig, output: MineOutputConfig, compute: ComputeConfig
) -> None:
    """Raises InputError for what the user can put right, most of it before the model is loaded."""
    with Ranks.joined(compute) as ranks:
        load = partial(load_encoder, model, device=ranks.device)
        found = mined(load, config, compute, progress=ranks.first, ranks=ranks)
        if ranks.first:
            write_jsonl(output.output_file, found.rows)
            negatives = sum(len(row.negatives) for row in found.examples)
            count = f"{len(found.examples):,} rows with {negatives:,} negatives"
            print(found.summary())
            print(f"{count} in {output.output_file}")
        ranks.meet()
