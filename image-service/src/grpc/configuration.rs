//! Conversion of configurations from and to their messages.

use proto::images as wire;

use crate::image::{
    ConfigurationDraft, Dockerfile, File, Generate, GeneratedStep, Pull, Secret, Service, Source, SshAgent,
};

/// Converts a configuration without checking it.
pub(super) fn draft(config: wire::ImageConfig) -> ConfigurationDraft {
    ConfigurationDraft {
        lacks_source: config.source.is_none(),
        source: config.source.map_or_else(|| Source::Dockerfile(Dockerfile::default()), source),
        services: config.services.into_iter().map(service).collect(),
        pull_base: config.pull_base,
        squash: config.squash,
        push: config.push,
        no_cache: config.no_cache,
        worker: config.worker,
        worker_labels: config.worker_labels,
        build_timeout_ms: config.build_timeout.as_ref().map(timeout_ms),
        secrets: config.secrets.into_iter().map(Into::into).collect(),
        ssh_agents: config.ssh_agents.into_iter().map(Into::into).collect(),
    }
}

/// Converts a timeout to whole milliseconds, rounded up; negative if it is invalid or negative.
fn timeout_ms(timeout: &prost_types::Duration) -> i64 {
    match u32::try_from(timeout.nanos) {
        Ok(nanos @ 0..1_000_000_000) if timeout.seconds >= 0 => {
            timeout.seconds.saturating_mul(1_000).saturating_add(i64::from(nanos.div_ceil(1_000_000)))
        }
        Ok(_) | Err(_) => -1,
    }
}

fn source(source: wire::image_config::Source) -> Source {
    match source {
        wire::image_config::Source::Dockerfile(dockerfile) => Source::Dockerfile(Dockerfile {
            text: dockerfile.text,
            files: dockerfile.files.into_iter().map(Into::into).collect(),
            build_args: dockerfile.build_args,
            target: dockerfile.target,
            archive: dockerfile.archive,
            remote: dockerfile.remote,
            dockerfile_path: dockerfile.dockerfile_path,
            remote_credentials: dockerfile.remote_credentials,
        }),
        wire::image_config::Source::Generate(generate) => Source::Generate(Generate {
            base_image: generate.base_image,
            apt_packages: generate.apt_packages,
            python_packages: generate.python_packages,
            environment: generate.environment,
            user: generate.user,
            start_commands: generate.start_commands,
            files: generate.files.into_iter().map(Into::into).collect(),
        }),
        wire::image_config::Source::Pull(pull) => Source::Pull(Pull { reference: pull.reference }),
    }
}

fn service(service: wire::WorkspaceService) -> Service {
    Service {
        name: service.name,
        packages: service.packages,
        command: service.command,
        ports: service.ports,
        environment: service.environment,
    }
}

impl From<ConfigurationDraft> for wire::ImageConfig {
    fn from(draft: ConfigurationDraft) -> Self {
        Self {
            source: Some(draft.source.into()),
            services: draft.services.into_iter().map(Into::into).collect(),
            pull_base: draft.pull_base,
            squash: draft.squash,
            push: draft.push,
            no_cache: draft.no_cache,
            worker: draft.worker,
            worker_labels: draft.worker_labels,
            build_timeout: draft.build_timeout_ms.map(|ms| prost_types::Duration {
                seconds: ms / 1_000,
                nanos: i32::try_from(ms % 1_000 * 1_000_000).unwrap_or(0),
            }),
            secrets: draft.secrets.into_iter().map(Into::into).collect(),
            ssh_agents: draft.ssh_agents.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<Source> for wire::image_config::Source {
    fn from(source: Source) -> Self {
        match source {
            Source::Dockerfile(dockerfile) => Self::Dockerfile(wire::DockerfileSource {
                text: dockerfile.text,
                files: dockerfile.files.into_iter().map(Into::into).collect(),
                build_args: dockerfile.build_args,
                target: dockerfile.target,
                archive: dockerfile.archive,
                remote: dockerfile.remote,
                dockerfile_path: dockerfile.dockerfile_path,
                remote_credentials: dockerfile.remote_credentials,
            }),
            Source::Generate(generate) => Self::Generate(wire::GenerateSource {
                base_image: generate.base_image,
                apt_packages: generate.apt_packages,
                python_packages: generate.python_packages,
                environment: generate.environment,
                user: generate.user,
                start_commands: generate.start_commands,
                files: generate.files.into_iter().map(Into::into).collect(),
            }),
            Source::Pull(pull) => Self::Pull(wire::PullSource { reference: pull.reference }),
        }
    }
}

impl From<Service> for wire::WorkspaceService {
    fn from(service: Service) -> Self {
        Self {
            name: service.name,
            packages: service.packages,
            command: service.command,
            ports: service.ports,
            environment: service.environment,
        }
    }
}

impl From<wire::BuildSecret> for Secret {
    fn from(secret: wire::BuildSecret) -> Self {
        let step = |step| match wire::GeneratedStep::try_from(step) {
            Ok(wire::GeneratedStep::AptPackages) => Some(GeneratedStep::AptPackages),
            Ok(wire::GeneratedStep::PythonPackages) => Some(GeneratedStep::PythonPackages),
            Ok(wire::GeneratedStep::Unspecified) | Err(_) => None,
        };
        Self {
            steps: secret.steps.into_iter().map(step).collect(),
            id: secret.id,
            name: secret.name,
            file: secret.file,
            environment: secret.environment,
        }
    }
}

impl From<Secret> for wire::BuildSecret {
    fn from(secret: Secret) -> Self {
        let step = |step| match step {
            Some(GeneratedStep::AptPackages) => wire::GeneratedStep::AptPackages.into(),
            Some(GeneratedStep::PythonPackages) => wire::GeneratedStep::PythonPackages.into(),
            None => wire::GeneratedStep::Unspecified.into(),
        };
        Self {
            steps: secret.steps.into_iter().map(step).collect(),
            id: secret.id,
            name: secret.name,
            file: secret.file,
            environment: secret.environment,
        }
    }
}

impl From<wire::SshAgent> for SshAgent {
    fn from(agent: wire::SshAgent) -> Self {
        Self { id: agent.id, name: agent.name }
    }
}

impl From<SshAgent> for wire::SshAgent {
    fn from(agent: SshAgent) -> Self {
        Self { id: agent.id, name: agent.name }
    }
}

impl From<wire::ContextFile> for File {
    fn from(file: wire::ContextFile) -> Self {
        Self { path: file.path, content: file.content.into(), executable: file.executable }
    }
}

impl From<wire::ImageFile> for File {
    fn from(file: wire::ImageFile) -> Self {
        Self { path: file.path, content: file.content.into(), executable: file.executable }
    }
}

impl From<File> for wire::ContextFile {
    fn from(file: File) -> Self {
        Self { path: file.path, content: file.content.into(), executable: file.executable }
    }
}

impl From<File> for wire::ImageFile {
    fn from(file: File) -> Self {
        Self { path: file.path, content: file.content.into(), executable: file.executable }
    }
}
