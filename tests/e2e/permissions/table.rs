//! The permission table of the design, as data. Nothing in it is taken from the services.

use proto::images::{BatchAction, ImageAction};

use super::calls::{Call, How};

/// Actions that each caller may take on an image, whatever its status.
///
/// A guest was granted the permissions at the end of its name: view, modify, delete. Plain `guest` has the
/// empty set. All have the role `builder` but those whose name ends in `*`; `creator*` is the creator without
/// it. `r` needs the role.
const CALLERS: &str = "
           SEE  CREATE_WORKSPACE  CLONE  EDIT  BUILD  CANCEL_BUILD  ENABLE  DISABLE  DELETE  SHARE
admin      y    y                 y      y     y      y             y       y        y       y
creator    y    y                 y      y     y      y             y       y        y       y
creator*   y    y                 y      y     r      y             y       y        y       y
guest      n    n                 n      n     n      n             n       n        n       n
guest-v    y    y                 y      n     n      n             n       n        n       n
guest-v*   y    y                 y      n     n      n             n       n        n       n
guest-m    y    y                 y      y     y      y             y       y        n       n
guest-m*   y    y                 y      y     r      y             y       y        n       n
guest-d    y    y                 y      n     n      n             n       n        y       n
guest-vm   y    y                 y      y     y      y             y       y        n       n
guest-vd   y    y                 y      n     n      n             n       n        y       n
guest-md   y    y                 y      y     y      y             y       y        y       n
guest-vmd  y    y                 y      y     y      y             y       y        y       n
stranger   n    n                 n      n     n      n             n       n        n       n
";

/// Effect of each action on an image in each state, for callers with permission.
///
/// `y` succeeds, `-` is accepted and changes nothing, and anything else is the reason of the refusal.
const STATES: &str = "
                            CREATE_WORKSPACE       BUILD                   CANCEL_BUILD           ENABLE  DISABLE  CLONE                  SEE  EDIT  SHARE  DELETE
image-queued                NOT_FINISHED           BUILD_IN_PROGRESS       y                      -       y        y                      y    y     y      y
image-claimed               NOT_FINISHED           BUILD_IN_PROGRESS       y                      -       y        y                      y    y     y      y
image-running-disabled      NOT_FINISHED+DISABLED  BUILD_IN_PROGRESS       y                      y       -        y                      y    y     y      y
image-publishing            NOT_FINISHED           BUILD_IN_PROGRESS       y                      -       y        y                      y    y     y      y
image-stopping              NOT_FINISHED           BUILD_IN_PROGRESS       y                      -       y        y                      y    y     y      y
image-finished              y                      y                       NO_BUILD_IN_PROGRESS   -       y        y                      y    y     y      y
image-finished-disabled     DISABLED               y                       NO_BUILD_IN_PROGRESS   y       -        y                      y    y     y      y
image-lost                  ARTIFACT_MISSING       y                       NO_BUILD_IN_PROGRESS   -       y        y                      y    y     y      y
image-failed                NOT_FINISHED           y                       NO_BUILD_IN_PROGRESS   -       y        y                      y    y     y      y
image-cancelled-disabled    NOT_FINISHED+DISABLED  y                       NO_BUILD_IN_PROGRESS   y       -        y                      y    y     y      y
rebuilt-running             NOT_FINISHED           BUILD_IN_PROGRESS       y                      -       y        y                      y    y     y      y
rebuilt-failed              NOT_FINISHED           y                       NO_BUILD_IN_PROGRESS   -       y        y                      y    y     y      y
pulled-finished             y                      y                       NO_BUILD_IN_PROGRESS   -       y        y                      y    y     y      y
snapshot-queued             NOT_FINISHED           SNAPSHOT_NOT_BUILDABLE  BUILD_NOT_CANCELLABLE  -       y        SNAPSHOT_NOT_FINISHED  y    y     y      y
snapshot-running            NOT_FINISHED           SNAPSHOT_NOT_BUILDABLE  BUILD_NOT_CANCELLABLE  -       y        SNAPSHOT_NOT_FINISHED  y    y     y      y
snapshot-finished           y                      SNAPSHOT_NOT_BUILDABLE  NO_BUILD_IN_PROGRESS   -       y        y                      y    y     y      y
snapshot-finished-disabled  DISABLED               SNAPSHOT_NOT_BUILDABLE  NO_BUILD_IN_PROGRESS   y       -        y                      y    y     y      y
snapshot-failed             NOT_FINISHED           SNAPSHOT_NOT_BUILDABLE  NO_BUILD_IN_PROGRESS   -       y        SNAPSHOT_NOT_FINISHED  y    y     y      y
template                    IS_TEMPLATE            TEMPLATE_NOT_BUILDABLE  NO_BUILD_IN_PROGRESS   -       y        y                      y    y     y      y
template-disabled           IS_TEMPLATE+DISABLED   TEMPLATE_NOT_BUILDABLE  NO_BUILD_IN_PROGRESS   y       -        y                      y    y     y      y
";

