//! What can be done with an image now: the one table that callers are told of and that the service enforces.

use super::{Image, Status};
use crate::{
    access::{Action, Standing},
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
