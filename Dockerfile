# CPU by default; for GPUs: docker build --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 .
ARG BASE=python:3.11-slim
FROM ${BASE}

ARG BASE
RUN if ! command -v python3 >/dev/null; then \
        apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*; \
    fi

RUN useradd --create-home mmhf
USER mmhf
WORKDIR /home/mmhf/mm_hf
ENV PATH=/home/mmhf/venv/bin:$PATH

COPY --chown=mmhf setup.py pyproject.toml constraints.txt README.md ./
COPY --chown=mmhf mm_hf mm_hf
COPY --chown=mmhf examples examples
RUN python3 -m venv /home/mmhf/venv \
    && python3 -m pip install --no-cache-dir --constraint constraints.txt '.[examples]'

# docker run IMAGE examples/run_image_classification.py examples/recipes/digits.yaml
ENTRYPOINT ["accelerate", "launch"]
CMD ["examples/demo.py"]
