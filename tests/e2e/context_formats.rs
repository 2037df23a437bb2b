//! Contexts on the real engine beside what `docker build` makes of the same folder: equal files, modes,
//! owners and links.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::Context as _;
use proto::images::BuildState;

use crate::{
    client::image,
    contexts::{image_of, named},
    engine_fixture::Real,
};

/// Lists what is in the image, one line per file.
const LIST: &str = r#"cd /d && /bin/busybox find . -mindepth 1 | /bin/busybox sort | while read -r file; do /bin/busybox stat -c '%n %F %a %u:%g' "$file"; /bin/busybox readlink "$file"; done; true"#;

/// Packs a folder with Python's `tarfile`, in the given format, with the extended headers of macOS if wanted.
const TARFILE: &str = r#"
import sys, tarfile
folder, archive, form, extras = sys.argv[1:]
def touch(info):
    info.uid = info.gid = 501
    info.uname, info.gname = 'someone', 'staff'
    info.mtime += 0.25
    if extras:
        info.pax_headers = {'LIBARCHIVE.creationtime': '1700000000', 'SCHILY.xattr.com.apple.provenance': 'x'}
    return info
with tarfile.open(archive, 'w', format=getattr(tarfile, form)) as tar:
    tar.add(folder, arcname='.', filter=touch)
"#;

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{command:?}"))?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{command:?}: {stderr}");
    Ok(())
}

/// Fills a folder with what contexts have.
fn fill(folder: &Path, dockerfile: &str) -> anyhow::Result<()> {
    const IGNORE: &str = "# secrets\n**/*.key\n!app/public.key\n**/.env\n!config\nlogs/*\n**.tmp\n.git\nDockerfile\nnode_modules\n*.log\n!keep.log\n";
    for (path, content, mode) in [
        ("Dockerfile", dockerfile, 0o644),
        (".dockerignore", IGNORE, 0o644),
        ("app/main.py", "print(1)\n", 0o644),
        ("app/._main.py", "\0\u{5}\u{16}\u{7}", 0o644),
        ("app/run.sh", "#!/bin/sh\n", 0o755),
        ("app/private.key", "secret", 0o600),
        ("app/public.key", "public", 0o644),
        ("node_modules/a/index.js", "a", 0o644),
        ("config/.env", "secret", 0o644),
        ("config/app.toml", "a", 0o644),
        ("logs/today.txt", "log", 0o644),
        ("app/main.tmp", "a", 0o644),
        ("debug.log", "log", 0o644),
        ("keep.log", "log", 0o644),
        ("Größe.txt", "ü", 0o644),
    ] {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().context("a folder")?)?;
        fs::write(&path, content)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
    }
    for directory in ["app", "config", "empty", "logs"] {
        fs::create_dir_all(folder.join(directory))?;
        fs::set_permissions(folder.join(directory), fs::Permissions::from_mode(0o755))?;
    }
    fs::hard_link(folder.join("app/main.py"), folder.join("app/same.py"))?;
    for (target, link) in [("app/main.py", "link"), ("/usr/bin/python3", "python"), ("../shared", "shared")] {
        symlink(target, folder.join(link))?;
    }
    fs::hard_link(folder.join("link"), folder.join("same-link"))?;
    run(Command::new("mkfifo").arg(folder.join("pipe")))?;
    let git = |arguments: &[&str]| {
        let identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"];
        run(Command::new("git").arg("-C").arg(folder).args(identity).args(arguments))
    };
    git(&["init", "--quiet"])?;
    git(&["add", "--all"])?;
    git(&["commit", "--quiet", "--message=all"])
}

