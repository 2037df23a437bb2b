//! The command line: every flag has an environment variable of the same name with `TRAILER_` before it.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Parser, ValueEnum};

/// Runs Docker builds for an image-service.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Config {
    /// The image-service to take builds from.
    #[arg(long, env = "TRAILER_SERVER", default_value = "http://127.0.0.1:50051")]
    pub server: String,

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

    /// The directory of the Docker configuration, whose `config.json` holds credentials for registries or names credential
    /// helpers; it need not exist. The default is `$DOCKER_CONFIG`, or else `.docker` in the home directory.
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

    /// How often to look for images that this worker has made and nothing needs any more, at least 100ms; also whenever a build has
    /// ended.
    #[arg(long, env = "TRAILER_COLLECT_EVERY", default_value = "1m", value_parser = humantime::parse_duration)]
    pub collect_every: Duration,

    /// How long running builds may go on after SIGTERM before they are handed back.
    #[arg(long, env = "TRAILER_DRAIN_GRACE", default_value = "30s", value_parser = humantime::parse_duration)]
    pub drain_grace: Duration,

    /// How to log.
    #[arg(long, env = "TRAILER_LOG_FORMAT", value_enum, default_value_t = LogFormat::Human)]
    pub log_format: LogFormat,
}

/// How to log.
#[derive(Copy, Clone, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Human,
    /// One JSON object a line.
    Json,
}

impl Config {
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
