# build-worker, git, and what they link to, made by deploy/images/build: nothing else is in it.
FROM scratch
COPY root/ /
COPY --chown=65532:65532 state/ /var/spool/trailer/
COPY program /usr/local/bin/build-worker
USER 65532:65532
ENV TRAILER_SPOOL_DIR=/var/spool/trailer \
    TRAILER_DOCKER_CONFIG=/etc/trailer/docker \
    TRAILER_LISTEN=0.0.0.0:50052 \
    TRAILER_LOG_FORMAT=json \
    TRAILER_HEALTH_URL=http://127.0.0.1:50052
VOLUME /var/spool/trailer
EXPOSE 50052
HEALTHCHECK --interval=5s --timeout=4s --start-period=30s CMD ["/usr/local/bin/build-worker", "health"]
ENTRYPOINT ["/usr/local/bin/build-worker"]
