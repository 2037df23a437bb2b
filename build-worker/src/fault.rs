//! Attribution of engine errors: one table for builds, base images, contexts, pulls and pushes.
//!
//! Engines and `git` pass on as text what registries, servers and their own parts have reported, so most
//! errors can only be distinguished by their words. An error about a system that is unreachable or busy is worth
//! a retry and says nothing about the engine.

/// The party that has to act on an error.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The author of the configuration: a step failed, or something was refused or does not exist.
    User,
    /// A system that the engine talks to: it cannot be reached, or is too busy to respond.
    Remote,
    /// The engine itself, or the containerd that stores its images.
    Engine,
}

/// Phrases of errors that the engine itself has caused, in lower case.
const ENGINE: [&str; 12] = [
    "transport: error while dialing",
    "connection error: desc",
    "code = unavailable",
    "dial unix",
    "transport is closing",
    "error reading from server: eof",
    "failed to create lease",
    "no space left on device",
    "cannot allocate memory",
    "context canceled",
    "no active session",
    "no such job",
];

/// Phrases of errors about unreachable or busy systems, in lower case.
const REMOTE: [&str; 41] = [
    "dial tcp",
    "connection refused",
    "connection reset by peer",
    "connection timed out",
    "operation timed out",
    "no such host",
    "no route to host",
    "network is unreachable",
    "server misbehaving",
    "temporary failure in name resolution",
    "could not resolve host",
    "failed to connect to",
    "unable to connect to",
    "i/o timeout",
    "tls handshake timeout",
    "awaiting headers",
    "context deadline exceeded",
    "httpreadseeker",
    "unexpected eof",
    ": eof",
    "name or service not known",
    "unable to look up",
    "hung up unexpectedly",
    "early eof",
    "error parsing http 429",
    "error parsing http 5",
    "the remote end hung up",
    "toomanyrequests",
    "429 too many requests",
    "500 internal server error",
    "502 bad gateway",
    "503 service unavailable",
    "504 gateway timeout",
    "empty reply from server",
    "recv failure",
    "gnutls recv error",
    "unexpected disconnect while reading",
    "requested url returned error: 5",
    "requested url returned error: 429",
    "invalid response status 5",
    "invalid response status 429",
];

/// Phrases of a registry's refusal, in lower case. An engine reports many of them as errors of its own.
const REFUSED: [&str; 11] = [
    "unauthorized",
    "authentication required",
    "no basic auth credentials",
    "denied",
    "forbidden",
    "manifest unknown",
    "blob unknown",
    "unknown blob",
    "not found",
    "server gave http response to https client",
    "x509: ",
];

impl Fault {
    /// Attributes an error by its message; returns `None` if its words do not show it.
    pub(crate) fn of_message(message: &str) -> Option<Self> {
        // The message quotes the step's command, which may contain any phrase. A process that is killed for
        // its memory use has no exit code.
        if message.contains("process \"") && message.contains("\" did not complete successfully: ") {
            return Some(Self::User);
        }
        let message = message.to_lowercase();
        let has = |words: &[&str]| words.iter().any(|words| message.contains(words));
        // Containerd reads on where a registry has broken off, but not what it does not have.
        if has(&["httpreadseeker"]) && has(&[": not found"]) {
            return Some(Self::User);
        }
        [(&ENGINE[..], Self::Engine), (&REMOTE, Self::Remote), (&REFUSED, Self::User)]
            .into_iter()
            .find_map(|(words, fault)| has(words).then_some(fault))
    }
}

/// Returns a message about a registry without the answer of the server, which need not be a registry.
pub(crate) fn without_answer(message: &str) -> String {
    const QUOTATIONS: [&str; 3] = ["response body", "{", "<"];
    let end = QUOTATIONS.iter().filter_map(|quotation| message.find(quotation)).min();
    match end {
        Some(end) => format!("{} (the rest is not shown)", message[..end].trim_end()),
        None => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_engines_show_whose_fault_it_is() {
        for (message, expected) in [
            (r#"process "/bin/sh -c false" did not complete successfully: exit code: 1"#, Some(Fault::User)),
            (
                r#"process "/bin/sh -c ./greedy" did not complete successfully: cannot allocate memory"#,
                Some(Fault::User),
            ),
            (
                r#"process "/bin/sh -c grep 'no space left on device' x" did not complete successfully: exit code: 1"#,
                Some(Fault::User),
            ),
            (
                r#"failed to create lease: connection error: desc = "transport: Error while dialing: dial unix /run/containerd/containerd.sock: connect: connection refused""#,
                Some(Fault::Engine),
            ),
            ("failed to copy: write /x: no space left on device", Some(Fault::Engine)),
            ("context canceled", Some(Fault::Engine)),
            (
                r#"127.0.0.1:1/x:1: failed to resolve source metadata for 127.0.0.1:1/x:1: failed to do request: Head "http://127.0.0.1:1/v2/x/manifests/1": dial tcp 127.0.0.1:1: connect: connection refused"#,
                Some(Fault::Remote),
            ),
            (
                r#"failed to do request: Head "https://r.invalid/v2/x/manifests/1": dial tcp: lookup r.invalid: no such host"#,
                Some(Fault::Remote),
            ),
            (
                "unexpected status from HEAD request to http://127.0.0.1:5000/v2/x/manifests/1: 503 Service Unavailable",
                Some(Fault::Remote),
            ),
            ("toomanyrequests: You have reached your pull rate limit", Some(Fault::Remote)),
            (
                "failed to fetch remote http://127.0.0.1:1/r.git: fatal: unable to access 'http://127.0.0.1:1/r.git/': Failed to connect to 127.0.0.1 port 1: Connection refused",
                Some(Fault::Remote),
            ),
            (r#"failed to do request: Head "http://127.0.0.1:1/v2/x/manifests/1": EOF"#, Some(Fault::Remote)),
            (
                "fatal: unable to look up nosuch.invalid (port 9418) (Name or service not known)",
                Some(Fault::Remote),
            ),
            (
                "failed to copy: httpReadSeeker: failed open: content at https://r.example/v2/x/blobs/sha256:0 not found: not found",
                Some(Fault::User),
            ),
            ("failed to copy: httpReadSeeker: failed open: unexpected status code 503", Some(Fault::Remote)),
            ("error pulling image configuration: unknown blob", Some(Fault::User)),
            ("error parsing HTTP 429 response body: invalid character '<'", Some(Fault::Remote)),
            ("invalid response status 404", None),
            ("invalid response status 502", Some(Fault::Remote)),
            ("pull access denied, repository does not exist or may require authorization", Some(Fault::User)),
            ("127.0.0.1:5000/nothing:1: not found", Some(Fault::User)),
            ("dockerfile parse error on line 2: unknown instruction: NONSENSE", None),
        ] {
            assert_eq!(Fault::of_message(message), expected, "{message}");
        }
    }
}
