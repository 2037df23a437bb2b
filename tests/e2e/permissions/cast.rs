//! Callers of the table, and images of the creator in each state.

use anyhow::Context as _;
use image_service::Role;
use proto::{
    dispatch::{
        ArtifactName, Attempt, Built, Failed, FailureKind, Hello, ReportArtifactsRequest, Started, Stopped,
        Succeeded, connect_response::Message as FromService, report_event::Event,
    },
    images::{self as api, Permission, grant::Grantee, image_config::Source},
};

use super::{calls::Target, table};
use crate::{
    actor::{Actor, IMAGE_ID, hello},
    client::{Client, image},
    stack::Service,
};

pub(super) const WORKER: &str = "w1";

/// Returns a caller of the table.
pub(super) fn client(service: &Service, caller: &str) -> Client {
    let roles = match caller {
        "admin" => &[Role::Admin][..],
        "stranger" => &[],
        _ if caller.ends_with('*') => &[],
        _ => &[Role::Builder],
    };
    let subject = if caller == "creator*" { "creator" } else { caller };
    service.client(&service.token_of_member(subject, roles, &[&group_of(caller), "all of them"]))
}

/// Returns the group of a caller, of which it is the only member.
fn group_of(caller: &str) -> String {
    format!("group of {caller}")
}

/// Grants a guest the permissions in its name, in person or as a member of its group.
pub(super) async fn admit(
    creator: &Client,
    caller: &str,
    image: &str,
    as_member: bool,
) -> anyhow::Result<()> {
    let Some(letters) = caller.strip_prefix("guest") else {
        return Ok(());
    };
    let permissions = letters.trim_matches(['-', '*']).chars().map(|letter| match letter {
        'v' => Permission::View,
        'm' => Permission::Modify,
        'd' => Permission::Delete,
        _ => Permission::Unspecified,
    });
    let grantee =
        if as_member { Grantee::Group(group_of(caller)) } else { Grantee::Subject(caller.to_owned()) };
    creator.grant_to(image, grantee, &permissions.collect::<Vec<_>>()).await?;
    Ok(())
}

/// Returns a target that does not exist.
pub(super) fn nowhere() -> Target {
    let id = || uuid::Uuid::now_v7().to_string();
    Target { state: "missing", image: id(), build: id() }
}

/// A scripted worker that leaves each build in the state that is wanted.
///
/// All builds but those that stay queued are pinned to it.
pub(super) struct Stage<'a> {
    service: &'a Service,
    actor: Actor,
    /// The image of which snapshots are taken.
    source: Option<String>,
}

impl<'a> Stage<'a> {
    pub(super) async fn set(service: &'a Service) -> anyhow::Result<Self> {
        let actor = Actor::connect(service, Hello { slots: 100, ..hello(WORKER, &[]) }).await?;
        Ok(Self { service, actor, source: None })
    }

    /// Hands the worker over to the caller.
    pub(super) fn leave(self) -> Actor {
        self.actor
    }

    /// Creates an image in each state, with a grant to each guest.
    pub(super) async fn fill(&mut self) -> anyhow::Result<Vec<Target>> {
        let creator = client(self.service, "creator");
        let mut targets = Vec::new();
        for (number, state) in table::states().into_iter().enumerate() {
            let target = self.bring(&creator, state).await.with_context(|| format!("no {state}"))?;
            for caller in table::callers() {
                admit(&creator, caller, &target.image, number % 2 == 0).await?;
            }
            targets.push(target);
        }
        Ok(targets)
    }

