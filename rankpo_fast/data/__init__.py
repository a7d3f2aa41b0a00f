"""From JSONL files to what a training step needs: rows -> token tables -> batches."""
