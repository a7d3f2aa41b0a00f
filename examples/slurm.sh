#!/bin/bash
# Stage 1 on several nodes: `sbatch examples/slurm.sh`. One torchrun a node starts a process a card.
# The model's files, the rows, --output_dir and --cache_dir must be visible to all nodes.
#SBATCH --job-name=rankpo-fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300  # 5 minutes before the end: finish the step, save, stop
#SBATCH --requeue          # a job that goes on finds its checkpoint by --auto_resume
#SBATCH --open-mode=append
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
cards=${SLURM_GPUS_ON_NODE:-8}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240  # seconds that torchrun leaves for that step and its checkpoint
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / cards))

# --kill-on-bad-exit: a node that fails ends the others at once, which would wait for it.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" --nproc_per_node "$cards" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:29500" \
    -m rankpo_fast.cli contrastive \
    --model_name_or_path Qwen/Qwen3-Embedding-8B \
    --train_data stage1.jsonl \
    --output_dir outputs/stage1 \
    --cache_dir outputs/cache \
    --per_device_train_batch_size 128 \
    --shard full \
    --auto_resume
