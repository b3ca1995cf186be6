# A CPU image by default. For GPUs:
#   docker build --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 --tag mm-hf:cuda .
# PyTorch comes from PyPI, whose Linux wheels may carry CUDA; a smaller CPU image takes PyTorch's own index:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu --tag mm-hf:cpu .
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

RUN if ! python3 -c 'import ensurepip' 2>/dev/null; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*; \
    fi

RUN useradd --create-home mmhf
USER mmhf
WORKDIR /home/mmhf/mm_hf
ENV PATH=/home/mmhf/venv/bin:$PATH

COPY --chown=mmhf setup.py pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=mmhf mm_hf mm_hf
COPY --chown=mmhf examples examples
ARG PIP_EXTRA_INDEX_URL
RUN python3 -m venv /home/mmhf/venv \
    && python3 -m pip install --no-cache-dir --constraint constraints.txt '.[examples]'

# docker run --gpus all IMAGE examples/run_image_classification.py examples/recipes/digits.yaml
# Options of accelerate launch come first: docker run IMAGE --num_processes 2 --cpu examples/demo.py
ENTRYPOINT ["accelerate", "launch"]
CMD ["examples/demo.py"]