    /// Creates an image in a state, whose words are its kind, the progress of its build, and `disabled`.
    async fn bring(&mut self, creator: &Client, state: &'static str) -> anyhow::Result<Target> {
        let mut words = state.split('-');
        let (kind, progress) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let worker = if progress == "queued" { "absent" } else { WORKER };
        let mut wanted = image(state, "FROM scratch");
        wanted.enabled = Some(!state.ends_with("disabled"));
        wanted.template = kind == "template";
        let config = wanted.config.as_mut().expect("an image has a configuration");
        worker.clone_into(&mut config.worker);
        if kind == "pulled" {
            config.source = Some(Source::Pull(api::PullSource { reference: "busybox:1".to_owned() }));
        }
        let created = match kind {
            "snapshot" => self.snapshot(wanted, worker).await?,
            _ => {
                let request = api::CreateImageRequest { image: Some(wanted), ..Default::default() };
                creator.images.clone().create_image(request).await?.into_inner().image.expect("an image")
            }
        };
        let (id, mut build) = (created.id, created.latest_build_id);
        self.source.get_or_insert_with(|| id.clone());
        if kind == "rebuilt" {
            self.play(creator, &id, kind, "finished").await?;
            build = creator.build(&id).await?.id;
        }
        if !matches!(progress, "" | "queued" | "disabled") {
            self.play(creator, &id, kind, progress).await?;
        }
        Ok(Target { state, image: id, build })
    }

    async fn snapshot(&self, image: api::Image, worker: &str) -> anyhow::Result<api::Image> {
        let workspaces = self.service.client(&self.service.token("workspaces", &[Role::Service]));
        let request = api::SnapshotWorkspaceRequest {
            source_image_id: self.source.clone().expect("an image comes before the snapshots"),
            worker: worker.to_owned(),
            container: "workspace".to_owned(),
            creator: "creator".to_owned(),
            image: Some(image),
            ..Default::default()
        };
        let response = workspaces.images.clone().snapshot_workspace(request).await?.into_inner();
        Ok(response.image.expect("an image"))
    }

    /// Takes the next build, which must be that of this image, as far as `progress`.
    async fn play(
        &mut self,
        creator: &Client,
        image: &str,
        kind: &str,
        progress: &str,
    ) -> anyhow::Result<()> {
        let (assignment, attempt) = loop {
            if let FromService::Assignment(assignment) = self.actor.next().await? {
                let attempt = assignment.attempt.clone().expect("an assignment names its attempt");
                break (assignment, attempt);
            }
        };
        assert_eq!(assignment.image_id, image);
        // Pulls and snapshots have nothing to publish.
        let built = (!matches!(kind, "pulled" | "snapshot")).then_some(Event::Built(Built {}));
        let succeeded = Succeeded { image_id: IMAGE_ID.to_owned(), size_bytes: 1, ..Default::default() };
        let failed = Failed { kind: FailureKind::User.into(), message: "no".to_owned(), ..Failed::default() };
        let last: Vec<Event> = match progress {
            "claimed" => return Ok(()),
            "running" | "stopping" => vec![],
            "publishing" => built.into_iter().collect(),
            "finished" | "lost" => built.into_iter().chain([Event::Succeeded(succeeded)]).collect(),
            "failed" => vec![Event::Failed(failed)],
            "cancelled" => vec![Event::Stopped(Stopped { confirmed: true })],
            _ => anyhow::bail!("how would a build be {progress}?"),
        };
        self.report(&attempt, 1, vec![Event::Started(Started {})]).await?;
        if matches!(progress, "stopping" | "cancelled") {
            creator.cancel(image).await?;
        }
        if !last.is_empty() {
            self.report(&attempt, 2, last).await?;
        }
        if progress == "lost" {
            let name = ArtifactName { image_id: image.to_owned(), build_id: attempt.build_id };
            let request = ReportArtifactsRequest { missing: vec![name], ..Default::default() };
            let worker = self.service.client(&self.service.token(WORKER, &[Role::Worker]));
            worker.dispatch.clone().report_artifacts(request).await?;
        }
        Ok(())
    }

    /// Reports events and waits until they are durable.
    async fn report(&mut self, attempt: &Attempt, first: i64, events: Vec<Event>) -> anyhow::Result<()> {
        let last = first - 1 + i64::try_from(events.len())?;
        self.actor.report(attempt, first, events).await;
        loop {
            let message = self.actor.next().await?;
            anyhow::ensure!(!matches!(message, FromService::Drop(_)), "the report was refused");
            if matches!(message, FromService::ReportAck(ack) if ack.sequence == last) {
                return Ok(());
            }
        }
    }
}
