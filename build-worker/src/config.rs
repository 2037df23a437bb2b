//! Command line. Every flag has an environment variable of the same name with the prefix `TRAILER_`.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::{Parser, Subcommand};
use http::Uri;
use service_runtime::{health::HealthCheck, telemetry, tls::ServerFiles};

use crate::{
    egress::{AllowedRemote, EgressRules},
    engine_support::{self, Exceptions},
    image_gc::ImageGc,
    secrets::SecretStore,
    source_rules::{Pattern, SourceRules},
};

/// Runs Docker builds for an image-service.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<HealthCommand>,
    /// Flags of the default command, for `--help` and to reject unknown flags.
    #[command(flatten)]
    _flags: Option<Config>,
}

#[derive(Debug, Subcommand)]
enum HealthCommand {
    /// Check whether a program is serving, for health checks of containers. Exits with 0 if it is.
    Health(HealthCheck),
}

/// The command to run.
#[derive(Debug)]
pub enum Command {
    /// The worker, which takes builds.
    Work(Box<Config>),
    /// A health check of a program.
    Health(HealthCheck),
}

impl Cli {
    /// Parses the command line; exits the process if it is invalid.
    pub fn parse_command() -> Command {
        match Self::parse().command {
            Some(HealthCommand::Health(check)) => Command::Health(check),
            None => Command::Work(Box::new(Config::parse())),
        }
    }
}

/// The configuration of a worker.
#[derive(Clone, Debug, Parser)]
#[command(name = "build-worker")]
pub struct Config {
    /// Address of the image-service to take builds from.
    #[arg(long, env = "TRAILER_SERVER", default_value = "http://127.0.0.1:50051")]
    pub server: String,

    /// PEM file with the certificate authorities to trust for an https --server; the system's if absent. If
    /// the service asks for a client certificate, the worker presents --tls-cert.
    #[arg(long, env = "TRAILER_SERVER_CA", value_name = "FILE")]
    pub server_ca: Option<PathBuf>,

    /// Allow an unencrypted --server or --listen beyond loopback. The token is not encrypted either: only for
    /// a trusted network.
    #[arg(long, env = "TRAILER_ALLOW_PLAINTEXT", value_parser = clap::builder::FalseyValueParser::new())]
    pub allow_plaintext: bool,

    #[command(flatten)]
    pub tls: ServerFiles,

    /// File with the bearer token; read again for every connection, so that the token can be renewed.
    #[arg(long, env = "TRAILER_TOKEN_FILE")]
    pub token_file: PathBuf,

    /// Name of the worker: the subject of its token.
    #[arg(long, env = "TRAILER_NAME")]
    pub name: String,

    /// Maximum number of concurrent builds.
    #[arg(long, env = "TRAILER_SLOTS", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub slots: u16,

    /// Labels of this worker, as `key=value`; repeatable, or separated by commas.
    #[arg(long, env = "TRAILER_LABELS", value_delimiter = ',', value_parser = label)]
    pub labels: Vec<(String, String)>,

    /// Address that serves health checks and reflection.
    #[arg(long, env = "TRAILER_LISTEN", default_value = "127.0.0.1:50052")]
    pub listen: SocketAddr,

    /// Address of the Docker Engine: `unix:///path` or `tcp://host:port`.
    #[arg(long, env = "TRAILER_DOCKER_HOST", default_value = "unix:///var/run/docker.sock")]
    pub docker_host: String,

