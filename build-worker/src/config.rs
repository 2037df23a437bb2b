//! The command line: every flag has an environment variable of the same name with `TRAILER_` before it.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::{Parser, Subcommand};
use edge::{health::Question, telemetry, tls::ServerFiles};
use http::Uri;

use crate::{
    collecting::Collector,
    engine_support::{self, Exceptions},
};

/// Runs Docker builds for an image-service.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Cli {
    #[command(subcommand)]
    question: Option<Asking>,
    /// For --help, and to refuse what is no flag; a subcommand needs none of them.
    #[command(flatten)]
    _flags: Option<Config>,
}

#[derive(Debug, Subcommand)]
enum Asking {
    /// Ask a program whether it serves: for health checks of containers. Ends with 0 if it does.
    Health(Question),
}

/// What to do.
#[derive(Debug)]
pub enum Command {
    /// Take builds.
    Work(Box<Config>),
    /// Ask a program whether it serves.
    Health(Question),
}

impl Cli {
    /// What the command line says; ends the process where it is wrong.
    pub fn parse_command() -> Command {
        match Self::parse().question {
            Some(Asking::Health(question)) => Command::Health(question),
            None => Command::Work(Box::new(Config::parse())),
        }
    }
}

/// How to work.
#[derive(Clone, Debug, Parser)]
#[command(name = "build-worker")]
pub struct Config {
    /// The image-service to take builds from.
    #[arg(long, env = "TRAILER_SERVER", default_value = "http://127.0.0.1:50051")]
    pub server: String,

    /// The authorities that an https --server is trusted by, a PEM file; those of the system when absent. Where the service asks
    /// for a certificate, the worker shows that of --tls-cert.
    #[arg(long, env = "TRAILER_SERVER_CA", value_name = "FILE")]
    pub server_ca: Option<PathBuf>,

    /// Use a --server or a --listen beyond loopback although the traffic, the token included, is not encrypted: for a network
    /// that is trusted.
    #[arg(long, env = "TRAILER_ALLOW_PLAINTEXT", value_parser = clap::builder::FalseyValueParser::new())]
    pub allow_plaintext: bool,

    #[command(flatten)]
    pub tls: ServerFiles,

    /// The file that holds the bearer token; read again at every connection, so that it can be renewed.
    #[arg(long, env = "TRAILER_TOKEN_FILE")]
    pub token_file: PathBuf,

    /// The worker's name: the subject of its token.
    #[arg(long, env = "TRAILER_NAME")]
    pub name: String,

    /// How many builds to run at a time.
    #[arg(long, env = "TRAILER_SLOTS", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub slots: u16,

    /// What this worker says of itself, as `key=value`. Repeatable, or separated by commas.
    #[arg(long, env = "TRAILER_LABELS", value_delimiter = ',', value_parser = label)]
    pub labels: Vec<(String, String)>,

    /// Where to answer health checks and reflection.
    #[arg(long, env = "TRAILER_LISTEN", default_value = "127.0.0.1:50052")]
    pub listen: SocketAddr,

    /// The Docker Engine: `unix:///path` or `tcp://host:port`.
    #[arg(long, env = "TRAILER_DOCKER_HOST", default_value = "unix:///var/run/docker.sock")]
    pub docker_host: String,

    /// The control group that the control group of this worker's builds is below, such as `/builds.slice`: bounds set on it hold for
    /// all builds together. It takes the place of dockerd's --cgroup-parent.
    #[arg(long, env = "TRAILER_CGROUP_PARENT", default_value = "", value_parser = cgroup_parent)]
    pub cgroup_parent: String,

    /// The compression of images' layers, where the engine keeps its images in containerd; the engine's choice, gzip, when absent.
    /// `uncompressed` and `zstd` are faster.
    #[arg(long, env = "TRAILER_COMPRESSION", value_parser = ["uncompressed", "gzip", "estargz", "zstd"])]
    pub compression: Option<String>,

