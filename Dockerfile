# The image of an ETL pod: the official Python on Alpine, cloudpickle, the runtime, and the bytecode of what it imports.
#
#   docker build -t ais-runtime-min:3.13 .                        one small layer on the official image, which others share
#   docker build -t ais-runtime-min:3.13-flat --target flat .     one layer in all, without what no pod needs
#
# Build arguments: PYTHON_VERSION, 3.9 to 3.15, that of the interpreter that pickles the classes; EXTRAS, fastapi or flask;
# PACKAGES and OS_PACKAGES, as the pod's variables of these names.
ARG PYTHON_VERSION=3.13

FROM python:${PYTHON_VERSION}-alpine AS slim
ARG PYTHON_VERSION
ARG EXTRAS=""
ARG PACKAGES=""
ARG OS_PACKAGES=""
WORKDIR /code

# One step, and so one layer; what it needs of the project is mounted and leaves nothing behind. (The cache of podman and
# buildah does not look into what is mounted, BuildKit's does: with them build by --no-cache after a change.)
#
# pip must not leave the bytecode of itself and of half the library, 9 MB: PYTHONDONTWRITEBYTECODE. It compiles what it
# installs all the same. What a pod imports of the library is compiled here, these modules and no more, since the official
# image ships no bytecode and a pod that is not root can write none: without it a start takes six times as long. With
# no_debug_ranges it is without the columns for the carets of tracebacks, a quarter of its bytes; line numbers stay.
#
# bootstrap.py, which AIStore's specs name, is that bytecode of the runtime: the interpreter knows it by its first bytes
# and not by its name, and so whoever runs it starts without compiling, which would make that half as long again; so does
# a pod that starts over. It is a hard link: through a symbolic one the interpreter would
# look for modules in __pycache__, and not in /code, where an image that builds on this one may put its own. The source
# stays beside it, for people, and for the lines in tracebacks.
RUN --mount=type=bind,target=/context \
    set -eu; \
    export PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore; \
    install -m 644 /context/ais_runtime_min.py .; \
    requirements="$(python /context/tests/image/requirements.py "$EXTRAS")"; \
    PACKAGES="$requirements${PACKAGES:+,$PACKAGES}" python ais_runtime_min.py install; \
    python -X no_debug_ranges /context/tests/image/bytecode.py ais_runtime_min.py; \
    ln __pycache__/ais_runtime_min.*.pyc bootstrap.py

ENV PYTHONUNBUFFERED=1
LABEL org.opencontainers.image.title="ais-runtime-min" \
      org.opencontainers.image.description="The small ETL runtime for NVIDIA AIStore" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.base.name="docker.io/library/python:${PYTHON_VERSION}-alpine"
EXPOSE 8000
# No USER: OS_PACKAGES wants root. Without them any user does: --user 65532 --read-only --cap-drop ALL.
HEALTHCHECK --interval=10s --timeout=5s CMD ["sh", "-c", "wget -q -T 4 -O /dev/null http://127.0.0.1:${PORT:-8000}/health"]
ENTRYPOINT ["python", "/code/bootstrap.py"]

# What no pod needs at run time. pip stays, for PACKAGES, and so do the headers, since packages may be built from source.
FROM slim AS stripped
RUN set -eu; \
    library="$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"; \
    rm -rf "$library"/ensurepip "$library"/idlelib "$library"/lib2to3 "$library"/pydoc_data "$library"/test \
           "$library"/tkinter "$library"/turtle.py "$library"/turtledemo "$library"/__phello__ "$library"/config-* \
           "$library"/lib-dynload/_tkinter.* "$library"/lib-dynload/_test* "$library"/lib-dynload/_ctypes_test.* \
           "$library"/lib-dynload/_xxtestfuzz.* "$library"/lib-dynload/xx*; \
    rm -rf /usr/local/share/man /usr/local/bin/idle* /usr/local/bin/pydoc* /usr/local/bin/2to3*

FROM scratch AS flat
# The whole file system, which DL3067 warns of, is what this image is to be: one layer without what the steps above removed.
# hadolint ignore=DL3067
COPY --from=stripped / /
# A new start forgets what the official image and the stage above have set.
ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1
WORKDIR /code
LABEL org.opencontainers.image.title="ais-runtime-min" \
      org.opencontainers.image.description="The small ETL runtime for NVIDIA AIStore" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="MIT"
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s CMD ["sh", "-c", "wget -q -T 4 -O /dev/null http://127.0.0.1:${PORT:-8000}/health"]
ENTRYPOINT ["python", "/code/bootstrap.py"]

FROM slim
