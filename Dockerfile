# One image for all jobs: the `rlhf` commands, and the steps that Vertex AI runs as custom jobs.
#
#   make image VARIANT=cpu                            (docker build --build-arg VARIANT=cpu ...)
#   docker run --rm rlhf:cpu quickstart --arch t5
#
# Never built so far: no Docker engine was available during development. Instead,
# tests/test_container.py lints this file and runs its steps as a script in an empty folder. Still
# untested: the base image's tag, the CUDA variants, a GPU's driver, and startup on Vertex.

# torch's wheels bring their own CUDA libraries, and the driver comes from the host. A base image
# with CUDA would therefore hold the same gigabytes twice. 3.11 is the Python of constraints.txt.
# Reproducible builds pass its digest (docs/vertex.md, section 3).
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
FROM ${PYTHON_IMAGE} AS base


FROM base AS dependencies

# The torch build, as PyTorch names it: cpu, or cu126, cu130 for GPUs. cu126 runs on driver 525 or
# newer and on Volta to Hopper; cu130 needs driver 580 and is required for Blackwell.
ARG VARIANT=cu126
ARG TORCH_INDEX=https://download.pytorch.org/whl/${VARIANT}

WORKDIR /build
COPY pyproject.toml constraints.txt ./
# pip stays outside the environment that it fills. The build's name is part of torch's pin, so that
# an index without it causes an error, not an image with another torch. torch's own requirements
# (nvidia-*, triton) are not in constraints.txt: each torch pins them exactly.
RUN python -m venv --without-pip /opt/venv \
    && python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*p['dependencies'], *p['optional-dependencies']['vertex'], sep='\n')" \
        > requirements.txt \
    && sed "s/^torch==.*/&+${VARIANT}/" constraints.txt > pins.txt \
    && pip --python /opt/venv/bin/python install --no-cache-dir \
        --extra-index-url "${TORCH_INDEX}" --constraint pins.txt --requirement requirements.txt


FROM dependencies AS package

COPY README.md LICENSE ./
COPY src src
# Into its own folder, so that a changed line of source adds a layer of megabytes to push and pull,
# not another copy of torch.
RUN pip wheel --no-cache-dir --no-deps --wheel-dir dist . \
    && pip --python /opt/venv/bin/python install --no-cache-dir --no-deps \
        --prefix /opt/rlhf dist/*.whl


FROM base

# A job installs nothing, so remove the base image's pip, and ensurepip, which could restore it.
# (The environment's own setuptools is a requirement of torch and stays.)
RUN python -m pip uninstall --yes pip setuptools wheel \
    && rm -r /usr/local/lib/python3.11/ensurepip
RUN useradd --uid 1000 --user-group --create-home rlhf

COPY --from=dependencies /opt/venv /opt/venv
COPY --from=package /opt/rlhf /opt/venv
COPY containers/entrypoint.sh /usr/local/bin/entrypoint.sh

# Vertex AI mounts the driver below /usr/local/nvidia and, unlike Docker's --gpus, sets no paths.
# The caches are set explicitly so that they stay writable if a platform sets another HOME.
ENV PATH=/opt/venv/bin:/usr/local/nvidia/bin:$PATH \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    HOME=/home/rlhf \
    HF_HOME=/home/rlhf/.cache/huggingface \
    RLHF_CACHE=/home/rlhf/.cache/rlhf \
    PYTHONUNBUFFERED=1

# As a number, so that Kubernetes can see that it is not root.
USER 1000:1000
WORKDIR /home/rlhf
ENTRYPOINT ["/usr/local/bin/entrypoint.sh"]
CMD ["--help"]

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="rlhf-ppo" \
    org.opencontainers.image.description="Reinforcement learning from human feedback for T5 and LLaMA models" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION:-unknown}"
