//! The kind of Docker Engine that the tests run on, as tests/needs tells it by the environment: tests start further ones of it.

use std::env;

/// Begins the command of a dockerd of that kind; its own flags follow.
pub(crate) fn command() -> Vec<String> {
    let (Some(program), Some(root)) = (variable("DOCKERD"), variable("ENGINE_ROOT")) else {
        return vec!["dockerd".to_owned()];
    };
    let flags = variable("ENGINE_FLAGS").unwrap_or_default();
    let mut command = vec![program];
    command.extend(flags.split_whitespace().map(ToOwned::to_owned));
    command.push(root);
    command.extend(variable("ENGINE_CONFIG").map(|config| format!("--config-file={config}")));
    command
}

/// Returns whether containers start there. Where dockerd takes systemd for running and it is not, only builds do.
pub(crate) fn starts_containers() -> bool {
    variable("ENGINE_FLAGS").is_none_or(|flags| !flags.contains("--systemd"))
}

/// Returns whether the control groups of its steps bound their memory. Where a hierarchy of version 2 is mounted on a host whose
/// controllers are those of version 1, they do not.
pub(crate) fn has_memory_controller() -> bool {
    variable("ENGINE_FLAGS").is_none_or(|flags| !flags.contains("--cgroup2"))
}

fn variable(name: &str) -> Option<String> {
    env::var(format!("TRAILER_TEST_{name}")).ok()
}
