//! The command line: every flag of `serve`, and `--data-dir`, has an environment variable of the same name with `TRAILER_`
//! before it.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, builder::NonEmptyStringValueParser};

use edge::{health::Question, telemetry, tls::ServerFiles};

use crate::{access::Role, build::Build, token::JwksSource};

/// The catalogue of container images that workspaces are built from.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the program can do.
#[expect(clippy::large_enum_variant, reason = "a process has one")]
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the catalogue and dispatch builds to workers.
    Serve(Config),
    /// Print a bearer token, signed with the key pair of the data directory.
    Token(TokenArgs),
    /// Ask a program whether it serves: for health checks of containers. Ends with 0 if it does.
    Health(Question),
}

/// How to serve.
#[derive(Clone, Debug, Args)]
pub struct Config {
    /// The address to listen on.
    #[arg(long, env = "TRAILER_LISTEN", default_value = "127.0.0.1:50051")]
    pub listen: SocketAddr,

    /// The directory of the SQLite database and of the key pair that tokens are signed with; made when missing.
    #[arg(long, env = "TRAILER_DATA_DIR", default_value = "./data")]
    pub data_dir: PathBuf,

    /// The Postgres database (15 or later) to keep the catalogue in, `postgres://user:password@host/name`; it must exist.
    /// SQLite in the data directory when absent.
    #[arg(long, env = "TRAILER_DATABASE_URL", hide_env_values = true, value_parser = postgres_url)]
    pub database_url: Option<String>,

    /// Listen beyond loopback although the traffic, tokens included, is not encrypted: for a network that is trusted.
    #[arg(long, env = "TRAILER_ALLOW_PLAINTEXT", value_parser = clap::builder::FalseyValueParser::new())]
    pub allow_plaintext: bool,

    #[command(flatten)]
    pub tls: ServerFiles,

    /// Accept the tokens of an identity provider: signed with EdDSA, RS256 or ES256 by a key of this JWKS, a file (read
    /// again when it changes) or an http or https URL. The key pair of the data directory is not trusted then.
    #[arg(long, env = "TRAILER_JWKS", value_name = "FILE|URL")]
    pub jwks: Option<JwksSource>,

    /// How often the URL of the JWKS is fetched again; also at once, every 10 s at most, when a token names an unknown key.
    #[arg(long, env = "TRAILER_JWKS_REFRESH", default_value = "5m", requires = "jwks", value_parser = humantime::parse_duration)]
    pub jwks_refresh: Duration,

    /// Accept only tokens with this `iss`.
    #[arg(long, env = "TRAILER_ISSUER", requires = "jwks", value_parser = NonEmptyStringValueParser::new())]
    pub issuer: Option<String>,

    /// Accept only tokens whose `aud` is this, or contains it.
    #[arg(long, env = "TRAILER_AUDIENCE", requires = "jwks", value_parser = NonEmptyStringValueParser::new())]
    pub audience: Option<String>,

