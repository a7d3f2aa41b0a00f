# rankpo-fast with CUDA:
#     docker build -t rankpo-fast .
#     docker run --rm --gpus all -v "$PWD:/work" rankpo-fast contrastive --train_data rows.jsonl --output_dir outputs ...
# /work is the container's directory, and has to be writable by its user, 1000, or that of `--user`.
FROM pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# g++ for the native library; it stays, since Triton compiles its launchers with a C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends cmake g++ make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/rankpo-fast
COPY pyproject.toml setup.py CMakeLists.txt MANIFEST.in README.md LICENSE ./
COPY kernels kernels
COPY rankpo_fast rankpo_fast
# torch and Triton are the image's own, which fit each other.
RUN python -m pip freeze | grep -iE '^(torch|triton)==' > /tmp/constraints.txt \
    && PIP_BREAK_SYSTEM_PACKAGES=1 python -m pip install --no-cache-dir --constraint /tmp/constraints.txt '.[train,plots,label,liger]' \
    && rm /tmp/constraints.txt

# Triton's and torch's compiled kernels, the hub's models and prepared texts are kept in the home directory.
ENV HOME=/home/rankpo
RUN mkdir --mode 1777 "$HOME" /work
USER 1000
WORKDIR /work
# Ends the build where the native library is missing.
RUN python -c 'from rankpo_kernels.chunked import native; assert native.library() is not None'
ENTRYPOINT ["rankpo-fast"]
