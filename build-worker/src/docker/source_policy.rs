//! BuildKit's source policy: the engine uses nothing for a build that was not decided about.

use bollard::moby::buildkit::v1::sourcepolicy::{
    AttrConstraint, AttrMatch, MatchType, Policy, PolicyAction, Rule, Selector, Update,
};

use super::session::DOCKERFILE_SOURCE;
use crate::{
    engine::{EngineError, ImageDecision, SourcePolicy},
    reference,
};

const IMAGE: &str = "docker-image://";
/// Pattern of Git repositories of which only a directory is taken.
const GIT_DIRECTORY: &str = "git://*#*:*";

/// Attribute of a Git repository with its whole URL.
const GIT_URL: &str = "git.fullurl";

/// Expression for Git repositories at a commit, which the engine takes from its cache whoever asks, and from whichever URL.
const GIT_COMMIT: &str = "(?i)^git://[^#]*#([0-9a-f]{40}|[0-9a-f]{64})(:.*)?$";

/// Returns an expression for the URLs of hosts, in which `*` stands for any characters of a host and its port.
fn urls_of(host: &str) -> String {
    let host: Vec<String> = host.split('*').map(regex::escape).collect();
    format!("^(https?|git)://{}/", host.join("[^/?#@\\\\\\s]*"))
}

/// Returns the policy of a build with this context, the URL of an upload.
///
/// Of all rules that allow or deny a source, the last one counts; a conversion is followed by another pass
/// with the new name.
pub(super) fn policy(sources: &dyn SourcePolicy, context: &str) -> Policy {
    let mut rules = vec![
        rule(PolicyAction::Deny, "*", MatchType::Wildcard),
        rule(PolicyAction::Allow, &format!("{context}*"), MatchType::Wildcard),
        rule(PolicyAction::Allow, &format!("local://{DOCKERFILE_SOURCE}"), MatchType::Exact),
    ];
    for host in sources.hosts() {
        rules.push(rule(PolicyAction::Allow, &urls_of(&host), MatchType::Regex));
    }
    // The name of a Git repository does not show how it is fetched; by SSH, the engine would use the agents of
    // the build.
    let is_ssh = AttrConstraint {
        key: GIT_URL.to_owned(),
        value: "^(ssh://|[^/]*@)".to_owned(),
        condition: AttrMatch::Matches.into(),
    };
    let mut by_ssh = rule(PolicyAction::Deny, "git://*", MatchType::Wildcard);
    by_ssh.selector.get_or_insert_default().constraints.push(is_ssh);
    rules.push(by_ssh);
    rules.push(rule(PolicyAction::Deny, GIT_COMMIT, MatchType::Regex));
    if !sources.allows_git_directories() {
        rules.push(rule(PolicyAction::Deny, GIT_DIRECTORY, MatchType::Wildcard));
    }
    for (image, decision) in sources.images() {
        let image = format!("{IMAGE}{image}");
        match decision {
            ImageDecision::Usable { name, id } => {
                let name = format!("{IMAGE}{name}");
                if name != image {
                    let updates = Update { identifier: name.clone(), ..Update::default() };
                    // An exact match converts to what it has matched. A reference has no wildcards.
                    let convert = rule(PolicyAction::Convert, &image, MatchType::Wildcard);
                    rules.push(Rule { updates: Some(updates), ..convert });
                }
                rules.push(rule(PolicyAction::Allow, &name, MatchType::Exact));
                rules.push(rule(PolicyAction::Allow, &format!("{name}@{id}"), MatchType::Exact));
            }
            ImageDecision::Missing(_) | ImageDecision::Refused | ImageDecision::Elsewhere { .. } => {}
        }
    }
    Policy { version: 1, rules }
}

fn rule(action: PolicyAction, identifier: &str, match_type: MatchType) -> Rule {
    let selector =
        Selector { identifier: identifier.to_owned(), match_type: match_type.into(), ..Selector::default() };
    Rule { action: action.into(), selector: Some(selector), updates: None }
}

