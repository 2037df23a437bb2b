//! The work of an assignment, as workers get it.

use proto::dispatch as wire;

use crate::{
    build::Workspace,
    image::{Configuration, Dockerfile, Source},
};

/// Returns the work of an assignment.
///
/// This is never `None`, because a worker that has taken a build supports what the build requires.
pub(super) fn work(
    configuration: &Configuration,
    workspace: Option<Workspace>,
) -> Option<wire::assignment::Work> {
    if let Some(Workspace { container, source }) = workspace {
        let snapshot = wire::Snapshot { container, source_image_id: source.to_string() };
        return Some(wire::assignment::Work::Snapshot(snapshot));
    }
    let by_hand = match &configuration.source {
        Source::Pull(pull) => {
            return Some(wire::assignment::Work::Pull(wire::Pull { reference: pull.reference.clone() }));
        }
        Source::Dockerfile(dockerfile) => dockerfile.clone(),
        Source::Generate(_) => Dockerfile::default(),
    };
    let written = configuration.written()?;
    Some(wire::assignment::Work::DockerBuild(wire::DockerBuild {
        dockerfile: written.text,
        files: written
            .files
            .into_iter()
            .map(|file| wire::ContextFile {
                path: file.path,
                content: file.content.into(),
                executable: file.executable,
            })
            .collect(),
        build_args: by_hand.build_args,
        target: by_hand.target,
        archive: by_hand.archive,
        remote: by_hand.remote,
        dockerfile_path: by_hand.dockerfile_path,
        pull_base: configuration.pull_base,
        no_cache: configuration.no_cache,
        squash: configuration.squash,
        push: configuration.push,
        secrets: configuration.secrets.iter().map(|secret| named(&secret.id, &secret.name)).collect(),
        ssh_agents: configuration.ssh_agents.iter().map(|agent| named(&agent.id, &agent.name)).collect(),
        remote_credentials: by_hand.remote_credentials,
    }))
}

fn named(id: &str, name: &str) -> wire::NamedSecret {
    wire::NamedSecret { id: id.to_owned(), name: name.to_owned() }
}
