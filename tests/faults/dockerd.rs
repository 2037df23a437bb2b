//! The kind of Docker Engine that tests start, which `tests/needs` sets in the environment.

use std::env;

/// Returns the start of a dockerd command, to which the caller adds flags.
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

/// Returns whether containers can be started.
///
/// Only builds work where dockerd assumes systemd but systemd is not running.
pub(crate) fn starts_containers() -> bool {
    variable("ENGINE_FLAGS").is_none_or(|flags| !flags.contains("--systemd"))
}

/// Returns whether the cgroups of build steps limit memory.
///
/// They do not if a version 2 hierarchy is mounted on a host whose controllers are those of version 1.
pub(crate) fn has_memory_controller() -> bool {
    variable("ENGINE_FLAGS").is_none_or(|flags| !flags.contains("--cgroup2"))
}

fn variable(name: &str) -> Option<String> {
    env::var(format!("TRAILER_TEST_{name}")).ok()
}
