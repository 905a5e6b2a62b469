# em-inf-server as two images (docs/images.md). Each RUN is one of scripts/image-*.sh, which the tests run too.
#
#   docker build --target cpu --tag em-inf-server:cpu .      vLLM's CPU build, at the versions of `make serve`
#   docker build --target cuda --tag em-inf-server:cuda .    vLLM's own image, with this project added
#
# scripts/image-build.sh does the same and sets VERSION, from pyproject.toml, and REVISION, the commit.

# The digest is of the index of all machines. The registry takes no other image for it, whoever moves the tag.
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm@sha256:d29f48a31a8b408ed19272ca1e7b10ebae13b240a27e862d3d4217c528e2e0c3
# The release that requirements/cuda.lock pins. A release build (scripts/image-build.sh) takes it by digest.
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

# The files of this repository that both images install, with the scripts that install them: what serves, and no more.
FROM scratch AS source
COPY scripts/image-project.sh scripts/image-notices.py scripts/pinned.sh /scripts/
COPY requirements/cpu.lock requirements/cuda.lock /requirements/
COPY pyproject.toml README.md LICENSE /
COPY answers /answers
COPY em_sampler /em_sampler
COPY server /server
COPY demo /demo

# Packages first: they take minutes to install and seldom change.
FROM ${PYTHON_IMAGE} AS cpu-build
WORKDIR /src
COPY scripts/image-packages.sh scripts/pinned.sh scripts/
COPY requirements/cpu.lock requirements/cpu-dev.lock requirements/torch-cpu.txt requirements/
RUN ["scripts/image-packages.sh", "/opt/em", "cpu"]
RUN --mount=type=bind,from=source,target=/source ["/source/scripts/image-project.sh", "/opt/em/bin/python", "cpu"]

FROM ${PYTHON_IMAGE} AS cpu
COPY scripts/image-system.sh /usr/local/sbin/
RUN ["image-system.sh", "libnuma1"]
COPY --from=cpu-build /opt/em /opt/em
# This image has no compiler. With both variables, vLLM runs as plain Python what torch would otherwise compile.
ENV PATH=/opt/em/bin:$PATH TORCHDYNAMO_DISABLE=1 VLLM_USE_AOT_COMPILE=0
ENV PYTHONUNBUFFERED=1 HOME=/home/em HF_HOME=/models VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="em-inf-server" \
      org.opencontainers.image.description="vLLM's OpenAI-compatible server with entropy minimisation, on the CPU" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /home/em
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "from http.client import *; c = HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); exit(c.getresponse().status != 200)"]
ENTRYPOINT ["em-serve"]
CMD ["--host", "0.0.0.0", "--port", "8000"]

FROM ${VLLM_IMAGE} AS cuda
USER 0
COPY scripts/image-system.sh /usr/local/sbin/
RUN ["image-system.sh"]
RUN --mount=type=bind,from=source,target=/source ["/source/scripts/image-project.sh", "python3", "cuda"]
# torch loads compiled code from this folder. Its default is under /tmp, which is often mounted noexec.
ENV TORCHINDUCTOR_CACHE_DIR=/home/em/.cache/torchinductor
ENV PYTHONUNBUFFERED=1 HOME=/home/em HF_HOME=/models VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="em-inf-server" \
      org.opencontainers.image.description="vLLM's OpenAI-compatible server with entropy minimisation, on CUDA" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /home/em
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "from http.client import *; c = HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); exit(c.getresponse().status != 200)"]
ENTRYPOINT ["em-serve"]
CMD ["--host", "0.0.0.0", "--port", "8000"]
