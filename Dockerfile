# The environment of the tests on a CPU, and the demo: docker build -t gkd . && docker run --rm -it gkd
# For a GPU take an image with CUDA as the base: torch comes with its own libraries, the driver is the host's.
FROM python:3.11-slim

RUN apt-get update \
  && apt-get install --yes --no-install-recommends build-essential git make \
  && rm -rf /var/lib/apt/lists/*

WORKDIR /gkd
COPY . .
RUN make install
RUN make fetch

CMD ["make", "demo"]
