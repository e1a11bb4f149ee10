# One image for every service; what a container is, its command and its environment say (compose.yaml).

# The list of dependencies alone, so that other changes of pyproject.toml do not install them anew.
FROM python:3.11-slim AS requirements
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > /requirements.txt

FROM python:3.11-slim AS dependencies
# A CPU build of torch, from PyTorch's own index of CPU builds or another one that PIP_EXTRA_INDEX_URL names: on PyPI
# there is none. For CUDA: TORCH='torch>=2.11,<2.14' (compose.gpu.yaml).
ARG TORCH="torch==2.13.0+cpu"
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /app

# Slowest and least often changed first. What only builds against torch, or tests it, is left out: 190 MB.
COPY constraints.txt ./
RUN { pip install -c constraints.txt "${TORCH}" \
      || { echo "No index has ${TORCH}: name one that does with the build argument PIP_EXTRA_INDEX_URL" >&2; exit 1; }; } \
    && cd "$(python -c 'import site; print(site.getsitepackages()[0])')/torch" \
    && rm -rf test include \
    && find bin -type f ! -name torch_shm_manager -delete
COPY --from=requirements /requirements.txt ./
RUN pip install -c constraints.txt -r requirements.txt
# Volumes that are mounted here begin with these owners and modes.
RUN useradd --uid 10001 --create-home lemix \
    && install -d -o lemix -g lemix runs shm nats_users \
    && cd nats_users && install -d -o lemix -g lemix -m 0700 gateway ingest operator scheduler stage_worker trainer

FROM dependencies AS code
RUN pip install 'setuptools>=77'
COPY pyproject.toml README.md LICENSE ./
COPY shared shared
COPY services services
COPY lemix lemix
# With its bytecode, which each start would otherwise compile.
RUN pip install --no-deps --no-build-isolation --root /installed .

# A change of the code rebuilds only this layer.
FROM dependencies
COPY --from=code /installed /
USER lemix
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
EXPOSE 8000
# Refuses to start without keys (lemix keys create), which the folder runs keeps: mount a volume there.
CMD ["lemix", "up", "--host", "0.0.0.0"]
