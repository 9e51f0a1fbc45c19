# One image for every role: a Ray head or worker, a job, an endpoint, a command by itself.
#
#   docker build --tag mimray:0.1.0 .                                 # for NVIDIA GPUs
#   docker build --tag mimray:0.1.0-cpu --build-arg TORCH_BACKEND=cpu .
#
# docs/cluster.md says how each role is started, and which driver the GPUs need.

FROM python:3.11.14-slim-bookworm AS build

# The backend by which uv picks torch's wheel; empty takes PyPI's, whose CUDA is in constraints.txt.
ARG TORCH_BACKEND=""

# Builds in isolation take their tools from the same list of versions.
ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_BUILD_CONSTRAINT=/build/constraints.txt

RUN pip install --no-cache-dir uv==0.13.9 \
    && uv venv /opt/mimray
ENV VIRTUAL_ENV=/opt/mimray

# Dependencies first: they are 5 GB and change seldom.
WORKDIR /build
COPY pyproject.toml constraints.txt ./
RUN uv pip install --no-cache ${TORCH_BACKEND:+--torch-backend "$TORCH_BACKEND"} \
        --constraint constraints.txt --extra onnx --extra otel --extra postgresql --requirements pyproject.toml

# `mimray/` links to the packages beside it.
COPY README.md LICENSE ./
COPY mimray mimray
COPY service service
COPY trainers trainers
COPY tuning tuning
COPY serving serving
RUN uv pip install --no-cache --no-deps . \
    && uv pip check


FROM python:3.11.14-slim-bookworm

# g++: `torch.compile` and DeepSpeed's offload build their kernels when they are first used.
# wget: KubeRay asks a serving node for its health by it. tini: reaps orphaned processes.
# hadolint ignore=DL3008,SC2016
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ tini wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home mimray \
    # A login shell sets PATH anew.
    && echo 'PATH=/opt/mimray/bin:$PATH' > /etc/profile.d/mimray.sh

COPY --from=build /opt/mimray /opt/mimray
COPY deploy/image/healthy.py deploy/image/leave.py /opt/mimray/deploy/

# Serve's settings are those of `mimray serve`: whatever node of a cluster serves has them.
ENV PATH=/opt/mimray/bin:$PATH \
    MIMRAY_PYTHON=/opt/mimray/bin/python \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_SERVE_ENABLE_HA_PROXY=1 \
    RAY_SERVE_HAPROXY_BINARY_PATH=/opt/mimray/lib/python3.11/site-packages/mimray/serving/deploy/haproxy.sh \
    RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=1 \
    RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT=1 \
    RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S=60 \
    RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S=300 \
    RAY_SERVE_HAPROXY_TUNE_BUFSIZE=1048576 \
    RAY_SERVE_HAPROXY_MAXCONN=4096 \
    MIMRAY_REQUESTS_PER_SOURCE=512 \
    RAY_SERVE_HAPROXY_RETRIES=3 \
    RAY_SERVE_HAPROXY_RETRY_ON="conn-failure empty-response junk-response"

# By number, so that Kubernetes can see that it is not root.
USER 1000:1000
WORKDIR /home/mimray

HEALTHCHECK --interval=15s --timeout=10s --start-period=120s \
    CMD ["python", "/opt/mimray/deploy/healthy.py"]

ENTRYPOINT ["tini", "--"]
CMD ["mimray", "doctor"]
