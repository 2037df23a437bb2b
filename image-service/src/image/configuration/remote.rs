//! Contexts that are fetched from a URL: Git repositories and tar archives.
//!
//! The forms are those of BuildKit: `git://…` and `http(s)://…/name.git` are repositories. A repository takes a
//! fragment `#ref:directory`, or a query `?ref=…&subdir=…`.

/// Reports whether `url` names a directory within a Git repository, which is assumed in doubt.
///
/// An engine may decode what is escaped.
pub(super) fn is_git_directory(url: &str) -> bool {
    let (url, fragment) = url.split_once('#').unwrap_or((url, ""));
    let (path, query) = url.split_once('?').unwrap_or((url, ""));
    let is_git = path.starts_with("git://") || path.ends_with(".git");
    is_git && (fragment_has_directory(fragment) || query_has_directory(query))
}

fn fragment_has_directory(fragment: &str) -> bool {
    let fragment = fragment.replace("%3A", ":").replace("%3a", ":");
    fragment.split_once(':').is_some_and(|(_, directory)| !directory.is_empty())
}

fn query_has_directory(query: &str) -> bool {
    query.split('&').any(|parameter| {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        (name == "subdir" || name.contains('%')) && !value.is_empty()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_git_repositories_are_told_from_all_else() {
        for (url, expected) in [
            ("https://git.example/x.git", false),
            ("https://git.example/x.git#main", false),
            ("https://git.example/x.git#main:", false),
            ("https://git.example/x.git#main:docker", true),
            ("https://git.example/x.git#:docker", true),
            ("https://git.example/x.git#main%3adocker", true),
            ("https://git.example/x.git?ref=main", false),
            ("https://git.example/x.git?ref=main&subdir=docker", true),
            ("https://git.example/x.git?subdir=docker#main", true),
            ("https://git.example/x.git?sub%64ir=docker", true),
            ("http://git.example:8080/x.git#:docker", true),
            ("git://git.example/x", false),
            ("git://git.example/x#main:docker", true),
            ("https://example.com/context.tar.gz", false),
            ("https://example.com/context.tar.gz#a:b", false),
            ("https://example.com/context.tar.gz?subdir=docker", false),
            ("https://example.com/x.git/context.tar", false),
            ("https://example.com/context.tar?x=.git#a:b", false),
        ] {
            assert_eq!(is_git_directory(url), expected, "{url}");
        }
    }
}
