//! The command line. Every flag of `serve`, and `--data-dir`, can also be set by an environment variable: the
//! name of the flag prefixed with `TRAILER_`.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, builder::NonEmptyStringValueParser};

use service_runtime::{health::HealthCheck, telemetry, tls::ServerFiles};

use crate::{access::Role, build::Build, jwt::JwksSource};

/// The catalogue of container images that workspaces are built from.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Cli {
    /// Subcommand to run.
    #[command(subcommand)]
    pub command: Command,
}

/// Subcommands of the program.
#[expect(clippy::large_enum_variant, reason = "a process has one")]
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the catalogue and dispatch builds to workers.
    Serve(Config),
    /// Print a bearer token signed with the key pair of the data directory.
    Token(TokenArgs),
    /// Check whether a program is serving, for health checks of containers. Exits with status 0 if it is.
    Health(HealthCheck),
}

/// Flags of `serve`.
#[derive(Clone, Debug, Args)]
pub struct Config {
    /// Address to listen on.
    #[arg(long, env = "TRAILER_LISTEN", default_value = "127.0.0.1:50051")]
    pub listen: SocketAddr,

    /// Directory of the SQLite database and of the key pair that signs tokens; created if missing.
    #[arg(long, env = "TRAILER_DATA_DIR", default_value = "./data")]
    pub data_dir: PathBuf,

    /// Postgres database (15 or later) that holds the catalogue, as `postgres://user:password@host/name`; it
    /// must exist. Without this flag, the catalogue is in a SQLite database in the data directory.
    #[arg(long, env = "TRAILER_DATABASE_URL", hide_env_values = true, value_parser = postgres_url)]
    pub database_url: Option<String>,

    /// Listen beyond loopback even though the traffic, including tokens, is not encrypted; only for trusted
    /// networks.
    #[arg(long, env = "TRAILER_ALLOW_PLAINTEXT", value_parser = clap::builder::FalseyValueParser::new())]
    pub allow_plaintext: bool,

    #[command(flatten)]
    pub tls: ServerFiles,

    /// Accept the tokens of an identity provider, signed with EdDSA, RS256 or ES256 by a key of this JWKS: a
    /// file (read again when it changes) or an http or https URL. The key pair of the data directory is then
    /// not trusted.
    #[arg(long, env = "TRAILER_JWKS", value_name = "FILE|URL")]
    pub jwks: Option<JwksSource>,

    /// Interval at which the JWKS is fetched from its URL; a token with an unknown key triggers a fetch too,
    /// at most every 10 s.
    #[arg(long, env = "TRAILER_JWKS_REFRESH", default_value = "5m", requires = "jwks", value_parser = humantime::parse_duration)]
    pub jwks_refresh: Duration,

    /// Accept only tokens with this `iss`.
    #[arg(long, env = "TRAILER_ISSUER", requires = "jwks", value_parser = NonEmptyStringValueParser::new())]
    pub issuer: Option<String>,

    /// Accept only tokens whose `aud` is or contains this value.
    #[arg(long, env = "TRAILER_AUDIENCE", requires = "jwks", value_parser = NonEmptyStringValueParser::new())]
    pub audience: Option<String>,

    /// Accept tokens of any issuer for any audience that a key of --jwks has signed, if --issuer or --audience
    /// is not given. On a loopback address this is the default.
    #[arg(long, env = "TRAILER_ANY_ISSUER_AND_AUDIENCE", requires = "jwks", value_parser = clap::builder::FalseyValueParser::new())]
    pub any_issuer_and_audience: bool,

