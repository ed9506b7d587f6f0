# Images to train with; docs/clusters.md ("The container image") has the commands. Targets:
#   cpu    BASE is python:3.11-slim by default
#   cuda   the same default: torch's wheels bring the CUDA libraries, and the host brings the driver. Or an image of
#          nvidia/cuda, or NVIDIA's PyTorch image, whose torch is kept.
# The entry point is that of BASE: docker run IMAGE mmmoe ..., IMAGE launch/torchrun.sh ..., IMAGE bash.
ARG BASE=python:3.11-slim

FROM ${BASE} AS system
# hadolint ignore=DL3008
RUN python3 -c 'import ensurepip, venv' 2>/dev/null || { \
      apt-get update \
      && apt-get install -y --no-install-recommends ca-certificates python3-venv \
      && rm -rf /var/lib/apt/lists/*; }
WORKDIR /opt/mmmoe
# Any user works, also one without a name (getpass reads LOGNAME): caches of Triton, matplotlib and others are under
# HOME, and /tmp is writable in each container.
ENV PATH=/opt/venv/bin:$PATH \
    VIRTUAL_ENV=/opt/venv \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    USER=mmmoe \
    LOGNAME=mmmoe
STOPSIGNAL SIGTERM

# Lists of what to install: the next stage is built again only where they differ.
FROM system AS requirements
ARG EXTRAS=remote
COPY pyproject.toml constraints.txt launch/image_requirements.py ./
RUN python3 image_requirements.py "$EXTRAS" /requirements

FROM system AS packages
# Options of pip for the build alone, e.g. the index of torch's builds for CPUs. What is secret belongs into a pip.conf:
# --secret id=pip.conf,src=FILE is mounted, and is in no layer.
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
COPY --from=requirements /requirements /requirements
# PIP_CONSTRAINT of BASE names other versions than those tested. The cache is a mount, and in no layer.
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/var/cache/pip --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    unset PIP_CONSTRAINT \
    && python3 -m venv --system-site-packages /opt/venv \
    && pip install --cache-dir /var/cache/pip -r /requirements/requirements.txt -c /requirements/constraints.txt

FROM system AS sources
COPY pyproject.toml README.md LICENSE ./
COPY examples examples
COPY configs configs
COPY tests/assets/mini tests/assets/mini
COPY launch launch
COPY data_prep data_prep
COPY mmmoe_pretrain mmmoe_pretrain
# data and runs are places to mount folders, where the configs look for them.
RUN mkdir data runs && chmod -R a+rX,go-w . && python3 -m compileall -q mmmoe_pretrain data_prep launch

FROM system AS cpu
COPY --from=packages /opt/venv /opt/venv
COPY --from=sources /opt/mmmoe /opt/mmmoe
RUN pip install --no-cache-dir --no-index --no-deps --no-build-isolation -e . && rm -rf ./*.egg-info
ARG BASE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="MMMoE" \
      org.opencontainers.image.description="Multimodal mixture-of-experts pretraining, on CPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.base.name="$BASE"
USER 10001:10001
CMD ["mmmoe", "--help"]

FROM system AS cuda
# Triton compiles what starts its kernels (g++, Python.h); without libibverbs NCCL would use TCP on InfiniBand.
# hadolint ignore=DL3008,SC2086
RUN lacks=""; \
    command -v g++ >/dev/null || lacks="g++"; \
    test -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
      || lacks="$lacks python3-dev"; \
    python3 -c 'import ctypes; ctypes.CDLL("libibverbs.so.1")' 2>/dev/null \
      || lacks="$lacks libibverbs1 ibverbs-providers librdmacm1"; \
    if [ -n "$lacks" ]; then \
      apt-get update \
      && apt-get install -y --no-install-recommends $lacks \
      && rm -rf /var/lib/apt/lists/*; \
    fi
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages /opt/venv /opt/venv
COPY --from=sources /opt/mmmoe /opt/mmmoe
RUN pip install --no-cache-dir --no-index --no-deps --no-build-isolation -e . && rm -rf ./*.egg-info
ARG BASE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="MMMoE" \
      org.opencontainers.image.description="Multimodal mixture-of-experts pretraining, on NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.base.name="$BASE"
USER 10001:10001
CMD ["mmmoe", "--help"]
