//! Squashing: a second Solve copies the result of the first into one layer.
//!
//! It also restates the configuration of the image, by a Dockerfile, because the exporter of graph drivers
//! accepts none. The values are build arguments, which are not interpreted again.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    sync::Arc,
};

use http::StatusCode;
use serde::{Deserialize, Deserializer, de::IgnoredAny};

use super::connection::Connections;
use crate::{
    context::{self, Context},
    context_archive,
    engine::{BuildOrder, BuiltImage, Dockerfile, EngineError, EventSender, ImageDecision, SourcePolicy},
    reference,
};

/// The configuration of an image, as the engine's API returns it.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Configuration {
    #[serde(deserialize_with = "or_default")]
    user: String,
    #[serde(deserialize_with = "or_default")]
    exposed_ports: HashMap<String, IgnoredAny>,
    #[serde(deserialize_with = "or_default")]
    env: Vec<String>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    #[serde(deserialize_with = "or_default")]
    volumes: HashMap<String, IgnoredAny>,
    #[serde(deserialize_with = "or_default")]
    working_dir: String,
    #[serde(deserialize_with = "or_default")]
    labels: HashMap<String, String>,
    #[serde(deserialize_with = "or_default")]
    stop_signal: String,
    healthcheck: Option<Healthcheck>,
    #[serde(deserialize_with = "or_default")]
    shell: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    on_build: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Healthcheck {
    #[serde(deserialize_with = "or_default")]
    test: Vec<String>,
    /// Interval in nanoseconds, like the times below; 0 if unset.
    interval: u64,
    timeout: u64,
    start_period: u64,
    start_interval: u64,
    retries: u32,
}

/// The only source of a squash: the image that it squashes.
#[derive(Debug)]
struct SquashedImage {
    /// Canonical reference.
    name: String,
    /// ID in the engine.
    id: String,
}

#[tonic::async_trait]
impl SourcePolicy for SquashedImage {
    fn images(&self) -> BTreeMap<String, ImageDecision> {
        let Self { name, id } = self;
        let usable = ImageDecision::Usable { name: name.clone(), id: id.clone() };
        BTreeMap::from([(name.clone(), usable)])
    }

    fn hosts(&self) -> Vec<String> {
        Vec::new()
    }

    fn allows_git_directories(&self) -> bool {
        false
    }

    async fn prepare(&self, _events: &EventSender) -> Result<Option<String>, EngineError> {
        Ok(None)
    }

    async fn decide(&self, image: &str, _events: &EventSender) -> Result<ImageDecision, EngineError> {
        Ok(ImageDecision::Missing(format!("{image} is not squashed")))
    }
}

/// A Dockerfile whose values are build arguments.
#[derive(Default)]
struct Restatement {
    text: String,
    build_args: HashMap<String, String>,
}

/// Returns the order that squashes the image tagged by `order` and moves the tag to the result.
///
/// # Errors
///
/// Returns [`EngineError::Broken`] if the engine does not return the configuration of the image.
pub(super) async fn order(
    connections: &Connections,
    order: &BuildOrder,
    built: &BuiltImage,
) -> Result<BuildOrder, EngineError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Image {
        #[serde(default, deserialize_with = "or_default")]
        config: Configuration,
    }
    let broken = |error: &dyn std::error::Error| EngineError::Broken(error.to_string());
    let path = format!("/images/{}/json", order.tag);
    let (status, image) = connections.get_json(&path).await.map_err(|error| broken(&error))?;
    if status != StatusCode::OK {
        return Err(EngineError::Broken(format!("it answered {status} about {}", order.tag)));
    }
    let Image { config } = serde_json::from_value(image).map_err(|error| broken(&error))?;
    let Restatement { text, build_args } = Restatement::new(&order.tag, &config);
    let no_files = context_archive::empty().map_err(|error| broken(&error))?;
    Ok(BuildOrder {
        name: format!("{}-squash", order.name),
        tag: order.tag.clone(),
        context: Arc::new(Context::Small(no_files.into())),
        dockerfile: Dockerfile::beside(context::DOCKERFILE, text.into()),
        stages: Vec::new(),
        labels: config.labels,
        build_args,
        target: String::new(),
        sources: Arc::new(SquashedImage {
            name: reference::canonical(&order.tag).unwrap_or_default(),
            id: built.id.clone(),
        }),
        no_cache: order.no_cache,
        squash: false,
        cgroup_parent: order.cgroup_parent.clone(),
        secrets: Arc::default(),
        compression: order.compression.clone(),
    })
}

impl Restatement {
    fn new(tag: &str, config: &Configuration) -> Self {
        let mut this = Self::default();
        this.line("FROM scratch");
        for variable in &config.env {
            let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
            let value = this.argument(value);
            this.line(&format!("ENV {name}=\"{value}\""));
        }
        for (instruction, value) in [("WORKDIR", &config.working_dir), ("STOPSIGNAL", &config.stop_signal)] {
            if !value.is_empty() {
                let value = this.argument(value);
                this.line(&format!("{instruction} {value}"));
            }
        }
        this.line(&format!("COPY --from={tag} / /"));
        let (mut ports, mut volumes): (Vec<_>, Vec<_>) =
            (config.exposed_ports.keys().collect(), config.volumes.keys().collect());
        ports.sort();
        volumes.sort();
        for port in ports {
            let port = this.argument(port);
            this.line(&format!("EXPOSE {port}"));
        }
        for volume in volumes {
            let volume = this.argument(volume);
            this.line(&format!("VOLUME [\"{volume}\"]"));
        }
        if !config.user.is_empty() {
            let user = this.argument(&config.user);
            this.line(&format!("USER {user}"));
        }
        if let Some(healthcheck) = &config.healthcheck {
            this.healthcheck(healthcheck, &config.shell);
        }
        if !config.shell.is_empty() {
            this.list("SHELL", &config.shell);
        }
        for (instruction, list) in [("ENTRYPOINT", &config.entrypoint), ("CMD", &config.cmd)] {
            if let Some(list) = list {
                this.list(instruction, list);
            }
        }
        for trigger in &config.on_build {
            this.line(&format!("ONBUILD {trigger}"));
        }
        this
    }

