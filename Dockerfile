# One image for every service; what a container is, its command and its environment say (compose.yaml).
FROM python:3.11-slim

# The CPU build of torch where the package index offers one, else the usual build. For CUDA:
#   --build-arg TORCH='torch>=2.11,<2.14'
# A further index is named with --build-arg PIP_EXTRA_INDEX_URL=...
ARG TORCH="torch==2.13.0+cpu"
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1

WORKDIR /app

# Slowest and least often changed first, so that a change of the code rebuilds only the last layer.
COPY constraints.txt ./
RUN pip install -c constraints.txt "${TORCH}" || pip install -c constraints.txt "torch>=2.11,<2.14"
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > /tmp/requirements.txt \
    && pip install -c constraints.txt -r /tmp/requirements.txt

COPY README.md LICENSE ./
COPY shared shared
COPY services services
COPY lemix lemix
RUN pip install --no-deps -e . \
    && useradd --uid 10001 --create-home lemix \
    && install -d -o lemix -g lemix runs shm

USER lemix
ENV PYTHONUNBUFFERED=1
EXPOSE 8000
# Refuses to start without keys (lemix keys create), which the folder runs keeps: mount a volume there.
CMD ["lemix", "up", "--host", "0.0.0.0"]
