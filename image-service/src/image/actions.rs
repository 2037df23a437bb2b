//! What can be done with an image now: the one table that callers are told of and that the service enforces.

use super::{Etag, Image, Status};
use crate::{
    access::{Action, Standing},
    build::BuildId,
    error::{Error, Obstacle, Refusal},
};

/// What a batch can do with each of its images.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum BatchAction {
    Build,
    CancelBuild,
    Enable,
    Disable,
    Delete,
}

impl Image {
    /// What somebody of this standing may do now.
    pub(crate) fn allowed_actions(&self, standing: Standing) -> Vec<Action> {
        let changes_something = |action| match action {
            Action::Enable => !self.enabled,
            Action::Disable => self.enabled,
            Action::CreateWorkspace
            | Action::Build
            | Action::CancelBuild
            | Action::Clone
            | Action::Edit
            | Action::Share
            | Action::Delete => true,
        };
        Action::ALL
            .into_iter()
            .filter(|action| self.require(standing, *action).is_ok() && changes_something(*action))
            .collect()
    }

    /// Fails unless somebody of this standing may do this, and it can be done.
    pub(crate) fn require(&self, standing: Standing, action: Action) -> Result<(), Error> {
        if !standing.permits(action) {
            return Err(Error::Forbidden(action));
        }
        if action == Action::CreateWorkspace {
            let obstacles = self.obstacles();
            return if obstacles.is_empty() { Ok(()) } else { Err(Error::NotResolvable(obstacles)) };
        }
        self.refusal(action).map_or(Ok(()), |refusal| Err(Error::Refused(refusal)))
    }

    /// Checks a write of somebody of this standing: the permission, the state that is meant, and whether it can be done.
    ///
    /// # Errors
    ///
    /// [`Error::Forbidden`], [`Error::EtagMismatch`], and those of [`require`](Self::require), in this order.
    pub(crate) fn admit(&self, standing: Standing, etag: Option<Etag>, action: Action) -> Result<(), Error> {
        if !standing.permits(action) {
            return Err(Error::Forbidden(action));
        }
        if etag.is_some_and(|etag| etag != self.etag) {
            return Err(Error::EtagMismatch);
        }
        self.require(standing, action)
    }

    /// Returns the build that a cancel is about: the latest one, if it is the one that is meant.
    ///
    /// # Errors
    ///
    /// Those of [`admit`](Self::admit), and [`Refusal::OtherBuild`].
    pub(crate) fn build_to_cancel(
        &self,
        standing: Standing,
        etag: Option<Etag>,
        meant: Option<BuildId>,
    ) -> Result<BuildId, Error> {
        let is_other = meant.is_some() && meant != self.latest_build;
        match self.admit(standing, etag, Action::CancelBuild) {
            // That another build is the latest one says more than that there is nothing to cancel.
            Ok(()) | Err(Error::Refused(Refusal::NoBuildInProgress)) if is_other => {
                Err(Error::Refused(Refusal::OtherBuild))
            }
            admitted => {
                admitted?;
                self.latest_build.ok_or(Error::Refused(Refusal::NoBuildInProgress))
            }
        }
    }

    /// Everything that keeps it from backing a workspace.
    fn obstacles(&self) -> Vec<Obstacle> {
        let mut obstacles = Vec::new();
        if self.template {
            obstacles.push(Obstacle::Template);
        } else if self.status != Some(Status::BuildFinished) {
            obstacles.push(Obstacle::NotFinished);
        }
        if !self.enabled {
            obstacles.push(Obstacle::Disabled);
        }
        obstacles
    }

    fn refusal(&self, action: Action) -> Option<Refusal> {
        use Status::{BuildCancelled, BuildFinished, BuildPending, Building, Error, Snapshotting};
        match (action, self.status) {
            (Action::Build, None) => Some(Refusal::TemplateNotBuildable),
            (Action::Build, Some(_)) if self.snapshot => Some(Refusal::SnapshotNotBuildable),
            (Action::Build, Some(BuildPending | Building | Snapshotting)) => Some(Refusal::BuildInProgress),
            (Action::Build, Some(BuildFinished | BuildCancelled | Error)) => None,
            (Action::CancelBuild, Some(BuildPending | Building)) => None,
            (Action::CancelBuild, Some(Snapshotting)) => Some(Refusal::BuildNotCancellable),
            (Action::CancelBuild, None | Some(BuildFinished | BuildCancelled | Error)) => {
                Some(Refusal::NoBuildInProgress)
            }
            (Action::Clone, status) if self.snapshot && status != Some(BuildFinished) => {
                Some(Refusal::SnapshotNotFinished)
            }
            (
                Action::CreateWorkspace
                | Action::Enable
                | Action::Disable
                | Action::Clone
                | Action::Edit
                | Action::Share
                | Action::Delete,
                _,
            ) => None,
        }
    }
}