    /// Images of registries that builds may use beside the catalogue's, such as `docker.io/library/*`. `*`
    /// stands for any characters but `/`, and at the end for any characters. Repeatable, or separated by commas.
    #[arg(long, env = "TRAILER_ALLOW_SOURCE", value_name = "PATTERN", value_delimiter = ',', default_value = "*",
        value_parser = pattern)]
    pub allow_source: Vec<String>,

    /// Images that builds may use although they came from no registry, but were loaded into the engine or
    /// made there, with `*` as in --allow-source. Repeatable, or separated by commas.
    #[arg(long, env = "TRAILER_ALLOW_LOCAL", value_name = "PATTERN", value_delimiter = ',', value_parser = pattern)]
    pub allow_local: Vec<String>,

    /// Host from which ADD may fetch files and Git repositories, but none at a commit, such as `github.com`; by default
    /// none. `*` stands for any characters of a host. Repeatable, or separated by commas.
    #[arg(long, env = "TRAILER_ALLOW_ADD", value_name = "HOST", value_delimiter = ',', value_parser = pattern)]
    pub allow_add: Vec<String>,

    /// Images that a Dockerfile may name as its frontend (`# syntax=`), such as
    /// `registry.example/frontends/*`; by default none. `docker/dockerfile` needs no permission: the engine's
    /// own frontend takes its place. `*` is as in --allow-source. Repeatable, or separated by commas.
    #[arg(long, env = "TRAILER_ALLOW_FRONTEND", value_name = "PATTERN", value_delimiter = ',', value_parser = pattern)]
    pub allow_frontend: Vec<String>,

    /// Host or network that remote contexts may come from although its addresses are not public, such as
    /// `git.corp.example` or `10.1.0.0/16`; by default none. `*` stands for any characters of a name.
    /// Repeatable, or separated by commas.
    #[arg(long, env = "TRAILER_ALLOW_REMOTE", value_name = "HOST-OR-NETWORK", value_delimiter = ',')]
    pub(crate) allow_remote: Vec<AllowedRemote>,

    /// Parent of the control group of this worker's builds, such as `/builds.slice`. Limits set on it apply
    /// to all builds together. Overrides dockerd's --cgroup-parent.
    #[arg(long, env = "TRAILER_CGROUP_PARENT", default_value = "", value_parser = cgroup_parent)]
    pub cgroup_parent: String,

    /// Compression of image layers, if the engine keeps its images in containerd. The engine's default, gzip,
    /// if absent; `uncompressed` and `zstd` are faster.
    #[arg(long, env = "TRAILER_COMPRESSION", value_parser = ["uncompressed", "gzip", "estargz", "zstd"])]
    pub compression: Option<String>,

    /// Build even if the Docker Engine is too old; for evaluation only. Builds may reach files of the
    /// engine's host, and cancellations may not be confirmed.
    #[arg(long, env = "TRAILER_ALLOW_OLD_ENGINE", value_parser = clap::builder::FalseyValueParser::new())]
    pub allow_old_engine: bool,

    /// Known flaw, such as CVE-2026-33748, that is fixed in this Docker Engine despite its version. For
    /// distributions that backport fixes; repeatable, or separated by commas.
    #[arg(long, env = "TRAILER_ENGINE_HAS_FIX", value_name = "CVE", value_delimiter = ',',
        value_parser = clap::builder::PossibleValuesParser::new(engine_support::flaws()))]
    pub engine_has_fix: Vec<String>,

    /// Directory in which the engine keeps its images, for --min-free-disk. Defaults to the engine's data
    /// directory and, if containerd keeps the images, /var/lib/containerd.
    #[arg(long, env = "TRAILER_IMAGE_DIR")]
    pub image_dir: Option<PathBuf>,

    /// Docker configuration directory; need not exist. Its `config.json` holds registry credentials or names
    /// credential helpers, and sets the proxies of builds. Defaults to `$DOCKER_CONFIG`, or else `.docker` in
    /// the home directory.
    #[arg(long, env = "TRAILER_DOCKER_CONFIG")]
    pub docker_config: Option<PathBuf>,

    /// Directory with secrets and SSH agents that builds may use by name: a file for each secret, a socket for
    /// each agent, and the file `trailer.json`, which says who may use which. Read anew for each build.
    #[arg(long, env = "TRAILER_SECRETS_DIR")]
    pub secrets_dir: Option<PathBuf>,

    /// Maximum size of a build's log, in bytes, with 32 more counted for each line. Of the excess only the
    /// end is kept.
    #[arg(long, env = "TRAILER_LOG_LIMIT", default_value_t = 64 * 1024 * 1024)]
    pub log_limit: usize,

    /// Directory for build contexts, and for unacknowledged events that do not fit in memory; created if
    /// missing. Defaults to `trailer-spool-` and the worker's name in the system's temporary directory.
    #[arg(long, env = "TRAILER_SPOOL_DIR")]
    pub spool_dir: Option<PathBuf>,

    /// Maximum size of a build's events in the spool, in bytes; 0 to use no disk.
    #[arg(long, env = "TRAILER_SPOOL_LIMIT", default_value_t = 256 * 1024 * 1024)]
    pub spool_limit: u64,

    /// Minimum free disk space for the spool, and for the engine's images if on this host, in bytes. Below it
    /// no build starts and health is NOT_SERVING.
    #[arg(long, env = "TRAILER_MIN_FREE_DISK", default_value_t = 512 * 1024 * 1024)]
    pub min_free_disk: u64,

    /// Interval between garbage collections of the images that this worker has made, at least 100ms. An image
    /// that a build has replaced is collected soon after the build.
    #[arg(long, env = "TRAILER_COLLECT_EVERY", default_value = "1m", value_parser = humantime::parse_duration)]
    pub collect_every: Duration,

    /// Time for which the engine keeps a base image that it has pulled for a build, after its last use.
    #[arg(long, env = "TRAILER_KEEP_BASES", default_value = "24h", value_parser = humantime::parse_duration)]
    pub keep_bases: Duration,

    /// Time that running builds may take to finish after SIGTERM before they are handed back.
    #[arg(long, env = "TRAILER_DRAIN_GRACE", default_value = "30s", value_parser = humantime::parse_duration)]
    pub drain_grace: Duration,

    #[command(flatten)]
    pub telemetry: telemetry::Options,
}