    /// Build although the Docker Engine is too old, for trying out: its builds may reach files of its host, and cancels may not be
    /// confirmed.
    #[arg(long, env = "TRAILER_ALLOW_OLD_ENGINE", value_parser = clap::builder::FalseyValueParser::new())]
    pub allow_old_engine: bool,

    /// A known flaw that the Docker Engine does not have although its version says so, such as CVE-2026-33748: for distributions
    /// that mend older versions. Repeatable, or separated by commas.
    #[arg(long, env = "TRAILER_ENGINE_HAS_FIX", value_name = "CVE", value_delimiter = ',',
        value_parser = clap::builder::PossibleValuesParser::new(engine_support::flaws()))]
    pub engine_has_fix: Vec<String>,

    /// The directory that the engine keeps its images in, for --min-free-disk. The default is the engine's own directory and, where
    /// containerd keeps its images, /var/lib/containerd.
    #[arg(long, env = "TRAILER_IMAGE_DIR")]
    pub image_dir: Option<PathBuf>,

    /// The directory of the Docker configuration, whose `config.json` holds credentials for registries or names credential
    /// helpers, and the proxies of builds; it need not exist. The default is `$DOCKER_CONFIG`, or else `.docker` in the home directory.
    #[arg(long, env = "TRAILER_DOCKER_CONFIG")]
    pub docker_config: Option<PathBuf>,

    /// How many bytes of log lines to keep of one build, 32 more counted for each line; of what is over it, only the end
    /// is kept.
    #[arg(long, env = "TRAILER_LOG_LIMIT", default_value_t = 64 * 1024 * 1024)]
    pub log_limit: usize,

    /// Where to keep what the service has not taken yet and memory cannot hold; made when missing. The default is
    /// `trailer-spool-` with the worker's name in the system's directory for temporary files.
    #[arg(long, env = "TRAILER_SPOOL_DIR")]
    pub spool_dir: Option<PathBuf>,

    /// How many bytes of one build to keep there at most; with 0 none are.
    #[arg(long, env = "TRAILER_SPOOL_LIMIT", default_value_t = 256 * 1024 * 1024)]
    pub spool_limit: u64,

    /// How many bytes have to be free where the spool is, and where the engine keeps its images if that is on this host: below,
    /// no build is begun and health says NOT_SERVING.
    #[arg(long, env = "TRAILER_MIN_FREE_DISK", default_value_t = 512 * 1024 * 1024)]
    pub min_free_disk: u64,

    /// How often to look for images that this worker has made and nothing needs any more, at least 100ms; what a build has replaced
    /// is looked for soon after it.
    #[arg(long, env = "TRAILER_COLLECT_EVERY", default_value = "1m", value_parser = humantime::parse_duration)]
    pub collect_every: Duration,

    /// How long running builds may go on after SIGTERM before they are handed back.
    #[arg(long, env = "TRAILER_DRAIN_GRACE", default_value = "30s", value_parser = humantime::parse_duration)]
    pub drain_grace: Duration,

    #[command(flatten)]
    pub telemetry: telemetry::Options,
}

impl Config {
    /// Checks what no single flag can: `Err` says which flags do not fit, and why.
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
        if self.collect_every < Collector::SHORTEST_PAUSE {
            return Err(format!("--collect-every must be at least {:?}", Collector::SHORTEST_PAUSE));
        }
        Ok(())
    }

    /// Returns the operator's exceptions from what an engine's version says.
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

    pub(crate) fn spool_dir(&self) -> PathBuf {
        const LONGEST: usize = 100;
        self.spool_dir.clone().unwrap_or_else(|| {
            let name: String = self.name.chars().take(LONGEST).map(safe_in_a_path).collect();
            std::env::temp_dir().join(format!("trailer-spool-{name}"))
        })
    }
}

/// A name is any text. Two that become the same may share a directory.
fn safe_in_a_path(character: char) -> char {
    if character.is_ascii_alphanumeric() || "-_.".contains(character) { character } else { '_' }
}

fn label(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .filter(|(key, _)| !key.is_empty())
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .ok_or_else(|| "must be key=value".to_owned())
}

/// A path without detours. BuildKit takes a name that ends in a colon for something else.
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