    /// Claim that holds the roles, by its name, or by a path such as `realm_access.roles`: an array, or a string of
    /// roles separated by spaces. Unknown roles are ignored.
    #[arg(
        long,
        env = "TRAILER_ROLES_CLAIM",
        default_value = "roles",
        requires = "jwks",
        value_parser = NonEmptyStringValueParser::new()
    )]
    pub roles_claim: String,

    /// Claim that holds the groups, by its name or path: an array, or a string of groups separated by spaces. Images
    /// can be granted to groups.
    #[arg(
        long,
        env = "TRAILER_GROUPS_CLAIM",
        default_value = "groups",
        requires = "jwks",
        value_parser = NonEmptyStringValueParser::new()
    )]
    pub groups_claim: String,

    /// Claim, by its name or path, that holds the pools of a worker, or those that a caller may use: an array, or a string of names
    /// separated by spaces. A token without it has the pool `default`; one with any other value is refused.
    #[arg(
        long,
        env = "TRAILER_POOLS_CLAIM",
        default_value = "pools",
        requires = "jwks",
        value_parser = NonEmptyStringValueParser::new()
    )]
    pub pools_claim: String,

    /// Admit callers without a token as `anonymous` with the role builder. For local trials only: rejected
    /// unless --listen is a loopback address.
    #[arg(long, env = "TRAILER_ANONYMOUS", value_parser = clap::builder::FalseyValueParser::new())]
    pub anonymous: bool,

    /// Repository prefix below which each creator has a directory for its images; derived references use the
    /// first one. Only admins name images elsewhere. Repeatable.
    #[arg(
        long = "repository-prefix",
        env = "TRAILER_REPOSITORY_PREFIX",
        value_delimiter = ',',
        default_value = "trailer.invalid/"
    )]
    pub repository_prefixes: Vec<String>,

    /// Interval between the heartbeats of a worker.
    #[arg(long, env = "TRAILER_HEARTBEAT", default_value = "1s", value_parser = humantime::parse_duration)]
    pub heartbeat: Duration,

    /// Time without contact after which a worker counts as offline.
    #[arg(long, env = "TRAILER_OFFLINE_AFTER", default_value = "5s", value_parser = humantime::parse_duration)]
    pub offline_after: Duration,

    /// Time without contact after which a worker begins to stop its builds by itself.
    #[arg(long, env = "TRAILER_STOP_AFTER", default_value = "30s", value_parser = humantime::parse_duration)]
    pub stop_after: Duration,

    /// Maximum time for a worker to stop a build; after that, a cancelled build counts as cancelled even if
    /// unconfirmed.
    #[arg(long, env = "TRAILER_STOP_TIMEOUT", default_value = "10s", value_parser = humantime::parse_duration)]
    pub stop_timeout: Duration,

    /// Time without contact after which the builds of a worker are assigned to other workers.
    #[arg(long, env = "TRAILER_LEASE", default_value = "45s", value_parser = humantime::parse_duration)]
    pub lease: Duration,

    /// Number of infrastructure failures after which a build fails.
    #[arg(long, env = "TRAILER_MAX_ATTEMPT_FAILURES", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    pub max_attempt_failures: u16,

    /// Pause before the next attempt after the first infrastructure failure that a worker reports; it doubles
    /// with each further failure, up to 30s. 0s for no pause.
    #[arg(long, env = "TRAILER_RETRY_BACKOFF", default_value = "1s", value_parser = humantime::parse_duration)]
    pub retry_backoff: Duration,

    /// Maximum time in the queue, counted from when a build was first queued; after that, it fails with the
    /// kind TIMEOUT.
    #[arg(long, env = "TRAILER_QUEUE_TIMEOUT", default_value = "24h", value_parser = humantime::parse_duration)]
    pub queue_timeout: Duration,

    /// Maximum time that an attempt at a build may run, also if the configuration of the image allows more or
    /// sets no limit; after that, it fails with the kind TIMEOUT. At least 1s.
    #[arg(long, env = "TRAILER_MAX_BUILD_TIME", default_value = "24h", value_parser = humantime::parse_duration)]
    pub max_build_time: Duration,

    /// Maximum number of queued builds per caller; 0 for no limit.
    #[arg(long, env = "TRAILER_MAX_PENDING_BUILDS", default_value_t = 2000)]
    pub max_pending_builds: u64,

    /// Maximum number of running builds per caller; 0 for no limit. Further ones stay in the queue, and hold
    /// up nobody else's.
    #[arg(long, env = "TRAILER_MAX_RUNNING_BUILDS", default_value_t = 0)]
    pub max_running_builds: u64,

    /// Maximum size of a build's log, in bytes, with 32 more counted for each event; at least 64 KiB. What a
    /// worker reports beyond it is left out; a worker's own limit is its --log-limit.
    #[arg(long, env = "TRAILER_MAX_LOG_BYTES", default_value_t = 1 << 30, value_parser = clap::value_parser!(u64).range(1 << 16..=1 << 40))]
    pub max_log_bytes: u64,

    /// Maximum call rate per caller, in units per second, with bursts of up to one second's worth; 0 for no
    /// limit. An expensive call counts as several: 1 more for each 16 KiB of a write's message, 10 targets of
    /// a batch, or 100 images of a page (10 with their configurations), and 10 for a watch with a search
    /// term. Workers are exempt.
    #[arg(long, env = "TRAILER_MAX_CALL_RATE", default_value_t = 2000)]
    pub max_call_rate: u32,

    /// Maximum number of concurrent calls per caller, not counting watches and uploads; 0 for no limit.
    /// Workers are exempt.
    #[arg(long, env = "TRAILER_MAX_CALLS", default_value_t = 100)]
    pub max_calls: u32,

    /// Maximum number of open watches and uploads per caller; 0 for no limit.
    #[arg(long, env = "TRAILER_MAX_STREAMS", default_value_t = 1000)]
    pub max_streams: u32,

    /// Maximum memory of the index of all images, in bytes; at least 1 MiB. Lists, searches and reads are
    /// served from the index. A write that would exceed the limit is rejected, so that the service can always
    /// start again.
    #[arg(long, env = "TRAILER_INDEX_MEMORY", default_value_t = 3 << 30, value_parser = clap::value_parser!(u64).range(1 << 20..=1 << 50))]
    pub index_memory: u64,

    /// Maximum number of images per creator; 0 for no limit.
    #[arg(long, env = "TRAILER_MAX_IMAGES", default_value_t = 100_000)]
    pub max_images: u64,

    /// Maximum share of --index-memory per creator, in bytes, including grants; 0 for no limit.
    #[arg(long, env = "TRAILER_MAX_IMAGE_BYTES", default_value_t = 256 << 20)]
    pub max_image_bytes: u64,

    /// Free disk space of --data-dir with a SQLite database in it, in bytes, below which nothing is added to the
    /// catalogue; it is left for the reports of running builds.
    #[arg(long, env = "TRAILER_MIN_FREE_DISK", default_value_t = 32 << 20)]
    pub min_free_disk: u64,

    /// Number of builds per image that are kept with their logs; of the older ones, only the build of the
    /// artifact is kept. The rest is removed soon after a build of the image ends, and within a few hours in
    /// any case.
    #[arg(long, env = "TRAILER_RETAIN_BUILDS", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub retain_builds: u32,

    /// Retention period of changes, and so the time for which a watch can be resumed.
    #[arg(long, env = "TRAILER_RETAIN_CHANGES", default_value = "24h", value_parser = humantime::parse_duration)]
    pub retain_changes: Duration,

    /// Maximum size of an uploaded build context in bytes, both as uploaded and unpacked.
    #[arg(long, env = "TRAILER_CONTEXT_LIMIT", default_value_t = 256 * 1024 * 1024, value_parser = clap::value_parser!(u64).range(1024..=1 << 40))]
    pub context_limit: u64,

    /// Maximum size of all uploaded build contexts that are kept per caller, in bytes; 0 for no limit.
    #[arg(long, env = "TRAILER_MAX_CONTEXT_BYTES", default_value_t = 10 << 30)]
    pub max_context_bytes: u64,

    /// Retention period of an uploaded build context that no image refers to; at least 1s.
    #[arg(long, env = "TRAILER_RETAIN_CONTEXTS", default_value = "24h", value_parser = humantime::parse_duration)]
    pub retain_contexts: Duration,

    /// Grace period for calls in progress after SIGTERM.
    #[arg(long, env = "TRAILER_DRAIN_GRACE", default_value = "30s", value_parser = humantime::parse_duration)]
    pub drain_grace: Duration,

    #[command(flatten)]
    pub telemetry: telemetry::Options,
}

