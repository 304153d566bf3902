# Images for prediction (small) and for training, and one with a trained run in it: make docker-build builds them.
#
#     docker build --target predict -t dida-tools:predict .
#     docker build --target train -t dida-tools:train --build-arg TORCH=cuda .      for NVIDIA GPUs
#
# The wheels bring the CUDA libraries: the host needs the driver and NVIDIA's container toolkit, the base image nothing.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS base
# rasterio's wheels take libexpat from the system, and slim images have none; Debian's newest is the one that is patched.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libexpat1 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /project
RUN install -d -o 1000 -g 1000 data logs predictions weights
# Whoever --user makes of it has neither a home nor a name.
ENV PATH=/venv/bin:$PATH HOME=/tmp USER=project PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# What prediction imports.
FROM base AS predict-packages
ARG TORCH=cpu
COPY constraints.txt .
# Where PyTorch's index of CPU builds cannot be reached, pip takes what it finds: on Linux perhaps gigabytes with CUDA.
RUN case "$TORCH" in cpu|cuda) ;; *) echo "TORCH is $TORCH: choose cpu or cuda."; exit 1 ;; esac \
    && python -m venv --without-pip /venv \
    && if [ "$TORCH" = cpu ]; then \
        pip --python /venv/bin/python install --no-cache-dir --constraint constraints.txt --no-deps \
            --extra-index-url https://download.pytorch.org/whl/cpu torch; \
    fi
# What your model needs besides: --build-arg PACKAGES="monai torchvision"
ARG PACKAGES=
# Left out: tests and headers of PyTorch's C++ part, a fifth of its CPU build.
RUN pip --python /venv/bin/python install --no-cache-dir --constraint constraints.txt \
        filelock numpy pillow rasterio torch tqdm ${PACKAGES} \
    && rm -rf /venv/lib/python3*/site-packages/torch/test \
        /venv/lib/python3*/site-packages/torch/include \
        /venv/lib/python3*/site-packages/torch/bin/*[Tt]est*

FROM predict-packages AS train-packages
RUN pip --python /venv/bin/python install --no-cache-dir --constraint constraints.txt matplotlib tensorboard

FROM base AS train
COPY --from=train-packages /venv /venv
COPY LICENSE* pyproject.toml *.py ./
COPY dida_tools dida_tools
COPY dida_core dida_core
USER 1000:1000
ENTRYPOINT ["python", "train.py"]

FROM base AS predict
COPY --from=predict-packages /venv /venv
COPY LICENSE* pyproject.toml *.py ./
COPY dida_tools dida_tools
COPY dida_core dida_core
USER 1000:1000
ENTRYPOINT ["python", "run_prediction.py"]

# One run: make docker-build RUN=NAME
FROM predict AS run
ARG RUN
COPY logs/${RUN}/config.json logs/${RUN}/config.json
COPY weights/${RUN}/best.pt weights/${RUN}/best.pt
# A model that needs a package which is not in the image fails here already: see PACKAGES.
RUN python -c "from dida_core.config.project import project_of; from dida_core.runs.lookup import read_run_config; \
    config = read_run_config('logs/${RUN}', project_of('dida_tools'), keys=('MODEL', 'MODEL_CONFIG')); \
    config['MODEL'](**config['MODEL_CONFIG'])"
ENTRYPOINT ["python", "run_prediction.py", "latest"]

# What is built without --target.
FROM predict