    fn healthcheck(&mut self, healthcheck: &Healthcheck, shell: &[String]) {
        let test = match healthcheck.test.split_first() {
            None => return,
            Some((kind, _)) if kind == "NONE" => return self.line("HEALTHCHECK NONE"),
            Some((kind, command)) if kind == "CMD-SHELL" => {
                let command = command.join(" ");
                if is_plain(&command) {
                    return self.line(&format!("HEALTHCHECK{} CMD {command}", flags(healthcheck)));
                }
                let default = ["/bin/sh".to_owned(), "-c".to_owned()];
                let shell = if shell.is_empty() { &default[..] } else { shell };
                shell.iter().cloned().chain([command]).collect()
            }
            Some((_, command)) => command.to_vec(),
        };
        self.list(&format!("HEALTHCHECK{} CMD", flags(healthcheck)), &test);
    }

    /// Adds a build argument with this value and returns the reference to it.
    fn argument(&mut self, value: &str) -> String {
        let name = format!("trailer_value_{}", self.build_args.len());
        self.line(&format!("ARG {name}"));
        self.build_args.insert(name.clone(), value.to_owned());
        format!("${{{name}}}")
    }

    /// Appends an instruction with a list, which is not interpreted.
    fn list(&mut self, instruction: &str, list: &[String]) {
        let list = serde_json::Value::from(list).to_string();
        self.line(&format!("{instruction} {list}"));
    }

    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }
}

/// Returns the flags that restate a health check, each with a space before it.
fn flags(healthcheck: &Healthcheck) -> String {
    let mut flags = String::new();
    for (flag, nanoseconds) in [
        ("interval", healthcheck.interval),
        ("timeout", healthcheck.timeout),
        ("start-period", healthcheck.start_period),
        ("start-interval", healthcheck.start_interval),
    ] {
        if nanoseconds > 0 {
            let _ = write!(flags, " --{flag}={nanoseconds}ns");
        }
    }
    if healthcheck.retries > 0 {
        let _ = write!(flags, " --retries={}", healthcheck.retries);
    }
    flags
}

/// Reports whether a command can follow an instruction verbatim.
///
/// It must be one line, not a list, and not continue on the next line.
fn is_plain(command: &str) -> bool {
    !command.is_empty()
        && command.trim() == command
        && !command.contains(char::is_control)
        && !command.contains("<<")
        && !command.starts_with(['[', '-'])
        && !command.ends_with('\\')
}

/// Deserializes `null` as the default.
fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_restated() {
        let config = serde_json::from_value(serde_json::json!({
            "User": "app", "Env": ["PATH=/bin", "A=say \"$x\"\nand \\ more"], "WorkingDir": "/srv", "Volumes": {"/data": {}},
            "ExposedPorts": {"80/tcp": {}}, "Entrypoint": ["/run", "$HOME"], "Cmd": null, "StopSignal": "SIGINT",
            "Healthcheck": {"Test": ["CMD-SHELL", "check\nit"], "Interval": 1_000_000_000_u64, "Retries": 2},
            "OnBuild": ["RUN make"], "Labels": null, "Shell": null,
        }))
        .expect("a configuration");
        let restated = Restatement::new("x:1", &config);
        let expected = [
            "FROM scratch",
            "ARG trailer_value_0",
            "ENV PATH=\"${trailer_value_0}\"",
            "ARG trailer_value_1",
            "ENV A=\"${trailer_value_1}\"",
            "ARG trailer_value_2",
            "WORKDIR ${trailer_value_2}",
            "ARG trailer_value_3",
            "STOPSIGNAL ${trailer_value_3}",
            "COPY --from=x:1 / /",
            "ARG trailer_value_4",
            "EXPOSE ${trailer_value_4}",
            "ARG trailer_value_5",
            "VOLUME [\"${trailer_value_5}\"]",
            "ARG trailer_value_6",
            "USER ${trailer_value_6}",
            "HEALTHCHECK --interval=1000000000ns --retries=2 CMD [\"/bin/sh\",\"-c\",\"check\\nit\"]",
            "ENTRYPOINT [\"/run\",\"$HOME\"]",
            "ONBUILD RUN make",
        ];
        assert_eq!(restated.text.lines().collect::<Vec<_>>(), expected);
        let shown = |test: &str| {
            let config = serde_json::json!({ "Healthcheck": { "Test": ["CMD-SHELL", test] } });
            let config = serde_json::from_value(config).expect("a configuration");
            Restatement::new("x:1", &config).text.lines().last().unwrap_or_default().to_owned()
        };
        assert_eq!(shown("curl $URL || exit 1"), "HEALTHCHECK CMD curl $URL || exit 1");
        assert_eq!(shown("[ -e /x ]"), "HEALTHCHECK CMD [\"/bin/sh\",\"-c\",\"[ -e /x ]\"]");
        assert_eq!(restated.build_args["trailer_value_1"], "say \"$x\"\nand \\ more");
    }
}