/// Flags of `token`.
#[derive(Debug, Args)]
pub struct TokenArgs {
    /// Data directory of the image-service that is to accept the token.
    #[arg(long, env = "TRAILER_DATA_DIR", default_value = "./data")]
    pub data_dir: PathBuf,

    /// Subject of the token: a user, a service, or the name of a worker.
    #[arg(long)]
    pub subject: String,

    /// Role of the subject: admin, builder, service or worker. Repeatable.
    #[arg(long = "role")]
    pub roles: Vec<Role>,

    /// Group of the subject, which images can be granted to. Repeatable.
    #[arg(long = "group", value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub groups: Vec<String>,

    /// Pool that a worker serves, or that a caller may use; `default` if absent. Repeatable.
    #[arg(long = "pool", value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub pools: Vec<String>,

    /// Lifetime of the token.
    #[arg(long, default_value = "24h", value_parser = humantime::parse_duration)]
    pub ttl: Duration,
}

/// Checks the URL of a Postgres database. The error omits the URL, which may contain a password.
fn postgres_url(url: &str) -> Result<String, String> {
    if url.starts_with("postgres://") || url.starts_with("postgresql://") {
        Ok(url.to_owned())
    } else {
        Err("must begin with postgres://".to_owned())
    }
}

impl Config {
    /// Checks the rules that involve several flags or are not checked by the parser of a flag.
    ///
    /// # Errors
    ///
    /// Returns a message that names the flags and the violated rule.
    pub fn check(&self) -> Result<(), String> {
        if !self.listen.ip().is_loopback() && self.tls.tls_cert.is_none() && !self.allow_plaintext {
            return Err(format!(
                "--listen {} is beyond loopback and the traffic is not encrypted: give --tls-cert and --tls-key, or \
                 --allow-plaintext if the network is trusted",
                self.listen
            ));
        }
        if self.anonymous && !self.listen.ip().is_loopback() {
            return Err(format!(
                "--anonymous lets in whoever can connect: it is for loopback addresses alone, and --listen is {}",
                self.listen
            ));
        }
        let names_both = self.issuer.is_some() && self.audience.is_some();
        if self.jwks.is_some()
            && !names_both
            && !self.any_issuer_and_audience
            && !self.listen.ip().is_loopback()
        {
            return Err(
                "--jwks needs --issuer and --audience: or tokens that the provider has issued for others \
                        would be accepted. If they are to be, give --any-issuer-and-audience"
                    .to_owned(),
            );
        }
        if self.max_build_time < Duration::from_secs(1) {
            return Err("--max-build-time must be at least 1s".to_owned());
        }
        if self.jwks_refresh < Duration::from_secs(1) {
            return Err("--jwks-refresh must be at least 1s".to_owned());
        }
        if self.retain_contexts < Duration::from_secs(1) {
            return Err("--retain-contexts must be at least 1s".to_owned());
        }
        if self.heartbeat < Duration::from_millis(10) {
            return Err("--heartbeat must be at least 10ms".to_owned());
        }
        if self.offline_after < self.heartbeat * 2 {
            return Err("--offline-after must be at least twice --heartbeat".to_owned());
        }
        if self.stop_after < self.offline_after {
            return Err("--stop-after must not be shorter than --offline-after".to_owned());
        }
        if self.retry_backoff > Build::MAX_BACKOFF {
            return Err("--retry-backoff must be at most 30s".to_owned());
        }
        if self.lease < self.stop_after + self.stop_timeout + self.heartbeat {
            return Err("--lease must be at least --stop-after, --stop-timeout and --heartbeat together: \
                        or a build could run twice"
                .to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(flags: &[&str]) -> Option<String> {
        let cli = Cli::try_parse_from(["image-service", "serve"].iter().chain(flags)).expect("known flags");
        match cli.command {
            Command::Serve(config) => config.check().err(),
            Command::Token(_) | Command::Health(_) => None,
        }
    }

    #[test]
    fn times_that_do_not_fit_each_other_are_refused() {
        for (flags, flag) in [
            (["--heartbeat", "1ms"].as_slice(), "--heartbeat"),
            (&["--offline-after", "1999ms"], "--offline-after"),
            (&["--stop-after", "4s"], "--stop-after"),
            (&["--lease", "40s"], "--lease"),
            (&["--retain-contexts", "999ms"], "--retain-contexts"),
            (&["--max-build-time", "0s"], "--max-build-time"),
            (&["--retry-backoff", "31s"], "--retry-backoff"),
            (&["--jwks", "keys.json", "--jwks-refresh", "0s"], "--jwks-refresh"),
        ] {
            let refusal = refusal(flags).unwrap_or_default();
            assert!(refusal.starts_with(flag), "{flags:?}: {refusal:?}");
        }
        assert_eq!(refusal(&[]), None);
        let beyond = ["--listen", "0.0.0.0:50051"];
        assert!(refusal(&beyond).unwrap_or_default().contains("--allow-plaintext"));
        assert_eq!(refusal(&[beyond.as_slice(), &["--allow-plaintext"]].concat()), None);
        let encrypted = ["--tls-cert", "cert.pem", "--tls-key", "key.pem"];
        assert_eq!(refusal(&[beyond.as_slice(), &encrypted].concat()), None);
        let unknown_callers = refusal(&[beyond.as_slice(), &encrypted, &["--anonymous"]].concat());
        assert!(unknown_callers.unwrap_or_default().starts_with("--anonymous"));
        assert_eq!(refusal(&["--lease", "41s", "--offline-after", "2s"]), None);
        let provider =
            [beyond.as_slice(), &encrypted, &["--jwks", "keys.json", "--issuer", "https://id.example"]]
                .concat();
        assert!(refusal(&provider).unwrap_or_default().starts_with("--jwks needs"));
        assert_eq!(refusal(&[provider.as_slice(), &["--audience", "images"]].concat()), None);
        assert_eq!(refusal(&[provider.as_slice(), &["--any-issuer-and-audience"]].concat()), None);
        assert_eq!(refusal(&["--jwks", "keys.json"]), None, "on loopback");
    }

    #[test]
    fn an_index_has_some_memory() {
        let parse = |bytes| Cli::try_parse_from(["image-service", "serve", "--index-memory", bytes]);
        for bytes in ["0", "1048575", "-1", "2GiB"] {
            assert!(parse(bytes).is_err(), "{bytes}");
        }
        assert!(parse("1048576").is_ok());
    }
}
