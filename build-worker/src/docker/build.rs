//! Builds: one or more calls of Solve, each over a session of its own.

use tokio_util::sync::CancellationToken;

use super::{
    DockerEngine,
    connection::Connections,
    control::Control,
    credentials::SessionCredentials,
    solve::{self, EventSender},
    source_policy, squash,
};
use crate::engine::{BuildOrder, BuiltImage, Engine, EngineError};

impl DockerEngine {
    /// Builds an image, and squashes it if requested; returns `None` if the build was cancelled.
    pub(super) async fn build_image(
        &self,
        connections: &Connections,
        order: &BuildOrder,
        cancel: &CancellationToken,
        events: &EventSender,
    ) -> Result<Option<BuiltImage>, EngineError> {
        let Some(built) = self.solve_with_sources(connections, order, cancel, events).await? else {
            return Ok(None);
        };
        if !order.squash {
            return Ok(Some(built));
        }
        let order = squash::order(connections, order, &built).await?;
        let squashed = self.solve(connections, &order, &order.name, cancel, events).await;
        // The squashed image has taken its only name, or else it is removed with that name.
        if let Err(error) = self.remove(&built.id).await {
            tracing::warn!(id = built.id, %error, "cannot remove the image before squashing");
        }
        squashed
    }

    /// Solves a build, and again whenever it names an image that has not been decided about.
    async fn solve_with_sources(
        &self,
        connections: &Connections,
        order: &BuildOrder,
        cancel: &CancellationToken,
        events: &EventSender,
    ) -> Result<Option<BuiltImage>, EngineError> {
        /// Maximum number of images that are decided about while the build runs.
        const MAX_DECISIONS: usize = 16;
        let mut name = order.name.clone();
        let mut decisions = 0;
        loop {
            let error = match self.solve(connections, order, &name, cancel, events).await {
                Err(error) => error,
                solved => return solved,
            };
            let Some(source) = source_policy::denied(&error) else { return Err(error) };
            let Some(image) = source_policy::image(&source) else {
                return Err(source_policy::error(&source, None));
            };
            let Some(decision) = cancel.run_until_cancelled(order.sources.decide(image)).await else {
                return Ok(None);
            };
            let Some(decision) = decision? else {
                let known = order.sources.images().remove(image);
                return Err(source_policy::error(&source, known.as_ref()));
            };
            decisions += 1;
            if !decision.is_usable() || decisions > MAX_DECISIONS {
                return Err(source_policy::error(&source, Some(&decision)));
            }
            name = format!("{}-{decisions}", order.name);
        }
    }

    async fn solve(
        &self,
        connections: &Connections,
        order: &BuildOrder,
        name: &str,
        cancel: &CancellationToken,
        events: &EventSender,
    ) -> Result<Option<BuiltImage>, EngineError> {
        // What the session gives and what the policy allows are decided together.
        let credentials = SessionCredentials::of_build(self.docker_config.clone(), order.sources.as_ref());
        let open = Control::open(connections, &order.cgroup_parent, credentials, Some(order));
        let Some(control) = cancel.run_until_cancelled(open).await else {
            return Ok(None);
        };
        let control = control?;
        let request = solve::request(order, name, &control.session);
        let solved = solve::solve(&control, request, &order.stages, cancel, events).await;
        solved.map_err(|error| {
            let is_of_dockerfile =
                matches!(&error, EngineError::Broken(reason) if order.dockerfile.breaks_engines(reason));
            if is_of_dockerfile {
                const RULE: &str =
                    "the Dockerfile has bytes that are not UTF-8 where the engine cannot take them";
                return EngineError::Refused(RULE.to_owned());
            }
            control.credentials.explain(error)
        })
    }
}
