//! Docker builds: their context, what they may use, and their start.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex},
};

use proto::dispatch::DockerBuild;

use super::{Job, outcome::Ended};
use crate::{
    build_sources::BuildSources,
    context_archive::ArchiveError,
    context_download,
    context_preparation::{PreparedContext, prepare},
    dockerfile,
    engine::{BuildOrder, EngineError, RunningWork},
    engine_support::{ADD_GIT_DIRECTORY, FOREIGN_FRONTENDS},
    labels::{CATALOGUE_LABEL, IMAGE_LABEL, REFERENCE_LABEL, WORKER_LABEL},
    secrets::{BuildSecrets, Netrc},
    trust_domain::TrustDomain,
};

/// Build argument that keeps the cache mounts of trust domains apart.
const CACHE_MOUNT_NAMESPACE: &str = "BUILDKIT_CACHE_MOUNT_NS";

impl Job {
    /// Returns the context of a build as the engine gets it.
    pub(super) async fn context(
        &self,
        order: &DockerBuild,
        credentials: &Netrc,
    ) -> Result<PreparedContext, Ended> {
        let attempt = self.assignment.attempt.clone().unwrap_or_default();
        let (service, spool) = (self.service.as_ref(), self.spool.as_ref());
        let context =
            context_download::context_of(order, &attempt, service, spool, &self.remotes, credentials).await?;
        prepare(context, order, spool).await.map_err(|error| match error {
            ArchiveError::Refused(rule) => Ended::by_user(rule),
            // The service has checked what was uploaded.
            ArchiveError::Io(error) if !order.remote.is_empty() => {
                Ended::by_user(format!("{}: cannot be unpacked: {error}", order.remote))
            }
            ArchiveError::Io(error) => {
                Ended::by_infrastructure(format!("cannot prepare the context: {error}"))
            }
        })
    }

    /// Starts a build, of which the engine first learns what it may use.
    pub(super) fn start(
        &self,
        order: &DockerBuild,
        prepared: PreparedContext,
        secrets: Arc<BuildSecrets>,
    ) -> Result<Box<dyn RunningWork>, EngineError> {
        let domain = TrustDomain::parse(&self.assignment.trust_domain)
            .ok_or_else(|| EngineError::Refused("the service has named no trust domain".to_owned()))?;
        let mut build_args = self.proxies.clone();
        build_args.extend(order.build_args.clone());
        build_args.insert(CACHE_MOUNT_NAMESPACE.to_owned(), domain.to_string());
        let PreparedContext { context, dockerfile, text } = prepared;
        let sources = BuildSources {
            pull_base: order.pull_base,
            names_platform: dockerfile::may_name_platform(&text, &build_args),
            references: dockerfile::image_references(&text, &build_args, &order.target),
            frontend: dockerfile::frontend(&text).map(str::to_owned),
            ..self.sources()
        };
        self.engine.build(BuildOrder {
            name: self.name(),
            tag: self.attempt_tag(),
            context: Arc::new(context),
            dockerfile,
            stages: dockerfile::stages(&text),
            build_args,
            target: order.target.clone(),
            sources: Arc::new(sources),
            no_cache: order.no_cache,
            squash: order.squash,
            labels: self.labels(),
            secrets,
            cgroup_parent: self.group.path(&domain.with_secrets(&order.secrets, &order.ssh_agents)),
            compression: self.compression.clone(),
        })
    }

    /// Returns the sources of an attempt without a Dockerfile, about which nothing is decided yet.
    pub(super) fn sources(&self) -> BuildSources {
        let support = self.readiness.support();
        BuildSources {
            attempt: self.assignment.attempt.clone().unwrap_or_default(),
            catalogue: self.catalogue.clone(),
            engine: Arc::clone(&self.engine),
            service: Arc::clone(&self.service),
            bases: Arc::clone(&self.bases),
            rules: Arc::clone(&self.source_rules),
            creator: self.assignment.creator.clone(),
            pull_base: false,
            names_platform: false,
            references: BTreeSet::new(),
            frontend: None,
            allows_frontends: !support.withholds(FOREIGN_FRONTENDS),
            allows_git_directories: !support.withholds(ADD_GIT_DIRECTORY),
            decisions: Mutex::default(),
            in_use: Mutex::default(),
        }
    }

    /// Returns the labels of the images that the attempt makes.
    pub(super) fn labels(&self) -> HashMap<String, String> {
        HashMap::from([
            (IMAGE_LABEL.to_owned(), self.assignment.image_id.clone()),
            (WORKER_LABEL.to_owned(), self.worker.clone()),
            (REFERENCE_LABEL.to_owned(), self.assignment.reference.clone()),
            (CATALOGUE_LABEL.to_owned(), self.catalogue.clone()),
        ])
    }
}
