# A Ray node, head or worker, with carclass' locked dependencies; the code itself travels with each job.
#   docker build --build-arg BASE=docker.io/library/python:3.11-slim-bookworm@sha256:… -t carclass .
# torch brings its CUDA libraries along: the same image serves CPU and GPU nodes (with the NVIDIA container runtime).
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /build
COPY requirements.lock ./
COPY cluster/image cluster/image
RUN cluster/image/install.sh /opt/carclass

FROM ${BASE}
RUN useradd --create-home --uid 1000 --shell /bin/bash carclass
COPY --from=build /opt/carclass /opt/carclass
ENV PATH=/opt/carclass/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token
USER carclass
WORKDIR /home/carclass
# ray up and KubeRay give their own command; on its own the image is a head that only this machine can talk to.
CMD ["ray", "start", "--head", "--block", "--dashboard-host=127.0.0.1"]