impl Config {
    /// Checks the constraints that parsing a single flag cannot check.
    ///
    /// # Errors
    ///
    /// Returns a message that names the flag at fault and the reason.
    pub(crate) fn check(&self) -> Result<(), String> {
        let server: Uri = self.server.parse().map_err(|_| format!("--server {:?} is no URL", self.server))?;
        let host = server.host().unwrap_or_default().trim_matches(['[', ']']);
        let is_near = host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        match server.scheme_str() {
            Some("https") => {}
            Some("http") if is_near || self.allow_plaintext => {}
            Some("http") => {
                return Err(format!(
                    "--server {} is beyond loopback and the traffic is not encrypted: use https, or --allow-plaintext if the \
                     network is trusted",
                    self.server
                ));
            }
            Some(_) | None => {
                return Err(format!(
                    "--server {:?} is no URL: it must begin with http:// or https://",
                    self.server
                ));
            }
        }
        if !self.listen.ip().is_loopback() && self.tls.tls_cert.is_none() && !self.allow_plaintext {
            return Err(format!(
                "--listen {} is beyond loopback and the traffic is not encrypted: give --tls-cert and --tls-key, or \
                 --allow-plaintext if the network is trusted",
                self.listen
            ));
        }
        if let Some(directory) = &self.image_dir
            && !directory.is_dir()
        {
            return Err(format!("--image-dir {} is no directory", directory.display()));
        }
        self.secrets().check().map_err(|error| format!("--secrets-dir: {error}"))?;
        if self.collect_every < ImageGc::SHORTEST_PAUSE {
            return Err(format!("--collect-every must be at least {:?}", ImageGc::SHORTEST_PAUSE));
        }
        Ok(())
    }

    /// Returns the secrets of this worker.
    pub(crate) fn secrets(&self) -> SecretStore {
        SecretStore::new(self.secrets_dir.clone())
    }

    /// Returns the operator's rules on the sources of builds.
    pub(crate) fn source_rules(&self) -> SourceRules {
        let patterns = |texts: &[String]| texts.iter().map(|text| Pattern::new(text)).collect();
        SourceRules {
            registries: patterns(&self.allow_source),
            local: patterns(&self.allow_local),
            hosts: patterns(&self.allow_add),
            frontends: patterns(&self.allow_frontend),
        }
    }

    /// Returns the operator's exceptions to the rule about the addresses of remote contexts.
    pub(crate) fn egress_rules(&self) -> EgressRules {
        EgressRules(self.allow_remote.clone())
    }

