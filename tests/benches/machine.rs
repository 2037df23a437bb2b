//! Machine and versions that the figures were measured on.

use std::{fs, process::Command};

/// Prints the machine and the versions as a Markdown table.
pub(crate) fn print() {
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let memory = line_of("/proc/meminfo", "MemTotal:").and_then(|line| {
        let kibibytes: u64 = line.trim_end_matches(" kB").parse().ok()?;
        Some(kibibytes / 1024 / 1024)
    });
    println!("| | |\n|---|---|");
    for (what, value) in [
        ("date", output("date", &["-u", "+%Y-%m-%d %H:%M UTC"])),
        ("commit", output("git", &["describe", "--always", "--dirty", "--abbrev=12"])),
        ("processor", line_of("/proc/cpuinfo", "model name").map(|name| format!("{name}, {cores} cores"))),
        ("memory", memory.map(|gibibytes| format!("{gibibytes} GiB"))),
        ("kernel", output("uname", &["-sr"])),
        ("rustc", output("rustc", &["--version"])),
        ("Docker Engine", output("docker", &["version", "--format", "{{.Server.Version}}"])),
    ] {
        println!("| {what} | {} |", value.unwrap_or_else(|| "unknown".to_owned()));
    }
}

fn line_of(file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim_start_matches([' ', '\t', ':']).to_owned())
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}
