# A Ray node, head or worker, with carclass' locked dependencies; jobs bring the code.
#   make image                 CUDA; also serves nodes without GPUs
#   make image DEVICE=cpu      CPU only
#   make sbom                  software bill of materials: build/sbom/carclass.cdx.json (CycloneDX)
# Every RUN is one script of cluster/image, so that tests/cluster/test_image.py can run these lines without Docker.
ARG BASE

# BASE has no default: `make image` gives the base image by its digest in cluster/image/base.digest. Without make:
#   docker build --build-arg BASE=docker.io/library/python:3.11-slim-bookworm@sha256:… .
FROM ${BASE} AS build
COPY requirements.lock /build/
COPY cluster/image /build/cluster/image
RUN /build/cluster/image/install.sh /opt/carclass
# cuda is for GPU and CPU nodes (with the NVIDIA container runtime); cpu is a sixth smaller, see device.sh.
ARG DEVICE=cuda
RUN /build/cluster/image/device.sh /opt/carclass "${DEVICE}"

FROM ${BASE} AS node
RUN --mount=type=bind,source=cluster/image,target=/image /image/system.sh
COPY --from=build /opt/carclass /opt/carclass
# For AWS: workers run watch_spot.py beside `ray start`, the head's autoscaler uses spot_first.py. For TLS: certificates.py.
COPY cluster/image/watch_spot.py cluster/image/spot_first.py cluster/image/certificates.py /opt/carclass/bin/
# Ray reads HOME from the environment: `ray up` copies its files there.
ENV HOME=/home/carclass \
    PATH=/opt/carclass/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
WORKDIR /home/carclass
# Each node's agent reports the health of its raylet, the head's also of the GCS, without a token.
HEALTHCHECK --start-period=60s --interval=30s --timeout=10s \
    CMD ["wget", "-q", "-t", "1", "-T", "5", "-O", "-", "http://localhost:52365/api/healthz"]
# `ray up` and KubeRay override the command. By default the image is a head on loopback with the token RAY_AUTH_TOKEN.
CMD ["ray", "start", "--head", "--block", "--dashboard-host=127.0.0.1"]

FROM node AS inventory
COPY requirements.lock cluster/image/detectron2.lock /locks/
RUN --mount=type=bind,source=cluster/image,target=/image python /image/sbom.py carclass.cdx.json \
    /locks/requirements.lock /locks/detectron2.lock

FROM scratch AS sbom
COPY --from=inventory /home/carclass/carclass.cdx.json /

# The default target.
FROM node
