# PhiSight in a container. docs/containers.md says how it is built and run.
FROM python:3.11.13-slim-bookworm

# cpu, or cuda: PyPI's own wheels of torch, which bring CUDA's libraries and are far larger.
ARG TORCH=cpu
# More packages of Debian, such as espeak-ng for spoken answers.
ARG PACKAGES=""

# Debian keeps one version of a package in a release: a pinned one is gone after its next repair.
# hadolint ignore=DL3008,SC2086
RUN apt-get update \
 && apt-get install --yes --no-install-recommends make $PACKAGES \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 phisight \
 && install --directory --owner=phisight --group=phisight /phisight

USER 1000
WORKDIR /phisight
ENV PATH=/phisight/.venv/bin:$PATH \
    HF_HOME=/phisight/cache/huggingface \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# What `make demo` installs, in a layer that stays while only the code changes.
COPY --chown=1000:1000 Makefile requirements.txt ./
RUN case "$TORCH" in \
      cpu) export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
      cuda) ;; \
      *) echo "TORCH=$TORCH: is neither cpu nor cuda" >&2; exit 2 ;; \
    esac \
 && make .venv/demo.stamp

COPY --chown=1000:1000 . .
RUN mkdir -p runs cache
VOLUME ["/phisight/runs", "/phisight/cache"]

# app.py; serve.py listens at 8000
EXPOSE 7860 8000
CMD ["python", "-m", "tools.demo"]
