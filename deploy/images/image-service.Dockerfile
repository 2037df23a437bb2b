# image-service and what it links to, made by deploy/images/build: nothing else is in it.
FROM scratch
COPY root/ /
COPY --chown=65532:65532 state/ /var/lib/trailer/
COPY program /usr/local/bin/image-service
USER 65532:65532
ENV TRAILER_DATA_DIR=/var/lib/trailer \
    TRAILER_LISTEN=0.0.0.0:50051 \
    TRAILER_LOG_FORMAT=json \
    TRAILER_HEALTH_URL=http://127.0.0.1:50051
VOLUME /var/lib/trailer
EXPOSE 50051
HEALTHCHECK --interval=5s --timeout=4s --start-period=30s CMD ["/usr/local/bin/image-service", "health"]
ENTRYPOINT ["/usr/local/bin/image-service"]
CMD ["serve"]
