//! Images of registries as sources: what a registry, or whoever runs one, cannot do with them.

use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};

use super::{build, failure, forgery::Forgery};
use crate::{
    client::image,
    eventually::eventually_true,
    registries::{self, Setting},
    registry::{DockerConfig, PASSWORD},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_repeats_a_hidden_image_does_not_have_it_either() -> anyhow::Result<()> {
    let setting = Setting::start().await?;
    let (alice, bob) = (setting.alice(), setting.service.builder("bob"));
    setting.publish_base("base").await?;
    let public = setting.publish_base("public").await?;
    let base = setting.in_registry("base:1");
    let wanted = setting.pushed(setting.registry.addr, "secret", &base, "RUN echo treasure > /secret");
    let secret = build(&alice, wanted).await?;
    let artifact = alice.get(&secret.id).await?.artifact.context("an artifact")?;
    let (repository, _) = secret.reference.rsplit_once(':').context("a tag")?;
    let repository = repository.strip_prefix(&setting.in_registry("")).context("of the registry")?;

    let forgery = Forgery { registry: &setting.registry, repository: "forged/all".to_owned() };
    let (own, _) = forgery.take("public", &public).await?;
    let (taken, manifest) = forgery.take(repository, &artifact.repo_digest).await?;
    let content_type = taken["mediaType"].as_str().context("a type")?;
    forgery.put("copy", content_type, manifest.clone()).await?;
    // Another digest for the same image.
    let mut renamed: Value = serde_json::from_slice(&manifest)?;
    renamed["annotations"] = json!({ "renamed": setting.run });
    forgery.put("renamed", content_type, renamed.to_string().into()).await?;
    forgery.put_index("index", &[(&taken, "amd64")]).await?;
    forgery.put_index("platforms", &[(&own, "amd64"), (&taken, "arm64")]).await?;

    let forged = |tag: &str| setting.in_registry(&format!("forged/all:{tag}"));
    let print = "RUN [\"/bin/busybox\", \"cat\", \"/secret\"]";
    let ways = [
        format!("FROM {}", forged("copy")),
        format!("FROM {}", forged("renamed")),
        format!("FROM {}", forged("index")),
    ];
    // Of an index, builds get the image for the engine's platform alone: it is refused, or has no secret.
    let platforms = [
        format!("FROM --platform=linux/arm64 {}", forged("platforms")),
        format!("ARG A=arm64\nFROM --pl'atform'=linux/$A {}", forged("platforms")),
    ];
    let named = |name: &str, dockerfile: &str| image(&format!("{name} {}", setting.run), dockerfile);
    for way in &ways {
        let hidden = failure(&bob, named("Hidden", &format!("{way}\n{print}"))).await?;
        assert!(hidden.contains("not found") && !hidden.contains("treasure"), "{way}: {hidden}");
    }
    for way in &platforms {
        let refused = failure(&bob, named("Platform", &format!("{way}\n{print}"))).await?;
        assert!(!refused.is_empty() && !refused.contains("treasure"), "{way}: {refused}");
    }
    for tag in ["copy", "renamed", "index"] {
        let pulled = registries::pulled(&format!("Pulled {tag}"), &forged(tag));
        let hidden = failure(&bob, pulled).await?;
        assert!(hidden.contains("not found"), "{tag}: {hidden}");
    }
    let mut made = vec![secret.reference.clone()];
    for way in &ways {
        let mut wanted = named("Seen", &format!("{way}\n{print}"));
        wanted.config.as_mut().context("a configuration")?.no_cache = true;
        let seen = build(&alice, wanted).await?;
        assert_eq!(seen.lines, ["treasure"], "{way}");
        made.push(seen.reference);
    }
    // The engine's own platform is another image.
    let dockerfile = format!("FROM {}\nRUN echo public", forged("platforms"));
    let public = build(&bob, named("Public", &dockerfile)).await?;
    assert_eq!(public.lines, ["public"]);
    made.push(public.reference);
    for reference in made {
        setting.remove(&reference).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_cannot_replace_a_layer_of_another_image() -> anyhow::Result<()> {
    let setting = Setting::start().await?;
    let (alice, bob) = (setting.alice(), setting.service.builder("bob"));
    let (genuine, other) = (setting.publish_base("genuine").await?, setting.publish_base("other").await?);
    let forgery = Forgery { registry: &setting.registry, repository: "forged/layer".to_owned() };
    let (taken, manifest) = forgery.take("genuine", &genuine).await?;
    let (_, of_other) = forgery.take("other", &other).await?;
    let mut manifest: Value = serde_json::from_slice(&manifest)?;
    let of_other: Value = serde_json::from_slice(&of_other)?;
    manifest["layers"] = of_other["layers"].clone();
    let content_type = taken["mediaType"].as_str().context("a type")?;
    forgery.put("1", content_type, manifest.to_string().into()).await?;

    // The engine has none of these layers yet.
    let from = |name: &str, base: &str| {
        let dockerfile = format!("FROM {}\nRUN cat /etc/text; echo", setting.in_registry(base));
        image(&format!("{name} {}", setting.run), &dockerfile)
    };
    let refused = failure(&bob, from("Forged", "forged/layer:1")).await?;
    assert!(!refused.is_empty());
    let pulled = registries::pulled("Pulled", &setting.in_registry("forged/layer:1"));
    assert!(!failure(&bob, pulled).await?.is_empty());
    let of_genuine = build(&alice, from("Genuine", "genuine:1")).await?;
    let of_other = build(&alice, from("Other", "other:1")).await?;
    assert_eq!((of_genuine.lines.len(), of_other.lines.len()), (1, 1), "{of_genuine:?}, {of_other:?}");
    assert_ne!(of_genuine.lines, of_other.lines, "the layer was replaced");
    setting.remove(&of_genuine.reference).await?;
    setting.remove(&of_other.reference).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_pulled_with_credentials_is_private_by_its_digest_too() -> anyhow::Result<()> {
    let setting = Setting::start().await?;
    let digest = setting.publish_base("crew/base").await?;
    let forgery = Forgery { registry: &setting.registry, repository: "open/copy".to_owned() };
    let (_, manifest) = forgery.take("crew/base", &digest).await?;
    let manifest: Value = serde_json::from_slice(&manifest)?;
    let content_type = manifest["mediaType"].as_str().unwrap_or("application/vnd.oci.image.manifest.v1+json");
    forgery.put("1", content_type, manifest.to_string().into()).await?;
    // Credentials for one repository are for alice alone, those for the other for everybody.
    let [crew, open] = ["crew", "open"].map(|path| setting.in_registry(path));
    let entry = DockerConfig::entry(PASSWORD);
    let config = json!({
        "auths": { &crew: entry, &open: entry },
        "trailer": { &crew: { "creators": ["alice"] } },
    });
    setting.config.write(&config.to_string())?;
    let (alice, bob) = (setting.alice(), setting.service.builder("bob"));
    let from = |name: &str, base: &str| {
        image(
            &format!("{name} {}", setting.run),
            &format!("FROM {}\nRUN echo built", setting.in_registry(base)),
        )
    };
    let mine = build(&alice, from("Mine", "crew/base:1")).await?;
    let hidden = failure(&bob, from("Hidden", "open/copy:1")).await?;
    assert!(hidden.contains("not found"), "{hidden}");
    let pulled = registries::pulled("Pulled", &setting.in_registry("open/copy:1"));
    let hidden = failure(&bob, pulled).await?;
    assert!(hidden.contains("not found"), "{hidden}");
    // Whoever may use the credentials may use the copy.
    let copy = build(&alice, from("Copy", "open/copy:1")).await?;
    setting.remove(&mine.reference).await?;
    setting.remove(&copy.reference).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_base_image_is_kept_for_builds_and_removed_when_none_uses_it() -> anyhow::Result<()> {
    let setting = Setting::start_with(&["--keep-bases", "1s", "--slots", "3"]).await?;
    let digest = setting.publish_base("base").await?;
    let pinned = setting.in_registry(&format!("base@{digest}"));
    let alice = setting.alice();
    let from = |name: &str| {
        let dockerfile = format!("FROM {}\nRUN echo {name} && sleep 1", setting.in_registry("base:1"));
        image(&format!("{name} {}", setting.run), &dockerfile)
    };
    // Some begin while the base image is removed.
    let mut made = Vec::new();
    for round in 0..4 {
        let [a, b, c] = ["a", "b", "c"].map(|name| from(&format!("{name}{round}")));
        let built = tokio::try_join!(build(&alice, a), build(&alice, b), build(&alice, c))?;
        made.extend([built.0, built.1, built.2]);
        tokio::time::sleep(Duration::from_millis(700 * round)).await;
    }
    for built in made {
        setting.remove(&built.reference).await?;
        alice.delete(&built.id).await?;
    }
    eventually_true("the base image goes", async || Ok(setting.docker.inspect_image(&pinned).await.is_err()))
        .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_not_whole_is_the_users_to_correct() -> anyhow::Result<()> {
    let setting = Setting::start().await?;
    let digest = setting.publish_base("base").await?;
    let forgery = Forgery { registry: &setting.registry, repository: "broken/all".to_owned() };
    let (taken, manifest) = forgery.take("base", &digest).await?;
    forgery.put_index("platform", &[(&taken, "s390x")]).await?;
    forgery.put("layer", taken["mediaType"].as_str().context("a type")?, manifest.clone()).await?;
    let manifest: Value = serde_json::from_slice(&manifest)?;
    let layer = manifest["layers"][0]["digest"].as_str().context("a layer")?;
    setting.registry.lose_blob(layer)?;
    let bob = setting.service.builder("bob");
    for tag in ["platform", "layer"] {
        let base = setting.in_registry(&format!("broken/all:{tag}"));
        // These check that there was one attempt.
        let pulled = registries::pulled(&format!("Pulled {tag}"), &base);
        assert!(!failure(&bob, pulled).await?.is_empty(), "{tag}");
        let from = image(&format!("From {tag} {}", setting.run), &format!("FROM {base}\nENV A=b"));
        let refused = failure(&bob, from).await?;
        assert!(refused.contains(&base), "{tag}: {refused}");
        assert_eq!(refused.contains("platform of the engine"), tag == "platform", "{refused}");
    }
    Ok(())
}