    /// The claim with the roles: an array, or one text with spaces between. Roles that mean nothing here are ignored.
    #[arg(
        long,
        env = "TRAILER_ROLES_CLAIM",
        default_value = "roles",
        requires = "jwks",
        value_parser = NonEmptyStringValueParser::new()
    )]
    pub roles_claim: String,

    /// Let callers in who have no token: as `anonymous`, with the role builder. For trying out on one's own machine only,
    /// and refused unless --listen is a loopback address.
    #[arg(long, env = "TRAILER_ANONYMOUS", value_parser = clap::builder::FalseyValueParser::new())]
    pub anonymous: bool,

    /// Where images may be tagged by callers other than admins; derived references lie under the first. Repeatable.
    #[arg(
        long = "repository-prefix",
        env = "TRAILER_REPOSITORY_PREFIX",
        value_delimiter = ',',
        default_value = "trailer/"
    )]
    pub repository_prefixes: Vec<String>,

    /// How often workers say that they live.
    #[arg(long, env = "TRAILER_HEARTBEAT", default_value = "1s", value_parser = humantime::parse_duration)]
    pub heartbeat: Duration,

    /// After how much silence a worker counts as offline.
    #[arg(long, env = "TRAILER_OFFLINE_AFTER", default_value = "5s", value_parser = humantime::parse_duration)]
    pub offline_after: Duration,

    /// After how much silence a worker begins to stop its builds by itself.
    #[arg(long, env = "TRAILER_STOP_AFTER", default_value = "30s", value_parser = humantime::parse_duration)]
    pub stop_after: Duration,

    /// How long a worker may take to stop a build; then a cancelled build counts as cancelled all the same.
    #[arg(long, env = "TRAILER_STOP_WITHIN", default_value = "10s", value_parser = humantime::parse_duration)]
    pub stop_within: Duration,

    /// After how much silence the builds of a worker are given to others.
    #[arg(long, env = "TRAILER_LEASE", default_value = "45s", value_parser = humantime::parse_duration)]
    pub lease: Duration,

    /// How often the infrastructure may fail a build before the build fails.
    #[arg(long, env = "TRAILER_MAX_ATTEMPT_FAILURES", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    pub max_attempt_failures: u16,

    /// How long a build waits for its next attempt after the first failure of the infrastructure that its worker reports; the pause
    /// doubles with each further failure, up to 30s. 0s for no pause.
    #[arg(long, env = "TRAILER_RETRY_BACKOFF", default_value = "1s", value_parser = humantime::parse_duration)]
    pub retry_backoff: Duration,

    /// How long a build may be in the queue, counted from when it was queued first; then it fails with the kind TIMEOUT.
    #[arg(long, env = "TRAILER_QUEUE_TIMEOUT", default_value = "24h", value_parser = humantime::parse_duration)]
    pub queue_timeout: Duration,

    /// How many builds of one caller may be in the queue; 0 for any number.
    #[arg(long, env = "TRAILER_MAX_PENDING_BUILDS", default_value_t = 2000)]
    pub max_pending_builds: u64,

    /// How many plain calls one caller may make a second, those of one second at once; 0 for any number. A call that asks for more
    /// counts as several: 1 more for each 16 KiB of a write's message, 10 targets of a batch, 100 images of a page (10 with their
    /// configurations); 10 for a watch with a search term. Workers are not counted.
    #[arg(long, env = "TRAILER_MAX_CALL_RATE", default_value_t = 2000)]
    pub max_call_rate: u32,

    /// How many calls of one caller may be under way at a time, watches and uploads aside; 0 for any number. Workers are not
    /// counted.
    #[arg(long, env = "TRAILER_MAX_CALLS", default_value_t = 100)]
    pub max_calls: u32,

    /// How many watches and uploads one caller may have open at a time; 0 for any number.
    #[arg(long, env = "TRAILER_MAX_STREAMS", default_value_t = 1000)]
    pub max_streams: u32,

    /// How many bytes of memory the index of all images may have, which lists, searches and reads are answered from. What would not
    /// fit is refused when it is written, so that the service can always start again. At least 1 MiB.
    #[arg(long, env = "TRAILER_INDEX_MEMORY", default_value_t = 3 << 30, value_parser = clap::value_parser!(u64).range(1 << 20..=1 << 50))]
    pub index_memory: u64,

    /// How many images one creator may have; 0 for any number.
    #[arg(long, env = "TRAILER_MAX_IMAGES", default_value_t = 100_000)]
    pub max_images: u64,

    /// How many bytes of --index-memory the images of one creator may have, their grants included; 0 for any number.
    #[arg(long, env = "TRAILER_MAX_IMAGE_BYTES", default_value_t = 1 << 30)]
    pub max_image_bytes: u64,

    /// How many builds of an image are kept, with their logs; of the older ones that of its artifact. Others are forgotten soon
    /// after a build of the image has ended, in any case within a few hours.
    #[arg(long, env = "TRAILER_RETAIN_BUILDS", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub retain_builds: u32,

    /// For how long changes are kept that a watch can be resumed from.
    #[arg(long, env = "TRAILER_RETAIN_CHANGES", default_value = "24h", value_parser = humantime::parse_duration)]
    pub retain_changes: Duration,

    /// How many bytes an uploaded build context may have, also when it is unpacked.
    #[arg(long, env = "TRAILER_CONTEXT_LIMIT", default_value_t = 256 * 1024 * 1024, value_parser = clap::value_parser!(u64).range(1024..=1 << 40))]
    pub context_limit: u64,

    /// For how long an uploaded build context is kept that no image names; at least 1s.
    #[arg(long, env = "TRAILER_RETAIN_CONTEXTS", default_value = "24h", value_parser = humantime::parse_duration)]
    pub retain_contexts: Duration,

    /// How long calls under way may go on after SIGTERM.
    #[arg(long, env = "TRAILER_DRAIN_GRACE", default_value = "30s", value_parser = humantime::parse_duration)]
    pub drain_grace: Duration,

    #[command(flatten)]
    pub telemetry: telemetry::Options,
}

/// Which token to print.
#[derive(Debug, Args)]
pub struct TokenArgs {
    /// The data directory of the image-service that shall accept the token.
    #[arg(long, env = "TRAILER_DATA_DIR", default_value = "./data")]
    pub data_dir: PathBuf,

    /// Whom the token names: a user, a service, or a worker by its name.
    #[arg(long)]
    pub subject: String,

    /// What the subject may do beyond its own images: admin, builder, service or worker. Repeatable.
    #[arg(long = "role")]
    pub roles: Vec<Role>,

    /// How long the token is valid.
    #[arg(long, default_value = "24h", value_parser = humantime::parse_duration)]
    pub ttl: Duration,
}

/// Takes the URL of a Postgres database. What is wrong is said without the URL, which may hold a password.
fn postgres_url(url: &str) -> Result<String, String> {
    if url.starts_with("postgres://") || url.starts_with("postgresql://") {
        Ok(url.to_owned())
    } else {
        Err("must begin with postgres://".to_owned())
    }
}

impl Config {
    /// Checks what no single flag can: `Err` says which flags do not fit, and why.
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
        if self.lease < self.stop_after + self.stop_within + self.heartbeat {
            return Err("--lease must be at least --stop-after, --stop-within and --heartbeat together: \
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
