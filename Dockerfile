# A Ray node, head or worker, with carclass' locked dependencies; the code itself travels with each job.
#   docker build -t carclass .
#   docker build --build-arg BASE=docker.io/library/python:3.11-slim-bookworm@sha256:… --build-arg DEVICE=cpu -t carclass:cpu .
#   docker build --target sbom --output sbom .    what is in it: sbom/carclass.cdx.json (CycloneDX)
# Every RUN is one script of cluster/image, so that tests/cluster/test_image.py can run these very lines without Docker.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
COPY requirements.lock /build/
COPY cluster/image /build/cluster/image
RUN /build/cluster/image/install.sh /opt/carclass
# cuda serves GPU and CPU nodes alike (with the NVIDIA container runtime); cpu leaves out a sixth of it, see device.sh.
ARG DEVICE=cuda
RUN /build/cluster/image/device.sh /opt/carclass "${DEVICE}"

FROM ${BASE} AS node
RUN --mount=type=bind,source=cluster/image,target=/image /image/system.sh
COPY --from=build /opt/carclass /opt/carclass
# For AWS: workers run watch_spot.py beside `ray start`, the head's autoscaler has spot_first.py.
COPY cluster/image/watch_spot.py cluster/image/spot_first.py /opt/carclass/bin/
# Ray takes HOME from here, not from the user: that is where `ray up` puts its files.
ENV HOME=/home/carclass \
    PATH=/opt/carclass/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token
USER 1000:1000
WORKDIR /home/carclass
# Each node's agent answers for its raylet, the head's for the GCS too; it asks for no token.
HEALTHCHECK --start-period=60s --interval=30s --timeout=10s \
    CMD ["wget", "-q", "-t", "1", "-T", "5", "-O", "-", "http://localhost:52365/api/healthz"]
# ray up and KubeRay give their own command; on its own the image is a head that only this machine can talk to, with
# the token of RAY_AUTH_TOKEN.
CMD ["ray", "start", "--head", "--block", "--dashboard-host=127.0.0.1"]

FROM node AS inventory
RUN --mount=type=bind,source=cluster/image,target=/image python /image/sbom.py carclass.cdx.json

FROM scratch AS sbom
COPY --from=inventory /home/carclass/carclass.cdx.json /

# Without --target, a node.
FROM node