/// Returns the source that the engine was denied, if a build failed with this error because of it.
pub(super) fn denied(error: &EngineError) -> Option<String> {
    let message = error.to_string();
    let (before, _) = message.split_once("\" denied by policy")?;
    before.rsplit_once("source \"").map(|(_, source)| source.to_owned())
}

/// Returns the name of ours that the engine has looked up in a registry, if a build failed with this error
/// because of it.
pub(super) fn sought(error: &EngineError) -> Option<String> {
    const URL: &str = "://trailer.invalid/v2/";
    const VERSION: &str = "/manifests/";
    let message = error.to_string();
    let (_, path) = message.split_once(URL)?;
    let (repository, rest) = path.split_once(VERSION)?;
    let tag: String = rest.chars().take_while(|c| c.is_alphanumeric() || "_.-".contains(*c)).collect();
    Some(format!("trailer.invalid/{repository}:{tag}"))
}

/// Returns the canonical reference of a source that is an image.
pub(super) fn image(source: &str) -> Option<&str> {
    source.strip_prefix(IMAGE)
}

/// Returns the error of a build that was denied a source.
pub(super) fn error(source: &str, decision: Option<&ImageDecision>) -> EngineError {
    let name = image(source).map_or(source, reference::familiar);
    if let Some(ImageDecision::Elsewhere { holder, may_build: true }) = decision {
        return EngineError::BaseElsewhere { image: name.to_owned(), holder: holder.clone() };
    }
    let is_git_commit = source.starts_with("git://")
        && regex::Regex::new(GIT_COMMIT).is_ok_and(|commit| commit.is_match(source));
    let is_git_directory = source
        .split_once('#')
        .is_some_and(|(url, fragment)| url.starts_with("git://") && fragment.contains(':'));
    EngineError::Refused(match (image(source), decision) {
        (Some(_), Some(ImageDecision::Refused)) => {
            format!("{name}: the operator of the worker allows no images from there (--allow-source)")
        }
        (Some(_), Some(ImageDecision::Elsewhere { holder, .. })) => format!(
            "{name}: only the engine of worker {} has it, which cannot take the build: push it, or build everything there",
            holder.worker
        ),
        (Some(_), Some(ImageDecision::Missing(reason))) => format!("{name}: {reason}"),
        (Some(_), Some(ImageDecision::Usable { .. }) | None) => format!("{name}: not found"),
        (None, _) if is_git_commit => {
            format!("{name}: ADD takes no repositories at a commit: make it the remote context of the build")
        }
        (None, _) if is_git_directory => format!(
            "{name}: the operator of the worker allows nothing from there (--allow-add), or no directories of repositories, \
             because of a flaw of the engine"
        ),
        (None, _) => format!("{name}: the operator of the worker allows nothing from there (--allow-add)"),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proto::dispatch::DistantBase;

    use super::*;
    use crate::engine::EventSender;

    /// Decisions that are never extended.
    #[derive(Debug)]
    struct FixedDecisions(BTreeMap<String, ImageDecision>);

    #[tonic::async_trait]
    impl SourcePolicy for FixedDecisions {
        fn images(&self) -> BTreeMap<String, ImageDecision> {
            self.0.clone()
        }

        fn hosts(&self) -> Vec<String> {
            vec!["files.example".to_owned()]
        }

        fn allows_git_directories(&self) -> bool {
            false
        }

        async fn prepare(&self, _events: &EventSender) -> Result<Option<String>, EngineError> {
            Ok(None)
        }

        async fn decide(&self, image: &str, _events: &EventSender) -> Result<ImageDecision, EngineError> {
            Ok(self.0[image].clone())
        }
    }

    #[test]
    fn nothing_is_allowed_but_what_was_decided() {
        let decisions = [
            ("a", ImageDecision::Usable { name: "a".to_owned(), id: "sha256:0".to_owned() }),
            ("b", ImageDecision::Usable { name: "c".to_owned(), id: "sha256:1".to_owned() }),
            ("d", ImageDecision::Missing("not found".to_owned())),
            ("e", ImageDecision::Refused),
            ("f", ImageDecision::Elsewhere { holder: DistantBase::default(), may_build: true }),
        ];
        let decisions = decisions.map(|(image, decision)| (image.to_owned(), decision));
        let policy = policy(&FixedDecisions(decisions.into()), "http://buildkit-session/1");
        let rules: Vec<String> = policy
            .rules
            .iter()
            .map(|rule| {
                let selector = rule.selector.clone().unwrap_or_default();
                let to = rule.updates.as_ref().map(|updates| format!(" to {}", updates.identifier));
                format!("{:?} {}{}", rule.action(), selector.identifier, to.unwrap_or_default())
            })
            .collect();
        assert_eq!(
            rules,
            [
                "Deny *",
                "Allow http://buildkit-session/1*",
                "Allow local://dockerfile",
                r"Allow ^(https?|git)://files\.example/",
                "Deny git://*",
                &format!("Deny {GIT_COMMIT}"),
                "Deny git://*#*:*",
                "Allow docker-image://a",
                "Allow docker-image://a@sha256:0",
                "Convert docker-image://b to docker-image://c",
                "Allow docker-image://c",
                "Allow docker-image://c@sha256:1",
            ]
        );
    }

    #[test]
    fn a_host_is_all_before_the_path() {
        for (host, url, is_allowed) in [
            ("files.example", "https://files.example/a", true),
            ("files.example", "git://files.example/a.git#main", true),
            ("files.example", "https://filesXexample/a", false),
            ("files.example", "https://files.example:8080/a", false),
            ("files.example", "ssh://files.example/a", false),
            ("*.example", "http://a.b.example/c", true),
            ("*.example", "http://127.0.0.1/a.example/b", false),
            ("*.example", "http://127.0.0.1#.example/b", false),
            ("*.example", "http://127.0.0.1?.example/b", false),
            ("*.example", "http://127.0.0.1\\.example/b", false),
            ("*.example", "http://a@127.0.0.1.example/b", false),
            ("*", "http://127.0.0.1:80/b", true),
            ("127.0.0.1:*", "http://127.0.0.1:80/b", true),
        ] {
            let expression = regex::Regex::new(&urls_of(host)).expect("an expression");
            assert_eq!(expression.is_match(url), is_allowed, "{host} {url}");
        }
        let commit = regex::Regex::new(GIT_COMMIT).expect("an expression");
        let digits = "0123456789abcdefABCD".repeat(2);
        for (url, is_denied) in [
            (format!("git://a.example/b.git#{digits}"), true),
            (format!("git://a.example/b.git#{digits}:c"), true),
            (format!("git://a.example/b.git#{digits}0"), false),
            ("git://a.example/b.git#main".to_owned(), false),
            (format!("https://a.example/b#{digits}"), false),
        ] {
            assert_eq!(commit.is_match(&url), is_denied, "{url}");
        }
    }

    #[test]
    fn a_name_of_ours_that_was_sought_is_in_the_error() {
        let of_engine = "a:1: failed to resolve source metadata for a:1: failed to do request: Head \
            \"https://trailer.invalid/v2/base/pulled/manifests/0a1b\": dial tcp: lookup trailer.invalid: no such host";
        let sought_by = |message: &str| sought(&EngineError::Unreachable(message.to_owned()));
        assert_eq!(sought_by(of_engine).as_deref(), Some("trailer.invalid/base/pulled:0a1b"));
        assert_eq!(sought_by(&of_engine.replace("trailer.invalid", "registry.example")), None);
        assert_eq!(sought_by("exit code: 1"), None);
    }

    #[test]
    fn a_denied_source_is_named_by_the_error() {
        let of_engine = "failed to load: source \"docker-image://docker.io/library/a:1\" denied by policy: source denied by policy";
        let source = denied(&EngineError::Refused(of_engine.to_owned()));
        assert_eq!(source.as_deref(), Some("docker-image://docker.io/library/a:1"));
        assert_eq!(source.as_deref().and_then(image), Some("docker.io/library/a:1"));
        assert_eq!(denied(&EngineError::Refused("denied: requested access".to_owned())), None);
        let missing = error(
            "docker-image://docker.io/library/a:1",
            Some(&ImageDecision::Missing("not found".to_owned())),
        );
        assert_eq!(missing.to_string(), "a:1: not found");
    }
}
