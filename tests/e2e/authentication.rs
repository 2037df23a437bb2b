//! Accepted tokens: those of an identity provider, verified by its JWKS; and callers without a token.

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use proto::dispatch::{
    Attempt, ConnectRequest, FetchContextRequest, FindUnusedImagesRequest,
    connect_request::Message as ToService,
};
use ring::hmac;
use serde_json::{Value, json};
use tonic::Code;

use crate::{
    actor::hello,
    answers::{reason, refused},
    client::{client, image},
    eventually::eventually_true,
    issuer::{KeyServer, SigningKey, encode, jwks, message},
    programs::Catalogue,
    stack::{LIMIT, Service},
};

mod keys;

/// Returns the Unix time that is `seconds` from now.
fn in_seconds(seconds: i64) -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    i64::try_from(now).expect("before the year 292277026596") + seconds
}

/// Returns the claims that every token needs.
fn claims(subject: &str) -> Value {
    json!({"sub": subject, "exp": in_seconds(3600)})
}

fn with(mut claims: Value, name: &str, value: Value) -> Value {
    claims[name] = value;
    claims
}

fn without(mut claims: Value, name: &str) -> Value {
    claims.as_object_mut().expect("an object").remove(name);
    claims
}

/// Returns the reason why a token is refused; empty if it is accepted.
async fn refusal(service: &Service, token: &str) -> String {
    match service.client(token).list().await {
        Ok(_) => String::new(),
        Err(status) => {
            assert_eq!(status.code(), Code::Unauthenticated);
            reason(&status)
        }
    }
}

/// Waits until a token is refused for the `expected` reason, or accepted if that is empty.
async fn until(service: &Service, token: &str, expected: &str) -> anyhow::Result<()> {
    let what = format!("the reason becomes {expected:?}");
    eventually_true(&what, async || Ok(refusal(service, token).await == expected)).await
}

/// Writes the JWKS of these keys to a file.
fn file(keys: &[&SigningKey]) -> anyhow::Result<tempfile::TempPath> {
    let file = tempfile::NamedTempFile::new()?.into_temp_path();
    std::fs::write(&file, jwks(keys))?;
    Ok(file)
}

