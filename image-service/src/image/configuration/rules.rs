//! The rules for single texts of a configuration. The error of each function is the violated rule.

use super::{apt_package::is_package, python_requirement::is_requirement};
use crate::{build_context::ContextDigest, image::reference::PulledReference};

const MAX_PATH: usize = 255;
const MAX_URL: usize = 2 * 1024;
const MAX_LINE: usize = 4 * 1024;
const MAX_INSTRUCTION_VALUE: usize = 16 * 1024;

pub(super) type Rule = fn(&str) -> Result<(), &'static str>;

/// Checks a text, which may be anything that databases and shells can hold.
pub(super) fn text(text: &str) -> Result<(), &'static str> {
    if text.contains('\0') { Err("must not contain NUL") } else { Ok(()) }
}

/// Checks a text of one line.
pub(super) fn line(text: &str) -> Result<(), &'static str> {
    if text.contains(['\0', '\n', '\r']) { Err("must be one line, without NUL") } else { Ok(()) }
}

/// Checks the value of an environment variable in an instruction.
///
/// It is bounded because the engine rejects lines of over 64 KiB.
pub(super) fn instruction_value(text: &str) -> Result<(), &'static str> {
    if text.len() > MAX_INSTRUCTION_VALUE { Err("must have at most 16 KiB") } else { line(text) }
}

/// Checks a shell command.
pub(super) fn command(text: &str) -> Result<(), &'static str> {
    if text.trim().is_empty() {
        Err("must not be empty")
    } else if text.len() > MAX_LINE {
        Err("must have at most 4 KiB")
    } else {
        line(text)
    }
}

/// Checks the name of a build argument. BuildKit gives some names a meaning of their own.
///
/// Proxies are the operator's, and no part of the engine's cache keys: an author who chose one would choose
/// what later builds find in the cache. `BUILDKIT_` arguments steer the frontend, for instance to run another
/// one.
pub(super) fn build_argument(name: &str) -> Result<(), &'static str> {
    variable(name)?;
    let lower = name.to_ascii_lowercase();
    if lower.starts_with("buildkit_") {
        return Err("must not begin with `BUILDKIT_`: such arguments steer the engine");
    }
    match lower.strip_suffix("_proxy") {
        Some("http" | "https" | "ftp" | "no" | "all") => {
            Err("must not name a proxy: builds use the proxies of the worker's Docker configuration")
        }
        Some(_) | None => Ok(()),
    }
}

/// Checks the name of an environment variable or of an ARG.
pub(super) fn variable(name: &str) -> Result<(), &'static str> {
    let fits = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.len() <= 255
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    if fits {
        Ok(())
    } else {
        Err("must be letters, digits and `_`, not beginning with a digit: at most 255")
    }
}

/// Checks an apt package: `name`, `name:architecture`, `name=version`, `name/release`.
pub(super) fn apt_package(package: &str) -> Result<(), &'static str> {
    let fits = package.len() <= 255 && is_package(package);
    if fits {
        Ok(())
    } else {
        Err(
            "must be the name of a Debian package, optionally followed by `:architecture`, `=version` or `/release`",
        )
    }
}

/// Checks a Python package: a requirement as of PEP 508, with spaces, markers and URLs.
pub(super) fn python_package(package: &str) -> Result<(), &'static str> {
    const MAX: usize = 1024;
    // The engine would take what follows for the name of a document.
    let is_safe = !package.contains("<<") && !package.contains('\\') && !package.contains(char::is_control);
    let has_plain_spaces = package.chars().all(|c| c == ' ' || !c.is_whitespace());
    if package.len() <= MAX && is_safe && has_plain_spaces && is_requirement(package) {
        Ok(())
    } else {
        Err(
            "must be a requirement as of PEP 508, such as `name[extra] >= 1, < 2; python_version < \"3.12\"`, of at most 1,024 bytes",
        )
    }
}

/// Checks the name of a user by the rules of Debian's `adduser`.
pub(super) fn user(name: &str) -> Result<(), &'static str> {
    let fits = name.len() <= 32
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-".contains(c));
    if fits {
        Ok(())
    } else {
        Err("must be lower-case letters, digits, `_` and `-`, at most 32, not beginning with a digit or `-`")
    }
}

