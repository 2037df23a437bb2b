# The registry as Debian packages it, without passwords: it is published on the loopback only.
FROM trailer-images/debian
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends docker-registry && \
    rm -rf /var/lib/apt/lists/* && install -d -o docker-registry -g docker-registry /var/lib/docker-registry
COPY registry.yaml /etc/docker/registry/config.yml
USER docker-registry
VOLUME /var/lib/docker-registry
EXPOSE 5000
ENTRYPOINT ["docker-registry", "serve", "/etc/docker/registry/config.yml"]
