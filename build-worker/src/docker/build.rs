//! Builds: one or more calls of Solve, each over a session of its own.

use tokio_util::sync::CancellationToken;

use super::{DockerEngine, connection::Connections, control::Control, solve, source_policy, squash};
use crate::{
    engine::{BuildOrder, BuiltImage, Engine, EngineError, EventSender, ImageDecision},
    reference,
};

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
        let squashed = self.solve(connections, &order, &order.name, None, cancel, events).await;
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
        let Some(frontend) = cancel.run_until_cancelled(order.sources.prepare(events)).await else {
            return Ok(None);
        };
        let frontend = frontend?;
        let mut name = order.name.clone();
        let mut decisions = 0;
        loop {
            let solved = self.solve(connections, order, &name, frontend.as_deref(), cancel, events).await;
            let error = match solved {
                Err(error) => error,
                solved => return solved,
            };
            let Some(source) = source_policy::denied(&error) else {
                return Err(self.explain(order, error).await);
            };
            let Some(image) = source_policy::image(&source) else {
                return Err(source_policy::error(&source, None));
            };
            if let Some(known) = order.sources.images().get(image) {
                return Err(source_policy::error(&source, Some(known)));
            }
            let Some(decision) = cancel.run_until_cancelled(order.sources.decide(image, events)).await else {
                return Ok(None);
            };
            let decision = decision?;
            decisions += 1;
            if !decision.is_usable() || decisions > MAX_DECISIONS {
                return Err(source_policy::error(&source, Some(&decision)));
            }
            name = format!("{}-{decisions}", order.name);
        }
    }

    /// Explains why the engine looked for an image that was decided about in a registry, by a name of ours.
    ///
    /// It has the image for another platform, or somebody has removed the image meanwhile.
    async fn explain(&self, order: &BuildOrder, error: EngineError) -> EngineError {
        let Some(sought) = source_policy::sought(&error) else { return error };
        let images = order.sources.images();
        let is_sought = |decision: &ImageDecision| match decision {
            ImageDecision::Usable { name, .. } => *name == sought,
            ImageDecision::Missing(_) | ImageDecision::Refused | ImageDecision::Elsewhere { .. } => false,
        };
        let image = images.iter().find(|(_, decision)| is_sought(decision)).map(|(image, _)| image);
        let image = reference::familiar(image.unwrap_or(&sought));
        match self.image(&sought).await {
            Ok(Some(_)) => EngineError::Refused(format!(
                "{image}: is not for the platform that the build wants; builds use images for the platform of their engine"
            )),
            Ok(None) => EngineError::removed(image),
            Err(error) => error,
        }
    }

    async fn solve(
        &self,
        connections: &Connections,
        order: &BuildOrder,
        name: &str,
        frontend: Option<&str>,
        cancel: &CancellationToken,
        events: &EventSender,
    ) -> Result<Option<BuiltImage>, EngineError> {
        let open = Control::open(connections, &order.cgroup_parent, Some(order));
        let Some(control) = cancel.run_until_cancelled(open).await else {
            return Ok(None);
        };
        let control = control?;
        let request = solve::request(order, name, frontend, &control.session);
        let solved = solve::solve(&control, request, &order.stages, cancel, events).await;
        solved.map_err(|error| {
            let is_of_dockerfile =
                matches!(&error, EngineError::Broken(reason) if order.dockerfile.breaks_engines(reason));
            if is_of_dockerfile {
                const RULE: &str =
                    "the Dockerfile has bytes that are not UTF-8 where the engine cannot take them";
                return EngineError::Refused(RULE.to_owned());
            }
            error
        })
    }
}