/// Checks the name of a service.
pub(super) fn service(name: &str) -> Result<(), &'static str> {
    let fits = name.len() <= 63
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    if fits {
        Ok(())
    } else {
        Err("must be lower-case letters, digits and `-`, beginning with a letter: at most 63")
    }
}

/// Checks the name of a build stage.
pub(super) fn stage(name: &str) -> Result<(), &'static str> {
    let fits = name.len() <= 255
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    if fits {
        Ok(())
    } else {
        Err("must be letters, digits, `_`, `.` and `-`, beginning with a letter or digit: at most 255")
    }
}

/// Checks the name of a worker, or the name or value of a label.
pub(super) fn label(text: &str) -> Result<(), &'static str> {
    if text.len() > 255 || text.chars().any(char::is_control) {
        Err("must have at most 255 bytes and no control characters")
    } else {
        Ok(())
    }
}

/// Checks a reference that is to be pulled from a registry.
pub(super) fn image(reference: &str) -> Result<(), &'static str> {
    PulledReference::parse(reference).map(|_| ()).ok_or("must be a Docker reference, such as `ubuntu:24.04`")
}

/// Checks the path of a file in a build context.
pub(super) fn context_path(path: &str) -> Result<(), &'static str> {
    if path.starts_with('/') {
        Err("must be relative")
    } else if path == "Dockerfile" {
        Err("must not be `Dockerfile`: that is the configuration's `text`")
    } else {
        check_path(path)
    }
}

/// Checks a path within an archive or a remote context.
pub(super) fn path(path: &str) -> Result<(), &'static str> {
    if path.starts_with('/') { Err("must be relative") } else { check_path(path) }
}

/// Checks the digest of an archive.
pub(super) fn digest(text: &str) -> Result<(), &'static str> {
    ContextDigest::parse(text).map(|_| ())
}

/// Checks the URL of a remote context. It must not hold a password, because everyone who sees the image sees
/// the URL.
pub(super) fn remote(url: &str) -> Result<(), &'static str> {
    if url.len() > MAX_URL || !url.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("must have at most 2 KiB of printable ASCII, without spaces");
    }
    let schemes = ["https://", "http://"];
    let Some(rest) = schemes.iter().find_map(|scheme| url.strip_prefix(scheme)) else {
        return Err("must begin with `https://` or `http://`");
    };
    let host = rest.split(['/', '?', '#']).next().unwrap_or_default();
    if host.contains('@') {
        Err("must not contain a user or a password: everyone who may view the image would see them")
    } else if host.is_empty() {
        Err("must name a host")
    } else {
        Ok(())
    }
}

/// Checks the path of a file in an image.
pub(super) fn image_path(path: &str) -> Result<(), &'static str> {
    if path.len() > MAX_PATH {
        return Err("must have at most 255 bytes");
    }
    path.strip_prefix('/').map_or(Err("must be absolute"), check_path)
}

