//! Locations of remote contexts: what a URL names.
//!
//! As in BuildKit, an http(s) URL whose path ends in `.git` names a repository; it may be followed by
//! `#ref:directory`, or by a query of `ref`, `branch`, `tag` and `subdir`. Any other URL names a tar archive,
//! or a Dockerfile.

use std::path::PathBuf;

use percent_encoding::percent_decode_str;
use url::Url;

use super::RemoteError;

/// The location of a remote context.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Location {
    Repository(Repository),
    File(Url),
}

/// A revision of a Git repository, or a directory of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Repository {
    pub(super) url: Url,
    pub(super) revision: Revision,
    /// Directory that is the context; empty for the whole repository.
    pub(super) directory: PathBuf,
}

/// A revision to fetch from a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Revision {
    /// A branch, a tag, or `HEAD`.
    Name(String),
    /// A commit, by its full ID.
    Commit(String),
}

impl Location {
    /// Parses the URL of a context.
    ///
    /// # Errors
    ///
    /// Returns [`RemoteError::Refused`] with the rule that the URL violates.
    pub(super) fn parse(text: &str) -> Result<Self, RemoteError> {
        let mut url = web_url(text)?;
        if !url.username().is_empty() {
            return Err(RemoteError::Refused(format!("{text}: must not contain a user")));
        }
        let path = percent_decode_str(url.path()).decode_utf8_lossy();
        if !path.ends_with(".git") {
            url.set_fragment(None);
            return Ok(Self::File(url));
        }
        let refused = |rule: &str| RemoteError::Refused(format!("{text}: {rule}"));
        let (mut name, mut directory) = (None, None);
        let set = |place: &mut Option<String>, value: &str| match place.replace(value.to_owned()) {
            Some(_) => Err(refused("must name one revision and one directory")),
            None => Ok(()),
        };
        if let Some(fragment) = url.fragment() {
            let fragment =
                percent_decode_str(fragment).decode_utf8().map_err(|_| refused("must be UTF-8"))?;
            let (before, behind) = fragment.split_once(':').unwrap_or((&fragment, ""));
            for (place, value) in [(&mut name, before), (&mut directory, behind)] {
                if !value.is_empty() {
                    set(place, value)?;
                }
            }
        }
        for (parameter, value) in url.query_pairs() {
            match parameter.as_ref() {
                "ref" => set(&mut name, &value)?,
                "branch" => set(&mut name, &format!("refs/heads/{value}"))?,
                "tag" => set(&mut name, &format!("refs/tags/{value}"))?,
                "subdir" => set(&mut directory, &value)?,
                _ => return Err(refused("must have no parameters but `ref`, `branch`, `tag` and `subdir`")),
            }
        }
        let revision = match name {
            Some(name) => {
                Revision::parse(&name).ok_or_else(|| refused("must name a branch, tag or commit"))?
            }
            None => Revision::Name("HEAD".to_owned()),
        };
        let directory = relative(directory.as_deref().unwrap_or_default())
            .ok_or_else(|| refused("must name a directory within the repository"))?;
        url.set_fragment(None);
        url.set_query(None);
        Ok(Self::Repository(Repository { url, revision, directory }))
    }
}

/// Parses a URL of the web without a password.
///
/// # Errors
///
/// Returns [`RemoteError::Refused`] if it is none.
pub(super) fn web_url(text: &str) -> Result<Url, RemoteError> {
    let refused = |rule| RemoteError::Refused(format!("{text}: {rule}"));
    // Whatever Git takes for something else, such as a path or `host:path`, must not be taken for a URL here.
    let is_web = ["https://", "http://"].iter().any(|scheme| text.starts_with(scheme));
    let url = Url::parse(text).ok().filter(|url| is_web && matches!(url.scheme(), "http" | "https"));
    let url = url.ok_or_else(|| refused("must be a URL that begins with `https://` or `http://`"))?;
    match url.password() {
        Some(_) => Err(RemoteError::Refused("a URL must not contain a password".to_owned())),
        None => Ok(url),
    }
}

/// Returns the URL of a submodule, which may be relative to that of the repository above it.
///
/// # Errors
///
/// Returns [`RemoteError::Refused`] if it is not a URL of the web.
pub(super) fn submodule_url(above: &Url, text: &str) -> Result<Url, RemoteError> {
    if !text.starts_with("./") && !text.starts_with("../") {
        return web_url(text);
    }
    let mut base = above.clone();
    // Git resolves against the repository as if it were a directory.
    let path = format!("{}/", above.path().trim_end_matches('/'));
    base.set_path(&path);
    let joined = base.join(text).map_err(|error| RemoteError::Refused(format!("{text}: {error}")))?;
    web_url(joined.as_str())
}

