use serde_json::json;

use super::*;
use crate::jwt::signatures;

/// Keys and the messages that they have signed: the examples of RFC 8037 (A.4) and RFC 7515 (A.3, A.2).
const ED25519_X: &str = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
const ED25519_JWS: &str = "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.\
    hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg";
const P256_X: &str = "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU";
const P256_Y: &str = "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0";
const P256_JWS: &str = "eyJhbGciOiJFUzI1NiJ9.\
    eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.\
    DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q";
const RSA_N: &str = "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4\
    QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-\
    UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91\
    kzk2PAcDTW9gb54h4FRWyuXpoQ";
const RSA_JWS: &str = "eyJhbGciOiJSUzI1NiJ9.\
    eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.\
    cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1\
    dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzD\
    wusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe7\
    7Rw";

fn ed25519(members: &Value) -> Value {
    with(json!({"kty": "OKP", "crv": "Ed25519", "x": ED25519_X}), members)
}

fn p256(members: &Value) -> Value {
    with(json!({"kty": "EC", "crv": "P-256", "x": P256_X, "y": P256_Y}), members)
}

fn rsa(members: &Value) -> Value {
    with(json!({"kty": "RSA", "n": RSA_N, "e": "AQAB"}), members)
}

fn with(mut key: Value, members: &Value) -> Value {
    let members = members.as_object().expect("an object").clone();
    key.as_object_mut().expect("an object").extend(members);
    key
}

fn set(keys: &[Value]) -> KeySet {
    KeySet::parse(json!({ "keys": keys }).to_string().as_bytes()).expect("a JWKS")
}

fn count(keys: &KeySet, id: Option<&str>, algorithm: Algorithm) -> usize {
    keys.candidates(id, algorithm).count()
}

#[test]
fn keys_verify_what_the_rfcs_have_signed_with_them() {
    signatures::install();
    let none = json!({});
    let keys = set(&[rsa(&none), p256(&none), ed25519(&none)]);
    for (algorithm, jws) in
        [(Algorithm::EdDSA, ED25519_JWS), (Algorithm::ES256, P256_JWS), (Algorithm::RS256, RSA_JWS)]
    {
        let (message, signature) = jws.rsplit_once('.').expect("three parts");
        let verified: Vec<bool> = keys
            .candidates(None, algorithm)
            .map(|key| {
                jsonwebtoken::crypto::verify(signature, message.as_bytes(), key, algorithm).expect("a key")
            })
            .collect();
        assert_eq!(verified, [true], "{algorithm:?}");
        for key in keys.candidates(None, algorithm) {
            let other = jsonwebtoken::crypto::verify(signature, b"something else", key, algorithm);
            assert!(!other.expect("a key"), "{algorithm:?}");
            for wrong in [Algorithm::EdDSA, Algorithm::ES256, Algorithm::RS256]
                .into_iter()
                .filter(|wrong| *wrong != algorithm)
            {
                assert!(jsonwebtoken::crypto::verify(signature, message.as_bytes(), key, wrong).is_err());
            }
            let hmac = jsonwebtoken::crypto::verify(signature, message.as_bytes(), key, Algorithm::HS256);
            assert!(hmac.is_err(), "a public key is no secret");
        }
    }
}

#[test]
fn an_id_chooses_and_without_one_all_that_fit_are_tried() {
    let keys = set(&[
        ed25519(&json!({"kid": "a"})),
        ed25519(&json!({"kid": "b"})),
        ed25519(&json!({})),
        p256(&json!({"kid": "a"})),
    ]);
    assert_eq!(count(&keys, Some("a"), Algorithm::EdDSA), 1);
    assert_eq!(count(&keys, Some("a"), Algorithm::ES256), 1);
    assert_eq!(count(&keys, Some("a"), Algorithm::RS256), 0);
    assert_eq!(count(&keys, Some("c"), Algorithm::EdDSA), 0);
    assert_eq!(count(&keys, None, Algorithm::EdDSA), 3);
    assert_eq!(count(&keys, None, Algorithm::HS256), 0);
    assert!(keys.knows("a") && keys.knows("b") && !keys.knows("c") && !keys.knows(""));
}

#[test]
fn keys_that_are_of_no_use_are_skipped() {
    let good = [
        ed25519(&json!({"use": "sig", "alg": "EdDSA", "key_ops": ["verify"], "x5c": ["…"], "unknown": 1})),
        p256(&json!({"alg": "ES256"})),
        rsa(&json!({"alg": "RS256"})),
        // Not what the RFC specifies, but what some issuers write: a sign byte, or padding.
        rsa(&json!({"n": format!("AK{}", &RSA_N[1..]), "e": "AAEAAQ"})),
        rsa(&json!({"n": format!("{RSA_N}==")})),
    ];
    // A key of 1,024 bits in a valid form.
    let short = URL_SAFE_NO_PAD.encode([0xa5; 128]);
    let useless = [
        rsa(&json!({"use": "enc"})),
        rsa(&json!({"key_ops": ["encrypt"]})),
        rsa(&json!({"alg": "RS512"})),
        rsa(&json!({"alg": "PS256"})),
        p256(&json!({"alg": "EdDSA"})),
        p256(&json!({"crv": "P-384"})),
        p256(&json!({"crv": "secp256k1"})),
        p256(&json!({"x": "AQAB"})),
        p256(&json!({"y": null})),
        ed25519(&json!({"crv": "X25519"})),
        ed25519(&json!({"crv": "Ed448"})),
        ed25519(&json!({"x": "not base64!"})),
        rsa(&json!({"n": short})),
        rsa(&json!({"e": ""})),
        rsa(&json!({"kid": 7})),
        json!({"kty": "oct", "k": "c2VjcmV0"}),
        json!({"kty": "AKP", "alg": "ML-DSA-44", "pub": "AA"}),
        json!({"kid": "a"}),
        json!("a key"),
    ];
    for key in &good {
        assert_eq!(set(std::slice::from_ref(key)).len(), 1, "{key}");
    }
    for key in &useless {
        assert!(set(std::slice::from_ref(key)).is_empty(), "{key}");
    }
    assert_eq!(set(&[&useless[..], &good[..]].concat()).len(), good.len());
}

#[test]
fn an_invalid_jwks_is_an_error() {
    assert!(KeySet::parse(br#"{"keys": []}"#).expect("a JWKS").is_empty());
    for text in ["", "{}", "[]", r#"{"keys": {}}"#, r#"{"keys": [}"#, "<html></html>", "{\"keys\": []} x"] {
        assert!(KeySet::parse(text.as_bytes()).is_err(), "{text}");
    }
}
