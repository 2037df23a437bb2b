//! Checkout of a Git repository with its submodules.
//!
//! Each repository is fetched into a Git directory of its own, next to the tree, so that no `.git` is in the
//! tree. Submodules are found and placed here rather than by `git submodule`, because their URLs are checked
//! and their number is limited.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use url::Url;

use super::{
    RemoteError,
    checkout::Checkout,
    commit::{Limits, Submodule, submodule_urls},
    credential_helper::CredentialHelper,
    git_command::{Git, GitError},
    location::{Repository, Revision, submodule_url},
};
use crate::{
    egress::{Egress, EgressProxy},
    secrets::Netrc,
};

/// Name of the tree in the directory of a checkout.
const TREE: &str = "tree";
/// Maximum number of repositories, including submodules.
const MAX_REPOSITORIES: usize = 500;

/// A repository to be checked out.
struct Placement {
    url: Url,
    revision: Revision,
    /// Path in the tree; empty for the repository that the context names.
    path: PathBuf,
}

/// Checks out a repository with its submodules, and returns the directory that is the context.
///
/// # Errors
///
/// Returns [`RemoteError`] if a repository, a revision or the directory cannot be had.
pub(super) async fn check_out(
    repository: &Repository,
    credentials: &Netrc,
    checkout: &Arc<Checkout>,
    egress: &Arc<Egress>,
) -> Result<PathBuf, RemoteError> {
    let proxy = EgressProxy::start(Arc::clone(egress)).await?;
    let home = checkout.path().join("home");
    let credentials = CredentialHelper::new(credentials, &repository.url)?;
    Git::configure(&home, &proxy.url(), &credentials.configuration()).await?;
    let tree = checkout.path().join(TREE);
    tokio::fs::create_dir(&tree).await?;

    let first = Placement {
        url: repository.url.clone(),
        revision: repository.revision.clone(),
        path: PathBuf::new(),
    };
    let mut left = vec![first];
    let mut limits = Limits::default();
    let mut number = 0;
    while let Some(Placement { url, revision, path }) = left.pop() {
        number += 1;
        if number > MAX_REPOSITORIES {
            let rule = format!("{}: has more than {MAX_REPOSITORIES} submodules", repository.url);
            return Err(RemoteError::Refused(rule));
        }
        let git = Git {
            home: home.clone(),
            directory: checkout.path().join(format!("{number}.git")),
            tree: tree.join(&path),
        };
        let commit = fetch(&git, &url, &revision, egress).await?;
        for submodule in check_out_one(&git, &url, &commit, &mut limits).await? {
            left.push(Placement { path: path.join(&submodule.path), ..locate(&git, &url, submodule).await? });
        }
    }
    if is_directory(&tree, &repository.directory).await? {
        Ok(tree.join(&repository.directory))
    } else {
        let directory = repository.directory.display();
        Err(RemoteError::Refused(format!("{}: has no directory `{directory}`", repository.url)))
    }
}

/// Fetches a revision and returns what names its commit.
async fn fetch(git: &Git, url: &Url, revision: &Revision, egress: &Egress) -> Result<String, RemoteError> {
    /// Phrases of servers that have no shallow copies, or give only the commits of branches and tags.
    const NOT_SO: [&str; 3] = ["not our ref", "unadvertised object", "shallow"];
    // An earlier repository was fetched in spite of it.
    drop(egress.take_obstacle());
    let failed = |error: GitError| match egress.take_obstacle() {
        Some(obstacle) => RemoteError::from(obstacle),
        None => error.into_remote(&format!("cannot fetch {url}")),
    };
    git.init().await.map_err(|error| error.into_local("cannot create a repository"))?;
    let (name, commit) = match revision {
        Revision::Name(name) => (name, "FETCH_HEAD^{commit}".to_owned()),
        Revision::Commit(id) => (id, format!("{id}^{{commit}}")),
    };
    match git.fetch(url, &["--depth=1"], &[name]).await {
        Err(GitError::Failed(message)) if NOT_SO.iter().any(|words| message.contains(words)) => {
            let everything = ["+refs/heads/*:refs/remotes/origin/*", "+refs/tags/*:refs/tags/*"];
            let wanted: &[&str] = match revision {
                Revision::Name(_) => &[name],
                Revision::Commit(_) => &everything,
            };
            git.fetch(url, &[], wanted).await.map_err(failed)?;
        }
        fetched => fetched.map_err(failed)?,
    }
    match git.run(&["cat-file", "-e", &commit]).await {
        Ok(_) => Ok(commit),
        Err(GitError::Failed(_)) => Err(RemoteError::Refused(format!("{url}: has no commit {name}"))),
        Err(error @ (GitError::Broken(_) | GitError::TooLong)) => {
            Err(error.into_local("cannot read a repository"))
        }
    }
}

/// Checks out a repository without its submodules, and returns them.
async fn check_out_one(
    git: &Git,
    url: &Url,
    commit: &str,
    limits: &mut Limits,
) -> Result<Vec<Submodule>, RemoteError> {
    let list = ["ls-tree", "-r", "-t", "-l", "-z", "--full-tree", commit];
    let listed = git.run(&list).await.map_err(|error| error.into_local("cannot read a repository"))?;
    let rule = |rule: String| RemoteError::Refused(format!("{url}: {rule}"));
    let submodules = limits.count(&listed).map_err(rule)?;
    let check_out = ["checkout", "--quiet", "--force", "--detach", commit];
    git.run(&check_out).await.map_err(|error| error.into_remote(&format!("cannot check out {url}")))?;
    if submodules.is_empty() {
        return Ok(submodules);
    }
    let blob = format!("--blob={commit}:.gitmodules");
    let urls = git.run(&["config", &blob, "-z", "--list"]).await;
    let urls =
        submodule_urls(&urls.map_err(|_| rule("has submodules, but no valid .gitmodules".to_owned()))?);
    submodules
        .into_iter()
        .map(|submodule| match urls.get(&submodule.path) {
            Some(url) => Ok(Submodule { url: url.clone(), ..submodule }),
            None => Err(rule(format!("no URL in .gitmodules for `{}`", submodule.path.display()))),
        })
        .collect()
}

/// Returns where a submodule comes from, if its place in the tree is a directory.
async fn locate(git: &Git, above: &Url, submodule: Submodule) -> Result<Placement, RemoteError> {
    let Submodule { path, commit, url } = submodule;
    if !is_directory(&git.tree, &path).await? {
        let rule = format!("{above}: the place of `{}` is not a directory", path.display());
        return Err(RemoteError::Refused(rule));
    }
    let url = submodule_url(above, &url).map_err(|error| match error {
        RemoteError::Refused(rule) => {
            RemoteError::Refused(format!("submodule `{}` of {above}: {rule}", path.display()))
        }
        other @ (RemoteError::Unreachable(_) | RemoteError::Local(_)) => other,
    })?;
    Ok(Placement { url, revision: Revision::Commit(commit), path })
}

/// Reports whether a path is a directory that is reached through no symbolic link.
async fn is_directory(base: &Path, path: &Path) -> io::Result<bool> {
    let mut reached = base.to_owned();
    for part in path {
        reached.push(part);
        match tokio::fs::symlink_metadata(&reached).await {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return Ok(false),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}
