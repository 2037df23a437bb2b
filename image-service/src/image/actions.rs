//! The table of actions that are possible on an image, which callers are shown and the service enforces.

use super::{EditDraft, Image, Precondition, Status};
use crate::{
    access::{Action, Standing},
    build::BuildId,
    error::{Error, Obstacle, Refusal},
};

/// An action that a batch applies to each of its images.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum BatchAction {
    Build,
    CancelBuild,
    Enable,
    Disable,
    Delete,
}

impl Image {
    /// Returns the actions that a caller of this standing may take now.
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

    /// Checks that a caller of this standing may take an action, and that the action is possible now.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`Standing::permit`], [`Error::NotResolvable`] if the image cannot back
    /// workspaces, and [`Error::Refused`] if the image is in another state than the action needs.
    pub(crate) fn require(&self, standing: Standing, action: Action) -> Result<(), Error> {
        standing.permit(action)?;
        if action == Action::CreateWorkspace {
            let obstacles = self.obstacles();
            return if obstacles.is_empty() { Ok(()) } else { Err(Error::NotResolvable(obstacles)) };
        }
        self.refusal(action).map_or(Ok(()), |refusal| Err(Error::Refused(refusal)))
    }

    fn meets(&self, precondition: Precondition) -> bool {
        match precondition {
            Precondition::Record(etag) => etag == self.etag,
            Precondition::State(revision) => revision == self.revision,
        }
    }

    /// Checks the permission and the expected etag of a write, and that its action is possible now.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`Standing::permit`], [`Error::EtagMismatch`] if the image has changed, and the
    /// errors of [`require`](Self::require), in this order.
    pub(crate) fn admit(
        &self,
        standing: Standing,
        etag: Option<Precondition>,
        action: Action,
    ) -> Result<(), Error> {
        standing.permit(action)?;
        if etag.is_some_and(|expected| !self.meets(expected)) {
            return Err(Error::EtagMismatch);
        }
        self.require(standing, action)
    }

    /// Checks the permission and the expected etag of an edit.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`admit`](Self::admit), and those of [`Standing::require_builder`] if the edit
    /// names a part that is built.
    pub(crate) fn admit_edit(
        &self,
        standing: Standing,
        etag: Option<Precondition>,
        draft: &EditDraft,
    ) -> Result<(), Error> {
        self.admit(standing, etag, Action::Edit)?;
        if draft.names_what_is_built() { standing.require_builder() } else { Ok(()) }
    }

    /// Returns the build to cancel, which is the latest one.
    ///
    /// If a build is `meant`, it has to be the latest one.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`admit`](Self::admit), and [`Refusal::OtherBuild`] if another build is the
    /// latest one.
    pub(crate) fn build_to_cancel(
        &self,
        standing: Standing,
        etag: Option<Precondition>,
        meant: Option<BuildId>,
    ) -> Result<BuildId, Error> {
        let is_other = meant.is_some() && meant != self.latest_build;
        match self.admit(standing, etag, Action::CancelBuild) {
            // `OtherBuild` is more informative than `NoBuildInProgress`.
            Ok(()) | Err(Error::Refused(Refusal::NoBuildInProgress)) if is_other => {
                Err(Error::Refused(Refusal::OtherBuild))
            }
            admitted => {
                admitted?;
                self.latest_build.ok_or(Error::Refused(Refusal::NoBuildInProgress))
            }
        }
    }

    /// Returns everything that keeps the image from backing a workspace.
    fn obstacles(&self) -> Vec<Obstacle> {
        let mut obstacles = Vec::new();
        if self.template {
            obstacles.push(Obstacle::Template);
        } else if self.status != Some(Status::BuildFinished) {
            obstacles.push(Obstacle::NotFinished);
        }
        if self.artifact_missing {
            obstacles.push(Obstacle::ArtifactMissing);
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