fn name(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

#[tokio::test(flavor = "multi_thread")]
async fn every_algorithm_is_accepted_from_a_file_and_from_a_url() -> anyhow::Result<()> {
    let keys = [
        SigningKey::ed25519("e"),
        SigningKey::p256("p"),
        SigningKey::rsa("r"),
        SigningKey::ed25519("").without_id(),
        SigningKey::p256("").without_id(),
    ];
    let document: Vec<&SigningKey> = keys.iter().collect();
    let (file, server) = (file(&document)?, KeyServer::start(jwks(&document)).await?);
    for place in [name(&file), &server.url()] {
        let service = Service::start_with(&["--jwks", place]).await?;
        for key in &keys {
            let token = key.token(&with(claims("alice"), "roles", json!(["builder"])));
            let created = service.client(&token).create(image("A", "FROM scratch")).await;
            let (created, _) = created.with_context(|| format!("{} by {place}", key.algorithm()))?;
            assert_eq!(created.creator, "alice");
        }
        service.stop().await?;
    }
    assert_eq!(server.fetches(), 1, "keys that are known are not asked for");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_claims_of_a_token_are_checked() -> anyhow::Result<()> {
    let key = SigningKey::p256("p");
    let file = file(&[&key])?;
    let flags = ["--jwks", name(&file), "--issuer", "https://id.example", "--audience", "images"];
    let service = Service::start_with(&flags).await?;
    let good = with(with(claims("alice"), "iss", json!("https://id.example")), "aud", json!("images"));
    for (claims, expected) in [
        (good.clone(), ""),
        (with(good.clone(), "aud", json!(["other", "images"])), ""),
        (with(good.clone(), "nbf", json!(in_seconds(-60))), ""),
        (with(good.clone(), "exp", json!(1e11)), ""),
        (with(good.clone(), "iss", json!("https://id.example/")), "TOKEN_INVALID"),
        (without(good.clone(), "iss"), "TOKEN_INVALID"),
        (with(good.clone(), "aud", json!("other")), "TOKEN_INVALID"),
        (with(good.clone(), "aud", json!(["other", "image"])), "TOKEN_INVALID"),
        (with(good.clone(), "aud", json!([])), "TOKEN_INVALID"),
        (without(good.clone(), "aud"), "TOKEN_INVALID"),
        (with(good.clone(), "nbf", json!(in_seconds(60))), "TOKEN_INVALID"),
        (with(good.clone(), "nbf", json!("soon")), "TOKEN_INVALID"),
        (with(good.clone(), "exp", json!(in_seconds(-60))), "TOKEN_EXPIRED"),
        (with(good.clone(), "exp", json!("never")), "TOKEN_INVALID"),
        (without(good.clone(), "exp"), "TOKEN_INVALID"),
        (with(good.clone(), "sub", json!("")), "TOKEN_INVALID"),
        (with(good.clone(), "sub", json!("a\nb")), "TOKEN_INVALID"),
        (with(good.clone(), "sub", json!(7)), "TOKEN_INVALID"),
        (without(good.clone(), "sub"), "TOKEN_INVALID"),
    ] {
        assert_eq!(refusal(&service, &key.token(&claims)).await, expected, "{claims}");
    }
    let short = key.token(&with(good, "exp", json!(in_seconds(1))));
    assert_eq!(refusal(&service, &short).await, "");
    until(&service, &short, "TOKEN_EXPIRED").await?;

    let lax = Service::start_with(&["--jwks", name(&file)]).await?;
    for claims in [claims("alice"), with(with(claims("alice"), "aud", json!("x")), "iss", json!("y"))] {
        assert_eq!(refusal(&lax, &key.token(&claims)).await, "", "{claims}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_has_no_say_in_how_it_is_verified() -> anyhow::Result<()> {
    let keys = [SigningKey::ed25519("e"), SigningKey::p256("p"), SigningKey::rsa("r")];
    let [ed25519, p256, rsa] = &keys;
    let encryption = with(SigningKey::p256("x").jwk(), "use", json!("enc"));
    let document = json!({"keys": [
        {"kty": "oct", "kid": "o", "k": encode("secret")}, ed25519.jwk(), p256.jwk(), rsa.jwk(), encryption
    ]});
    let file = file(&[])?;
    std::fs::write(&file, document.to_string())?;
    let service = Service::start_with(&["--jwks", name(&file)]).await?;
    let claims = claims("alice");
    let mut forged = vec![
        // A good key, but not the one with this id.
        ed25519.token_with(&with(ed25519.header(), "kid", json!("p")), &claims),
        ed25519.token_with(&with(ed25519.header(), "kid", json!("nobody")), &claims),
        ed25519.token_with(&with(ed25519.header(), "alg", json!("ES256")), &claims),
        rsa.token_with(&with(rsa.header(), "alg", json!("RS512")), &claims),
        rsa.token_with(&with(rsa.header(), "alg", json!("PS256")), &claims),
        // Extensions that a verifier must understand.
        p256.token_with(&with(p256.header(), "crit", json!(["b64"])), &claims),
        // Keys of the caller's own.
        SigningKey::ed25519("e").token(&claims),
        SigningKey::ed25519("").without_id().token(&claims),
        {
            let own = SigningKey::p256("own");
            own.token_with(&with(without(own.header(), "kid"), "jwk", own.jwk()), &claims)
        },
    ];
    for key in &keys {
        assert_eq!(refusal(&service, &key.token(&claims)).await, "");
        for kid in [json!(null), key.header()["kid"].clone(), json!("o")] {
            for alg in ["none", "None", "HS256"] {
                let header = match kid.is_null() {
                    true => json!({"alg": alg}),
                    false => json!({"alg": alg, "kid": kid}),
                };
                let message = message(&header, &claims);
                for secret in [key.public_bytes(), key.jwk().to_string().into_bytes(), b"secret".to_vec()] {
                    let secret = hmac::Key::new(hmac::HMAC_SHA256, &secret);
                    forged.push(format!("{message}.{}", encode(hmac::sign(&secret, message.as_bytes()))));
                }
                forged.push(format!("{message}."));
            }
        }
        // Claims that were changed after signing.
        let token = key.token(&claims);
        let (_, signature) = token.rsplit_once('.').context("three parts")?;
        let admin = with(claims.clone(), "roles", json!(["admin"]));
        forged.push(format!("{}.{signature}", message(&key.header(), &admin)));
    }
    for token in forged {
        assert_eq!(refusal(&service, &token).await, "TOKEN_INVALID", "{token}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_come_from_the_claim_that_the_operator_names() -> anyhow::Result<()> {
    let key = SigningKey::ed25519("e");
    let file = file(&[&key])?;
    let flags = ["--jwks", name(&file), "--roles-claim", "https://trailer.example/roles"];
    let service = Service::start_with(&flags).await?;
    let token = |name: &str, value: Value| key.token(&with(claims("alice"), name, value));
    for (claim, roles, expected) in [
        ("https://trailer.example/roles", json!(["offline_access", "builder"]), Ok(())),
        ("https://trailer.example/roles", json!("openid builder"), Ok(())),
        ("https://trailer.example/roles", json!(["offline_access"]), Err("ROLE_MISSING")),
        ("https://trailer.example/roles", json!(["worker"]), Err("WORKER_TOKEN")),
        ("roles", json!(["builder"]), Err("ROLE_MISSING")),
    ] {
        let created = service.client(&token(claim, roles.clone())).create(image("A", "FROM scratch")).await;
        let answer = created.map(|_| ()).map_err(|status| reason(&status));
        assert_eq!(answer, expected.map_err(str::to_owned), "{claim}: {roles}");
    }
    let worker = client(service.addr, &token("https://trailer.example/roles", json!(["worker"])));
    let hello = tokio_stream::empty::<ConnectRequest>();
    let answer = worker.dispatch.clone().connect(hello).await.map(|_| ());
    assert!(!answer.is_err_and(
        |status| status.code() == Code::Unauthenticated || status.code() == Code::PermissionDenied
    ));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn anonymous_callers_are_let_in_only_when_that_is_said() -> anyhow::Result<()> {
    let service = Service::start_with(&["--anonymous"]).await?;
    let nobody = client(service.addr, "");
    let (created, _) = nobody.create(image("A", "FROM scratch")).await?;
    assert_eq!(created.creator, "anonymous");
    assert_eq!(nobody.list().await?.len(), 1);

    let (hidden, _) = service.builder("alice").create(image("B", "FROM scratch")).await?;
    assert_eq!(nobody.get(&hidden.id).await.expect_err("not an admin").code(), Code::NotFound);
    let hello = tokio_stream::pending::<ConnectRequest>();
    let dispatched = nobody.dispatch.clone().connect(hello).await.expect_err("no worker");
    assert_eq!(reason(&dispatched), "ROLE_MISSING");

    // If a token is sent, it counts: a bad one does not make the caller anonymous.
    assert_eq!(refusal(&service, "nonsense").await, "TOKEN_INVALID");
    let expired = service.token_for("alice", &[], Duration::ZERO);
    until(&service, &expired, "TOKEN_EXPIRED").await?;

    let mut request = tonic::Request::new(proto::images::ListImagesRequest::default());
    request.metadata_mut().insert("authorization", "Basic YWxpY2U6c2VjcmV0".parse()?);
    let refused = nobody.images.clone().list_images(request).await.expect_err("no token");
    assert_eq!(reason(&refused), "TOKEN_MISSING");

    let mut request = tonic::Request::new(proto::images::ListImagesRequest::default());
    for subject in ["alice", "bob"] {
        let token = format!("Bearer {}", service.token(subject, &[]));
        request.metadata_mut().append("authorization", token.parse()?);
    }
    let refused = nobody.images.clone().list_images(request).await.expect_err("two tokens");
    assert_eq!(reason(&refused), "TOKEN_INVALID");

    // Without a token, a stream has no expiry to end at.
    let watch = proto::images::WatchImagesRequest::default();
    let mut watch = nobody.images.clone().watch_images(watch).await?.into_inner();
    assert!(tokio::time::timeout(LIMIT, watch.message()).await??.is_some());
    Ok(())
}

/// Calls each RPC of the dispatch API as worker `w1` and returns the codes and reasons.
async fn dispatch_refusals(service: &Service, token: &str) -> Vec<(Code, String)> {
    let client = client(service.addr, token).dispatch;
    let hello = ConnectRequest { message: Some(ToService::Hello(hello("w1", &[]))) };
    let connected = async {
        let mut answers = client.clone().connect(futures_util::stream::iter([hello])).await?.into_inner();
        answers.message().await.map(drop)
    };
    let unused =
        async { client.clone().find_unused_images(FindUnusedImagesRequest::default()).await.map(drop) };
    let attempt = Attempt { build_id: uuid::Uuid::new_v4().to_string(), number: 1 };
    let fetched = async {
        let request = FetchContextRequest { attempt: Some(attempt) };
        let mut chunks = client.clone().fetch_context(request).await?.into_inner();
        chunks.message().await.map(drop)
    };
    [connected.await, unused.await, fetched.await]
        .into_iter()
        .map(|answer| {
            answer.map_or_else(|status| (status.code(), reason(&status)), |()| (Code::Ok, String::new()))
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_dispatch_api_is_for_workers_each_in_its_own_name() -> anyhow::Result<()> {
    let key = SigningKey::p256("p");
    let file = file(&[&key])?;
    let service = Service::start_with(&["--jwks", name(&file), "--audience", "images"]).await?;
    let worker =
        |subject: &str| with(with(claims(subject), "aud", json!("images")), "roles", json!(["worker"]));
    let denied = |reason: &str| (Code::PermissionDenied, reason.to_owned());
    let unknown = |reason: &str| (Code::Unauthenticated, reason.to_owned());
    let (fine, not_held) = ((Code::Ok, String::new()), (Code::NotFound, "BUILD_NOT_FOUND".to_owned()));

    let own = dispatch_refusals(&service, &key.token(&worker("w1"))).await;
    assert_eq!(own, [fine.clone(), fine.clone(), not_held.clone()]);
    // The RPCs that name no worker accept any worker's token, but `w2` cannot connect as `w1`.
    let other = dispatch_refusals(&service, &key.token(&worker("w2"))).await;
    assert_eq!(other, [denied("OTHER_WORKER"), fine, not_held]);
    for roles in [json!([]), json!(["builder"]), json!(["admin"]), json!(["service"])] {
        let token = key.token(&with(worker("w1"), "roles", roles.clone()));
        assert_eq!(dispatch_refusals(&service, &token).await, vec![denied("ROLE_MISSING"); 3], "{roles}");
    }
    let unsigned = format!("{}.", message(&json!({"alg": "none", "typ": "JWT"}), &worker("w1")));
    let forged = SigningKey::p256("p").token(&worker("w1"));
    for (token, expected) in [
        (String::new(), "TOKEN_MISSING"),
        (unsigned, "TOKEN_INVALID"),
        (forged, "TOKEN_INVALID"),
        (key.token(&with(worker("w1"), "aud", json!("other"))), "TOKEN_INVALID"),
        (key.token(&with(worker("w1"), "exp", json!(in_seconds(-60)))), "TOKEN_EXPIRED"),
    ] {
        assert_eq!(dispatch_refusals(&service, &token).await, vec![unknown(expected); 3], "{token}");
    }
    // A worker's token is good for nothing else.
    let (code, reason) = refused(service.client(&key.token(&worker("w1"))).list().await);
    assert_eq!((code, reason), denied("WORKER_TOKEN"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_fetched_by_the_proxy_of_the_environment() -> anyhow::Result<()> {
    let key = SigningKey::ed25519("one");
    let proxy = KeyServer::start(jwks(&[&key])).await?;
    let address = proxy.url().replace("/.well-known/jwks.json", "");
    let catalogue = Catalogue::create().await?;
    // No server has this name, so only the proxy can answer.
    let flags = ["--jwks", "http://id.example.invalid/.well-known/jwks.json"];
    let service = catalogue.replica("proxied", &[&format!("http_proxy={address}")], &flags).await?;
    let claims = serde_json::json!({ "sub": "alice", "exp": 4_000_000_000_u64, "roles": ["builder"] });
    assert_eq!(client(service.addr, &key.token(&claims)).list().await?, []);
    assert!(proxy.fetches() > 0);
    Ok(())
}