fn check_path(path: &str) -> Result<(), &'static str> {
    if path.is_empty() {
        Err("must not be empty")
    } else if path.len() > MAX_PATH {
        Err("must have at most 255 bytes")
    } else if path.chars().any(char::is_control) {
        Err("must not contain control characters")
    } else if path.split('/').any(|name| matches!(name, "" | "." | "..")) {
        Err("must not contain empty, `.` or `..` names")
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_rule(rule: Rule, good: &[&str], bad: &[&str]) {
        for text in good {
            assert_eq!(rule(text), Ok(()), "{text:?}");
        }
        for text in bad {
            assert!(rule(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn packages_are_names_with_versions_and_nothing_else() {
        assert_rule(
            apt_package,
            &[
                "git",
                "g++",
                "libssl3",
                "libc6:i386",
                "nginx=1.22.1-9+deb12u1",
                "vim/bookworm",
                "gcc:amd64=4:12.2.0-3",
            ],
            &[
                "",
                "a",
                "-y",
                "Git",
                "git curl",
                "git;id",
                "git=",
                "git:",
                "git=$(id)",
                "git/",
                "vim-",
                "vim:amd64-",
                "vim=1.0-",
                "vim/stable-",
                "vim-=1",
                "../x",
                "git\n",
                "é",
            ],
        );
        assert_rule(
            python_package,
            &[
                "numpy",
                "Django",
                "a",
                "uvicorn[standard]",
                "x[a,b]>=1,<2",
                "torch==2.1.0+cpu",
                "y~=1.4.2",
                "z!=1.*",
                " requests >= 2.31, < 3 ",
                "importlib-metadata; python_version < \"3.12\" and sys_platform == 'linux'",
                "tool @ https://files.example/tool-1.0-py3-none-any.whl",
                "tool @ git+https://git.example/tool.git@v1",
                "tool @ https://files.example/tool.whl ; python_version < \"3.12\"",
                "tool===1.0-custom_build",
                "tool === foobar ; sys_platform not  in 'win32 cygwin'",
                "tool (===foobar, >= 1)",
                "a; python_version === \"3.8\"",
                "a; 'x' === platform_release",
                "a[b, c-d]",
                "a[]",
            ],
            &[
                "",
                "-r",
                "-r x",
                "numpy=",
                "numpy=1",
                "x[",
                "x[a",
                "git+https://x",
                "a;b",
                "a==$(id)",
                "a b",
                "a\nb",
                "a\u{2028}",
                "a; python_version < '<<EOF'",
                "a-",
                "a_ >= 1",
                "a[b-]",
                "a[-b]",
                "a[b,]",
                "a[b_",
                "a @ https://x/y z",
                "a @ https://x/y.whl >=1",
                "a; python_version < '\\\\'",
                "é",
            ],
        );
    }

    #[test]
    fn names_are_words() {
        assert_rule(variable, &["A", "_x1", "PATH"], &["", "1A", "A-B", "A=B", "é", "A B"]);
        let reserved = [
            "HTTP_PROXY",
            "https_proxy",
            "No_Proxy",
            "ALL_PROXY",
            "ftp_proxy",
            "BUILDKIT_SYNTAX",
            "buildkit_x",
        ];
        assert_rule(build_argument, &["A", "PROXY", "MY_PROXY", "BUILDKIT", "http_proxy_"], &reserved);
        assert_rule(build_argument, &[], &["1A", ""]);
        assert_rule(user, &["root", "dev_1", "_apt"], &["", "Root", "1a", "-a", "a b", "a:b", "é"]);
        assert_rule(service, &["ssh", "code-server-2"], &["", "SSH", "1a", "a_b", "a b"]);
        assert_rule(stage, &["builder", "0", "a.b-c_d"], &["", "-a", "a b", "a/b"]);
        assert_rule(label, &["", "zone a", "é"], &["a\nb", &"x".repeat(256)]);
    }

    #[test]
    fn lines_have_no_end() {
        assert_rule(line, &["", "a b", "é\t"], &["a\nb", "a\rb", "a\0"]);
        assert_rule(command, &["run --now \"x\""], &["", " ", "a\nb", &"x".repeat(4097)]);
        assert_rule(text, &["", "a\nb"], &["\0"]);
        assert_rule(instruction_value, &["", &"x".repeat(16 * 1024)], &["a\nb", &"x".repeat(16 * 1024 + 1)]);
    }

    #[test]
    fn contexts_are_named_by_digests_and_urls_without_secrets() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        assert_rule(
            super::digest,
            &[&digest],
            &["", "sha256:", &digest[..70], &digest.to_uppercase(), &digest.replace("sha256", "sha512")],
        );
        assert_rule(
            remote,
            &["https://x/y.tar.gz", "http://127.0.0.1:80", "http://x/y.git#main:a/b", "https://x/y.git#v1@2"],
            &[
                "",
                "x",
                "file:///x",
                "ssh://x/y",
                "https://",
                "https:///x",
                "http://u:p@x/y",
                "https://u@x",
                "git://x/y",
                "https://x/ y",
                "https://x/é",
            ],
        );
    }

    #[test]
    fn paths_stay_inside() {
        assert_rule(
            context_path,
            &["a", "b/c", "b/d.txt", "..e/f"],
            &["", "/etc/passwd", "a/../b", "..", ".", "a//b", "Dockerfile", "a\nb", &"x".repeat(256)],
        );
        assert_rule(
            image_path,
            &["/a", "/etc/x.conf"],
            &["", "/", "a", "/a/../b", "//a", "/a/", &format!("/{}", "x".repeat(255))],
        );
    }
}
