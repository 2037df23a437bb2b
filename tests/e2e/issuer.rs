//! An identity provider: keys, the tokens that they sign, and a JWKS over HTTP.

use std::{convert::Infallible, net::SocketAddr, sync::Arc};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use http::{Response, StatusCode};
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use ring::{
    rand::SystemRandom,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256,
        RsaKeyPair, RsaPublicKeyComponents,
    },
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};

/// A PKCS #8 key of 2,048 bits made for these tests, because *ring* cannot generate RSA keys.
const RSA_KEY: &str = concat!(
    "MIIEvAIBADANBgkqhkiG9w0BAQEFAASCBKYwggSiAgEAAoIBAQCoCD13fJz9qPjpJVESFaZwtsKFErds3Ts+LgS5lYUZvMWgIlHqKD9Qftqa",
    "OtHFlrrFlc5HzhUXwKIZzmzXuN20x/YnSkVNhsxS0mrli2hn3kz4t0ATZ/SN/cRU+fvjRzyKsI+ILwaumWFfCXI79Tde7LLfVxtkI3327aFE",
    "I3pk94HfCIZj7qVhAJkkGwA0WjzJmeqJTC9pOsJhM8yvyJRrOg5BTQxhKZMOGm0i1YckY+WopVb3uSDrwnqNLl8nJUXH1R8R9pAyEzMu9WZo",
    "FlB2VOXPyiVE1VvYK1/uCz29yKPyKHqcmE4RzFV90nwHuwBak9e/fZgGY69ItwUmvVkvAgMBAAECggEAAqhStIuTfg2IlkNhU1xlS/4P+IPR",
    "w9aB49tddsPvHXeXVo+EZSQq0C6ZbXwFqk7WeF6Eqy0Ot1f0GF1j6kuBsiTBd2Cc1PuPSrYKO8QnLBFffUWErWnk+8PqMX/cpH0Rb44YTwqT",
    "W/qQCC1BkcIwlH9A2vhpNf27tcaPWOEIxAUBgpfz4+DV/hx6sFXB+Mp5DltO3S8rzTCMwsgJlsudEMjm8oREypJZ9S5nMuu6yuA2gEY6Fmi/",
    "TFeYfhSDT0Vq7UUhPl1bDJYHZVQ4coVX54VcqYeVdELqSWHTdF6eDl628iaqhiK0QsFlD48hPihHjGISmsaNDvzJRGAjp09pjQKBgQDiE2Bx",
    "mNuN7CphgQuwkaWymiSHVJm+SqiabHGZ5wYS+4k5oD94lI3h1trXZOpBkeAu0nk6XCb8roNzw+nrffRFzBRDa9kq+pYKHLHQnIf20RkvAZnC",
    "ANiTIYPv0eqh+Gh3Zd+jA8KaPH/R7/OojWO0eTWMkOV+Tg5RzYJZbJS+ewKBgQC+Rgv9nlB/0hShZHZZ/zb8Vaa64y7tBE3A4arETLknjxDZ",
    "tl0naYgsVG1Oh7k0YXyVALiOjsS45vN9a0nKCRbFRzF61QR4npX8pi3n26lp20HX7Z5scTfNNZOYkS42BCqfrRsbUeTLToe2Ui0rVWlGh67Q",
    "WCw1fxI+8Ey+ok7r3QKBgARZlRh6dXcEnUglAIGUO9j06FEGSrMDorzd602nyVEiL+DA+ZerXBOFW86bLXq3gNXFzPlXfpSMExFuKpkSYlnZ",
    "dGZbs+EE01A8fxthd6hDG7Xw1PGLrJ8gHPbHVjlpmzD479WmI99t3JPAhzKuDcYSMvqSaygD/niKeMCZuz7zAoGAEUZOxGHhMRmjodt7G0Se",
    "e15TWthRZFdlr8NNO7EzhjHo97skzfU41b18hwqvd9/57ZU5LEgt+BOPu61H773PgW2rQlmgpErRlzSHKmu4/9FWMwJxxaqpxEm+8rULmv/Z",
    "1tFiiqJuwT6J97WSQELq4epjpqq6qMi2oVwzu4ME40kCgYALfCtaZZJp2OlM8EhRceoDBz32xBAU7dFgwpNDN8oxjgKupIVlyQtYjcVrneu6",
    "HuZD23sdT5S470Pgv030lPQp83UbgGXMJz+TWXx7+1zmQuK8uylifBqx+IJmRSjGovvDS02mofrHvt3e/0gaizaBi0YZGNGWbk2p+67aBgw/",
    "gQ==",
);

/// A key that signs tokens.
#[derive(Debug)]
pub(crate) struct SigningKey {
    id: Option<String>,
    pair: Pair,
}

#[derive(Debug)]
enum Pair {
    Ed25519(Ed25519KeyPair),
    P256(EcdsaKeyPair),
    Rsa(RsaKeyPair),
}

/// An HTTP server that returns one document at every path.
#[derive(Debug)]
pub(crate) struct KeyServer {
    addr: SocketAddr,
    answer: Arc<watch::Sender<(StatusCode, String)>>,
    fetches: watch::Receiver<usize>,
    /// Tasks of the server, aborted on drop.
    _tasks: JoinSet<()>,
}

