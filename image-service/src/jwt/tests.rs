use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn keys() -> (tempfile::TempDir, TokenKeys) {
    let dir = tempfile::tempdir().expect("a directory");
    let keys = TokenKeys::open(dir.path()).expect("keys");
    (dir, keys)
}

#[test]
fn a_minted_token_names_its_subject_and_roles() {
    let (dir, keys) = keys();
    let token = keys.mint("alice", &[Role::Builder], &[], &[], HOUR).expect("a token");
    let again = TokenKeys::open(dir.path()).expect("the same keys");
    let verifier = Verifier::of_key_pair(&again);
    let principal = verifier.verify(&token).expect("accepted");
    assert_eq!(principal.subject(), "alice");
    assert!(principal.has(Role::Builder) && !principal.is_admin());
    assert_eq!(verifier.verify(&token), Ok(principal), "the second time it is remembered");
}

#[test]
fn foreign_and_forged_tokens_are_refused() {
    let (_dir, keys) = keys();
    let (_other_dir, other) = self::keys();
    let (verifier, other) = (Verifier::of_key_pair(&keys), Verifier::of_key_pair(&other));
    let token = keys.mint("alice", &[Role::Admin], &[], &[], HOUR).expect("a token");
    assert!(verifier.verify(&token).is_ok());
    assert_eq!(other.verify(&token), Err(TokenError::Invalid));
    let (body, signature) = token.rsplit_once('.').expect("three parts");
    for forged in
        ["", "a.b.c", body, &format!("{body}."), &format!("{body}.AAAA"), &format!("{signature}.{body}")]
    {
        assert_eq!(verifier.verify(forged), Err(TokenError::Invalid), "{forged}");
    }
    // {"alg":"none"}
    let claims = token.split('.').nth(1).expect("claims");
    assert_eq!(verifier.verify(&format!("eyJhbGciOiJub25lIn0.{claims}.")), Err(TokenError::Invalid));
}

#[test]
fn a_token_expires_whether_or_not_it_was_accepted_before() {
    let (_dir, keys) = keys();
    let verifier = Verifier::of_key_pair(&keys);
    let token = keys.mint("alice", &[], &[], &[], HOUR).expect("a token");
    let expiry = verifier.verify(&token).expect("accepted").expires_at();
    assert!(verifier.verify_at(&token, expiry.before(Duration::from_micros(1))).is_ok());
    assert_eq!(verifier.verify_at(&token, expiry), Err(TokenError::Expired), "remembered");
    assert_eq!(
        Verifier::of_key_pair(&keys).verify_at(&token, expiry),
        Err(TokenError::Expired),
        "never seen"
    );
}

#[test]
fn new_keys_remember_nothing() {
    let (_dir, keys) = keys();
    let verifier = Verifier::of_key_pair(&keys);
    let token = keys.mint("alice", &[], &[], &[], HOUR).expect("a token");
    assert!(verifier.verify(&token).is_ok());
    verifier.replace(Trust::default());
    assert_eq!(verifier.verify(&token), Err(TokenError::Invalid));
}

#[test]
fn anonymous_callers_are_builders_and_nothing_else() {
    let (_dir, keys) = keys();
    let verifier = Verifier::of_key_pair(&keys);
    assert_eq!(verifier.anonymous(), None);
    let anonymous = verifier.with_anonymous().anonymous().expect("let in");
    assert_eq!(anonymous.subject(), "anonymous");
    assert!(anonymous.has(Role::Builder) && !anonymous.is_admin() && !anonymous.is_worker());
    assert!(!is_over(anonymous.expires_at(), Timestamp::now()));
}