/// Callers without any access to images, each with the error that every call returns to it.
pub(super) const OUTSIDERS: [(&str, &str); 3] = [
    ("anonymous", "Unauthenticated TOKEN_MISSING"),
    ("expired", "Unauthenticated TOKEN_EXPIRED"),
    ("worker", "PermissionDenied WORKER_TOKEN"),
];

/// The action of each call.
pub(super) const CALLS: [(Call, &str); 16] = [
    (Call::GetImage, "SEE"),
    (Call::ListBuilds, "SEE"),
    (Call::GetBuild, "SEE"),
    (Call::WatchBuild, "SEE"),
    (Call::ResolveImage, "CREATE_WORKSPACE"),
    (Call::RenderDockerfile, "SEE"),
    (Call::CloneImage, "CLONE"),
    (Call::UpdateImage, "EDIT"),
    (Call::BuildImage, "BUILD"),
    (Call::CancelBuild, "CANCEL_BUILD"),
    (Call::EnableImage, "ENABLE"),
    (Call::DisableImage, "DISABLE"),
    (Call::DeleteImage, "DELETE"),
    (Call::ListGrants, "SHARE"),
    (Call::GrantAccess, "SHARE"),
    (Call::RevokeAccess, "SHARE"),
];

/// The call that each row of a batch stands for.
pub(super) const BATCHES: [(BatchAction, Call); 5] = [
    (BatchAction::Build, Call::BuildImage),
    (BatchAction::CancelBuild, Call::CancelBuild),
    (BatchAction::Enable, Call::EnableImage),
    (BatchAction::Disable, Call::DisableImage),
    (BatchAction::Delete, Call::DeleteImage),
];

pub(super) fn callers() -> Vec<&'static str> {
    rows(CALLERS)
}

pub(super) fn states() -> Vec<&'static str> {
    rows(STATES)
}

fn may(caller: &str, action: &str) -> bool {
    cell(CALLERS, caller, action) == "y"
}

/// Returns whether the action has an effect on an image in this state.
pub(super) fn does(state: &str, action: &str) -> bool {
    cell(STATES, state, action) == "y"
}

fn action_of(call: Call) -> &'static str {
    CALLS.iter().find(|entry| entry.0 == call).map(|(_, action)| *action).expect("every call is in the table")
}

/// Returns the outcome of a call, in the words of `calls::status_text`.
///
/// Existence is checked before permission, then the etag, then the state.
pub(super) fn expected(caller: &str, call: Call, state: &str, how: How) -> String {
    let action = action_of(call);
    if state == "missing" || !may(caller, "SEE") {
        let what = if matches!(call, Call::GetBuild | Call::WatchBuild) { "BUILD" } else { "IMAGE" };
        return format!("NotFound {what}_NOT_FOUND");
    }
    if cell(CALLERS, caller, action) == "r" {
        return "PermissionDenied ROLE_MISSING".to_owned();
    }
    if !may(caller, action) {
        return format!("PermissionDenied ACTION_FORBIDDEN IMAGE_ACTION_{action}");
    }
    if how == How::AskWithStaleEtag {
        return "Aborted ETAG_MISMATCH".to_owned();
    }
    match cell(STATES, state, action) {
        "y" | "-" => "OK".to_owned(),
        missing if call == Call::ResolveImage => format!("FailedPrecondition NOT_RESOLVABLE {missing}"),
        refusal => format!("FailedPrecondition {refusal} {refusal}"),
    }
}

/// Returns the `allowed_actions` of an image in this state, as the caller should see them.
pub(super) fn allowed(caller: &str, state: &str) -> Vec<ImageAction> {
    // In the order of the enum, whose zero is no action.
    let actions = (1..).map_while(|number| ImageAction::try_from(number).ok());
    let name = |action: ImageAction| action.as_str_name().trim_start_matches("IMAGE_ACTION_");
    actions.filter(|action| may(caller, name(*action)) && does(state, name(*action))).collect()
}

/// Returns the [`ImageAction`] of an action, or `None` for `SEE`, which is not listed as allowed.
pub(super) fn listed_action(action: &str) -> Option<ImageAction> {
    ImageAction::from_str_name(&format!("IMAGE_ACTION_{action}"))
}

fn rows(table: &'static str) -> Vec<&'static str> {
    table.trim().lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect()
}

fn cell(table: &'static str, row: &str, column: &str) -> &'static str {
    let (head, body) = table.trim().split_once('\n').expect("a head and rows");
    let column = head.split_whitespace().position(|name| name == column).expect("a column of the table");
    let cells =
        body.lines().map(str::split_whitespace).find_map(|mut cells| (cells.next()? == row).then_some(cells));
    cells.and_then(|mut cells| cells.nth(column)).expect("a row of the table")
}