    /// Returns the operator's exceptions to the rules about engine versions.
    pub(crate) fn exceptions(&self) -> Exceptions {
        Exceptions { allow_old: self.allow_old_engine, fixed: self.engine_has_fix.clone() }
    }

    pub(crate) fn label_map(&self) -> BTreeMap<String, String> {
        self.labels.iter().cloned().collect()
    }

    pub(crate) fn docker_config(&self) -> PathBuf {
        let of_docker = || std::env::var_os("DOCKER_CONFIG").map(PathBuf::from);
        let at_home = || std::env::home_dir().map(|home| home.join(".docker"));
        self.docker_config.clone().or_else(of_docker).or_else(at_home).unwrap_or_default()
    }

    /// Returns the absolute path of the spool: `git` runs in directories below it.
    pub(crate) fn spool_dir(&self) -> PathBuf {
        const LONGEST: usize = 100;
        let directory = self.spool_dir.clone().unwrap_or_else(|| {
            let name: String = self.name.chars().take(LONGEST).map(safe_in_a_path).collect();
            std::env::temp_dir().join(format!("trailer-spool-{name}"))
        });
        std::path::absolute(&directory).unwrap_or(directory)
    }
}

/// Replaces a character that is unsafe in a path.
///
/// A worker's name is any text. Two names that become the same may share a directory.
fn safe_in_a_path(character: char) -> char {
    if character.is_ascii_alphanumeric() || "-_.".contains(character) { character } else { '_' }
}

fn label(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .filter(|(key, _)| !key.is_empty())
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .ok_or_else(|| "must be key=value".to_owned())
}

fn pattern(text: &str) -> Result<String, String> {
    if text.is_empty() { Err("must not be empty".to_owned()) } else { Ok(text.to_owned()) }
}

/// Parses the path of a control group, without `.` or `..` in it.
///
/// BuildKit gives a name that ends in a colon another meaning.
fn cgroup_parent(text: &str) -> Result<String, String> {
    let is_plain = |part: &str| !matches!(part, "." | "..") && !part.contains(char::is_control);
    if text.split('/').all(is_plain) && !text.ends_with(':') {
        Ok(text.to_owned())
    } else {
        Err("must be the path of a control group, such as /builds.slice".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(flags: &[&str]) -> Option<String> {
        let fixed = ["build-worker", "--token-file", "token", "--name", "w1"];
        Config::try_parse_from(fixed.iter().chain(flags)).expect("known flags").check().err()
    }

    #[test]
    fn a_spool_is_the_same_from_every_directory() {
        for flags in [&["--spool-dir", "spool"][..], &[]] {
            let fixed = ["build-worker", "--token-file", "token", "--name", "w1"];
            let config = Config::try_parse_from(fixed.iter().chain(flags)).expect("known flags");
            assert!(config.spool_dir().is_absolute(), "{flags:?}");
        }
    }

    #[test]
    fn nothing_goes_beyond_loopback_in_the_clear_unless_that_is_wanted() {
        for (flags, flag) in [
            (["--server", "http://images.example:50051"].as_slice(), "--server"),
            (&["--server", "http://10.0.0.1:50051"], "--server"),
            (&["--server", "images.example:50051"], "--server"),
            (&["--listen", "0.0.0.0:50052"], "--listen"),
            (&["--collect-every", "99ms"], "--collect-every"),
            (&["--image-dir", "/nonexistent"], "--image-dir"),
        ] {
            let refusal = refusal(flags).unwrap_or_default();
            assert!(refusal.starts_with(flag), "{flags:?}: {refusal:?}");
        }
        for flags in [
            [].as_slice(),
            &["--server", "http://localhost:50051"],
            &["--server", "http://[::1]:50051"],
            &["--server", "https://images.example:50051"],
            &["--server", "http://images.example:50051", "--listen", "0.0.0.0:50052", "--allow-plaintext"],
            &["--listen", "0.0.0.0:50052", "--tls-cert", "cert.pem", "--tls-key", "key.pem"],
        ] {
            assert_eq!(refusal(flags), None, "{flags:?}");
        }
    }
}