/// Returns the command that packs a folder in a format.
fn packing(format: &str, folder: &Path, archive: &Path) -> Command {
    let mut command;
    match format.split_once(' ') {
        Some(("tar", format)) => {
            command = Command::new("tar");
            command.arg(format!("--format={format}")).args(["--owner=501", "--group=20"]);
            // Version 7 had no pipes.
            command.args(if format == "v7" { &["--exclude=./pipe", "-cf"][..] } else { &["-cf"] });
            command.arg(archive).arg("-C").arg(folder).arg(".");
        }
        Some(("tarfile", format)) => {
            command = Command::new("python3");
            let (format, extras) = format.split_once(' ').unwrap_or((format, ""));
            command.args(["-c", TARFILE]).arg(folder).arg(archive).args([format, extras]);
        }
        Some(("git", _)) => {
            command = Command::new("git");
            command.arg("-C").arg(folder).args(["-c", "tar.umask=0022", "archive", "--output"]);
            command.arg(archive).arg("HEAD");
        }
        Some(_) | None => {
            command = Command::new("busybox");
            command.args(["tar", "-cf"]).arg(archive).arg("-C").arg(folder).arg(".");
        }
    }
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn a_context_is_built_as_docker_builds_its_folder() -> anyhow::Result<()> {
    let real = Real::start_with(&["--slots", "4"]).await?;
    let directory = tempfile::tempdir()?;
    let folder = directory.path().join("context");
    let list = serde_json::to_string(&["/bin/sh", "-c", LIST])?;
    fill(&folder, &real.dockerfile(&format!("COPY . /d/\nCMD {list}\n")))?;
    let theirs = format!("trailer-test/docker-{}:latest", real.run);
    let docker = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/docker");
    let mut building = Command::new(docker);
    building.args(["build", "--quiet", "--tag", &theirs]).arg(&folder);
    if let Some(root) = std::env::var_os("TRAILER_TEST_ENGINE_ROOT") {
        building.env("TRAILER_DOCKER_ROOT", root);
    }
    run(&mut building)?;
    let expected = real.run_image(&theirs).await?;
    anyhow::ensure!(expected.contains("app/public.key") && !expected.contains("private.key"), "{expected}");
    anyhow::ensure!(expected.contains("./logs ") && !expected.contains(".env"), "{expected}");

    let alice = real.alice();
    let mut references = vec![theirs];
    for format in [
        "tar gnu",
        "tar oldgnu",
        "tar posix",
        "tar ustar",
        "tar v7",
        "tarfile PAX_FORMAT",
        "tarfile GNU_FORMAT",
        "tarfile PAX_FORMAT macOS",
        "busybox",
        "git archive",
    ] {
        let archive = directory.path().join("context.tar");
        run(&mut packing(format, &folder, &archive))?;
        let digest = alice.upload("", &fs::read(&archive)?).await?.digest;
        let name = format!("{} {}", format.replace('_', " "), real.run);
        let (created, build) = alice.create(image_of(&name, named(&digest, ""))).await?;
        let built = alice.finished(&build.id).await?;
        anyhow::ensure!(built.state() == BuildState::Succeeded, "{format}: {built:?}");
        let reference = created.reference.clone();
        let mut expected = expected.clone();
        if let "git archive" | "tar v7" = format {
            // Git has no empty directories, either.
            let lacks = |line: &str| {
                line.starts_with("./pipe ") || format != "tar v7" && line.starts_with("./empty ")
            };
            expected = expected.lines().filter(|line| !lacks(line)).map(|line| format!("{line}\n")).collect();
        }
        assert_eq!(real.run_image(&reference).await?, expected, "{format}");
        references.push(reference);
    }
    let references: Vec<&str> = references.iter().map(String::as_str).collect();
    real.clean(&references).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dockerignore_file_counts_for_single_files() -> anyhow::Result<()> {
    let real = Real::start().await?;
    let alice = real.alice();
    let mut wanted = image(
        &format!("Single files {}", real.run),
        &real.dockerfile("COPY . /d/\nRUN /bin/busybox find /d -type f | /bin/busybox sort"),
    );
    let source = wanted.config.as_mut().and_then(|config| config.source.as_mut());
    let Some(proto::images::image_config::Source::Dockerfile(source)) = source else {
        anyhow::bail!("no Dockerfile");
    };
    for (path, content) in [
        (".dockerignore", ".env\n*.pem\n!public.pem\n"),
        (".env", "T=1"),
        ("private.pem", "k"),
        ("public.pem", "k"),
    ] {
        source.files.push(proto::images::ContextFile {
            path: path.to_owned(),
            content: content.as_bytes().to_vec().into(),
            ..Default::default()
        });
    }
    let (created, build) = alice.create(wanted).await?;
    let built = alice.finished(&build.id).await?;
    anyhow::ensure!(built.state() == BuildState::Succeeded, "{built:?}");
    let history = alice.history(&build.id, 0).await?;
    assert_eq!(crate::answers::lines(&history), ["/d/.dockerignore", "/d/Dockerfile", "/d/public.pem"]);
    real.clean(&[&created.reference]).await
}