impl SigningKey {
    pub(crate) fn ed25519(id: &str) -> Self {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).expect("randomness");
        Self::new(id, Pair::Ed25519(Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).expect("a key")))
    }

    pub(crate) fn p256(id: &str) -> Self {
        let (algorithm, random) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(algorithm, &random).expect("randomness");
        Self::new(
            id,
            Pair::P256(EcdsaKeyPair::from_pkcs8(algorithm, pkcs8.as_ref(), &random).expect("a key")),
        )
    }

    pub(crate) fn rsa(id: &str) -> Self {
        let pkcs8 = STANDARD.decode(RSA_KEY).expect("base64");
        Self::new(id, Pair::Rsa(RsaKeyPair::from_pkcs8(&pkcs8).expect("a key")))
    }

    fn new(id: &str, pair: Pair) -> Self {
        Self { id: Some(id.to_owned()), pair }
    }

    /// Removes the key's id from its tokens and documents.
    pub(crate) fn without_id(self) -> Self {
        Self { id: None, ..self }
    }

    pub(crate) fn algorithm(&self) -> &'static str {
        match self.pair {
            Pair::Ed25519(_) => "EdDSA",
            Pair::P256(_) => "ES256",
            Pair::Rsa(_) => "RS256",
        }
    }

    /// Returns the public key as a JWK.
    pub(crate) fn jwk(&self) -> Value {
        let mut jwk = match &self.pair {
            Pair::Ed25519(pair) => {
                json!({"kty": "OKP", "crv": "Ed25519", "x": encode(pair.public_key())})
            }
            Pair::P256(pair) => {
                let (x, y) = pair.public_key().as_ref()[1..].split_at(32);
                json!({"kty": "EC", "crv": "P-256", "x": encode(x), "y": encode(y)})
            }
            Pair::Rsa(pair) => {
                let public = RsaPublicKeyComponents::<Vec<u8>>::from(pair.public_key());
                json!({"kty": "RSA", "n": encode(public.n), "e": encode(public.e)})
            }
        };
        jwk["use"] = json!("sig");
        jwk["alg"] = json!(self.algorithm());
        if let Some(id) = &self.id {
            jwk["kid"] = json!(id);
        }
        jwk
    }

    /// Returns the secret of a verifier that mistakes the public key for one.
    pub(crate) fn public_bytes(&self) -> Vec<u8> {
        match &self.pair {
            Pair::Ed25519(pair) => pair.public_key().as_ref().to_vec(),
            Pair::P256(pair) => pair.public_key().as_ref().to_vec(),
            Pair::Rsa(pair) => RsaPublicKeyComponents::<Vec<u8>>::from(pair.public_key()).n,
        }
    }

    /// Returns a token with these claims.
    pub(crate) fn token(&self, claims: &Value) -> String {
        self.token_with(&self.header(), claims)
    }

    pub(crate) fn header(&self) -> Value {
        let mut header = json!({"typ": "JWT", "alg": self.algorithm()});
        if let Some(id) = &self.id {
            header["kid"] = json!(id);
        }
        header
    }

    /// Returns a token with these claims and a header that need not be true.
    pub(crate) fn token_with(&self, header: &Value, claims: &Value) -> String {
        let message = message(header, claims);
        format!("{message}.{}", encode(self.sign(message.as_bytes())))
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match &self.pair {
            Pair::Ed25519(pair) => pair.sign(message).as_ref().to_vec(),
            Pair::P256(pair) => pair.sign(&random, message).expect("a signature").as_ref().to_vec(),
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature).expect("a signature");
                signature
            }
        }
    }
}

/// Returns the signed part of a token.
pub(crate) fn message(header: &Value, claims: &Value) -> String {
    format!("{}.{}", encode(header.to_string()), encode(claims.to_string()))
}

pub(crate) fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Returns the document with the public keys.
pub(crate) fn jwks(keys: &[&SigningKey]) -> String {
    let keys: Vec<Value> = keys.iter().map(|key| key.jwk()).collect();
    json!({ "keys": keys }).to_string()
}

impl KeyServer {
    pub(crate) async fn start(document: String) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let addr = listener.local_addr()?;
        let answer = Arc::new(watch::Sender::new((StatusCode::OK, document)));
        let (count, fetches) = watch::channel(0);
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, Arc::clone(&answer), Arc::new(count)));
        Ok(Self { addr, answer, fetches, _tasks: tasks })
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/.well-known/jwks.json", self.addr)
    }

    /// Sets the response from now on.
    pub(crate) fn set(&self, status: StatusCode, document: String) {
        self.answer.send_replace((status, document));
    }

    /// Returns how often the document was fetched.
    pub(crate) fn fetches(&self) -> usize {
        *self.fetches.borrow()
    }

    /// Waits until the document was fetched `count` times.
    pub(crate) async fn fetched(&self, count: usize) {
        self.fetches.clone().wait_for(|fetches| *fetches >= count).await.expect("it serves");
    }
}

async fn accept(
    listener: TcpListener,
    answer: Arc<watch::Sender<(StatusCode, String)>>,
    count: Arc<watch::Sender<usize>>,
) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let (answer, count) = (Arc::clone(&answer), Arc::clone(&count));
        connections.spawn(async move {
            let service = service_fn(|_| {
                let (status, document) = answer.borrow().clone();
                count.send_modify(|count| *count += 1);
                let mut response = Response::new(document);
                *response.status_mut() = status;
                std::future::ready(Ok::<_, Infallible>(response))
            });
            // A client that disconnects early is not an error.
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}
