//! The entry point script of an image.

use std::fmt::Write;

use super::quoted;
use crate::image::configuration::Service;

const HEAD: &str = "#!/bin/sh
# Runs the start-up commands one after the other, starts the services, and becomes the given command.
";

/// Returns a script that runs the start-up commands, starts the services, and executes its arguments.
///
/// The commands run in order, and the services as the image's user. A command that fails and a service that
/// ends are reported on standard error and stop nothing else, because a workspace has to start to be
/// repaired.
pub(super) fn script(start_commands: &[String], services: &[Service]) -> String {
    let mut script = HEAD.to_owned();
    for (number, command) in (1..).zip(start_commands) {
        line(
            &mut script,
            format_args!(
                "sh -c {} || echo \"trailer: start-up command {number} has ended with status $?\" >&2",
                quoted(command)
            ),
        );
    }
    for Service { name, command, environment, .. } in services {
        line(&mut script, format_args!("("));
        for (variable, value) in environment {
            line(&mut script, format_args!("  export {variable}={}", quoted(value)));
        }
        line(&mut script, format_args!("  sh -c {}", quoted(command)));
        line(
            &mut script,
            format_args!("  echo \"trailer: the service {name} has ended with status $?\" >&2"),
        );
        line(&mut script, format_args!(") &"));
    }
    script.push_str("exec \"$@\"\n");
    script
}

fn line(script: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(script, "{text}");
}
