# Postgres as Debian packages it, with the interface that is used here of the image of that name on Docker Hub.
FROM trailer-images/debian
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends postgresql && \
    rm -rf /var/lib/apt/lists/* /var/lib/postgresql && install -d -o postgres -g postgres /var/lib/postgresql /var/lib/postgresql/data
COPY postgres-entrypoint /usr/local/bin/
USER postgres
VOLUME /var/lib/postgresql/data
EXPOSE 5432
HEALTHCHECK --interval=2s --start-period=30s CMD ["pg_isready", "--host=127.0.0.1", "--quiet"]
STOPSIGNAL SIGINT
ENTRYPOINT ["/usr/local/bin/postgres-entrypoint"]
