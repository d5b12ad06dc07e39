# syntax=docker/dockerfile:1
# Built in one stage, run in another that holds nothing but the binary, the certificates of the system and a volume.

FROM rust:1.95-slim-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY Cargo.toml Cargo.lock build.rs ./
COPY proto proto
COPY migrations migrations
COPY src src
# Nothing is built of them, but cargo wants to see every package of the workspace.
COPY benches/compare benches/compare
COPY examples/rust examples/rust
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/build/target \
    cargo build --release --locked --bin tidegate \
    && install -D target/release/tidegate /out/tidegate

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o 10001 -g 10001 -m 0700 /var/lib/tidegate
COPY --from=build /out/tidegate /usr/local/bin/tidegate

# A number, so that an orchestrator can see that it is not root.
USER 10001:10001
# Nothing else is written: the root can be read-only.
VOLUME /var/lib/tidegate
WORKDIR /var/lib/tidegate
EXPOSE 50051
# Within a container every address is the container's own: what may reach it is the network's decision. Operations and
# `tidegate.v1.Admin` stay on loopback: `docker exec CONTAINER tidegate admin stats`.
ENV TIDEGATE_LISTEN=0.0.0.0:50051 \
    TIDEGATE_INSECURE=true \
    TIDEGATE_DATA_DIR=/var/lib/tidegate
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s --retries=3 CMD ["tidegate", "health"]
ENTRYPOINT ["tidegate"]
CMD ["serve"]
