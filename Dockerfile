# `gem-st serve` on CPUs, by a user without rights. docs/serve.md says how it is built and run.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# Where torch has its builds for CPUs; empty for PyPI's, which brings CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore

WORKDIR /src
COPY constraints.txt ./
RUN pip install --constraint constraints.txt setuptools \
    && pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint constraints.txt "$(grep '^torch==' constraints.txt)"

# What the package needs, before its code: a change of the code does not install it again.
COPY pyproject.toml ./
COPY gem_st/_version.py gem_st/
RUN touch README.md LICENSE \
    && pip install --constraint constraints.txt --no-build-isolation ".[serve,lora]"
COPY README.md LICENSE ./
COPY gem_st gem_st
RUN pip install --no-build-isolation --no-deps --force-reinstall .

RUN useradd --uid 10001 --create-home gem && install --directory --owner gem /home/gem/.cache/huggingface
ENV HF_HOME=/home/gem/.cache/huggingface PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/gem

EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["gem-st", "serve", "--host", "0.0.0.0"]