impl Revision {
    /// Parses the name of a branch or tag, or the ID of a commit; returns `None` if it is neither.
    pub(super) fn parse(text: &str) -> Option<Self> {
        const IDS: [usize; 2] = [40, 64];
        if IDS.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Some(Self::Commit(text.to_ascii_lowercase()));
        }
        // The rules of `git check-ref-format`; others would make it a refspec or an option.
        let is_plain = |c: char| !c.is_control() && !c.is_whitespace() && !"~^:?*[\\".contains(c);
        let is_name = text
            .split('/')
            .all(|part| !part.is_empty() && !part.starts_with(['.', '-', '+']) && !part.ends_with(".lock"));
        let fits = is_name
            && text.chars().all(is_plain)
            && !text.ends_with('.')
            && !["..", "@{"].iter().any(|part| text.contains(part));
        fits.then(|| Self::Name(text.to_owned()))
    }
}

/// Returns a path without empty and `.` components, or `None` if it leads outside.
fn relative(text: &str) -> Option<PathBuf> {
    let parts = text.split('/').filter(|part| !matches!(*part, "" | "."));
    parts.map(|part| (part != ".." && !part.contains('\0')).then_some(part)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(text: &str) -> (String, Revision, String) {
        match Location::parse(text).expect(text) {
            Location::Repository(Repository { url, revision, directory }) => {
                (url.into(), revision, directory.display().to_string())
            }
            Location::File(_) => panic!("{text} is a repository"),
        }
    }

    #[test]
    fn a_repository_is_followed_by_a_revision_and_a_directory() {
        let sha = "0123456789abcdef0123456789abcdef01234567";
        for (text, revision, directory) in [
            ("", "HEAD", ""),
            ("#", "HEAD", ""),
            ("#main", "main", ""),
            ("#feature/x", "feature/x", ""),
            ("#refs/pull/1/head", "refs/pull/1/head", ""),
            ("#main:", "main", ""),
            ("#main:docker", "main", "docker"),
            ("#:/docker/./images/", "HEAD", "docker/images"),
            ("#main%3adocker", "main", "docker"),
            ("?ref=main", "main", ""),
            ("?branch=main&subdir=a%20b", "refs/heads/main", "a b"),
            ("?tag=v1#:docker", "refs/tags/v1", "docker"),
            ("?subdir=docker#main", "main", "docker"),
        ] {
            let (url, found, in_directory) = repository(&format!("https://git.example:8443/x.git{text}"));
            assert_eq!(url, "https://git.example:8443/x.git");
            assert_eq!(found, Revision::Name(revision.to_owned()), "{text}");
            assert_eq!(in_directory, directory, "{text}");
        }
        let (_, found, _) = repository(&format!("http://git.example/x.git#{}", sha.to_uppercase()));
        assert_eq!(found, Revision::Commit(sha.to_owned()));
    }

    #[test]
    fn what_is_no_repository_is_a_file() {
        for (text, expected) in [
            ("https://example.com/context.tar.gz#a:b", "https://example.com/context.tar.gz"),
            ("http://example.com/x.git/context.tar?x=.git", "http://example.com/x.git/context.tar?x=.git"),
            ("https://example.com", "https://example.com/"),
        ] {
            let file = Location::File(Url::parse(expected).expect(expected));
            assert_eq!(Location::parse(text).expect(text), file);
        }
    }

    #[test]
    fn other_schemes_and_strange_names_are_refused() {
        for text in [
            "git://git.example/x.git",
            "ssh://git.example/x.git",
            "git@git.example:x.git",
            "file:///x.git",
            "ext::sh -c x",
            "ftp://git.example/x",
            "/x.git",
            "https:x.git",
            "https://user@git.example/x.git",
            "https://user:password@git.example/x.git",
            "https://git.example/x.git#-x",
            "https://git.example/x.git#+x",
            "https://git.example/x.git#a..b",
            "https://git.example/x.git#a%20b",
            "https://git.example/x.git#%5Ex",
            "https://git.example/x.git#a*",
            "https://git.example/x.git#main:../x",
            "https://git.example/x.git#main:a/../../x",
            "https://git.example/x.git#main:a%00",
            "https://git.example/x.git?ref=a&tag=b",
            "https://git.example/x.git?ref=a#b",
            "https://git.example/x.git?ref=",
            "https://git.example/x.git?token=x",
        ] {
            assert!(Location::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_url_of_a_submodule_may_be_relative() {
        let above = Url::parse("https://git.example/team/x.git").expect("a URL");
        for (text, expected) in [
            ("../y.git", "https://git.example/team/y.git"),
            ("../../other/y", "https://git.example/other/y"),
            ("./y.git", "https://git.example/team/x.git/y.git"),
            ("../../../../y", "https://git.example/y"),
            ("http://else.example/y", "http://else.example/y"),
        ] {
            assert_eq!(submodule_url(&above, text).expect(text).as_str(), expected);
        }
        for text in
            ["/y", "y", "file:///y", "git@git.example:y", "ext::sh -c x", "ssh://git.example/y", "-x", ""]
        {
            assert!(submodule_url(&above, text).is_err(), "{text}");
        }
    }
}
