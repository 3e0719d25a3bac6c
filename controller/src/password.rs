//! Passwords: argon2id hashes, checked away from the threads that serve.

use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use argon2::{Algorithm, Argon2, Params, PasswordHash, Version};
use tokio::sync::Semaphore;

/// 19 MiB, two passes, one lane: the OWASP minimum for argon2id, some 20 ms here.
fn argon() -> Argon2<'static> {
    Argon2::new(Algorithm::Argon2id, Version::V0x13, Params::new(19 * 1024, 2, 1, None).unwrap_or_default())
}

/// A password could not be hashed.
#[derive(Debug, thiserror::Error)]
#[error("the password cannot be hashed: {0}")]
pub struct HashError(String);

/// The hash of a password, in PHC form, with a salt of its own. Takes some milliseconds of CPU.
///
/// # Errors
/// When argon2 refuses, or the system has no randomness.
pub fn hash(password: &str) -> Result<String, HashError> {
    argon()
        .hash_password(password.as_bytes())
        .map(|hash| hash.to_string())
        .map_err(|error| HashError(error.to_string()))
}

/// As many checks at once as there are spare processors: a storm of logins must not starve the pool.
static CHECKS: Semaphore = Semaphore::const_new(2);

/// Whether a password fits a hash.
pub(crate) async fn fits(password: String, hash: String) -> bool {
    let Ok(_permit) = CHECKS.acquire().await else { return false };
    let check =
        move || PasswordHash::new(&hash).is_ok_and(|hash| argon().verify_password(password.as_bytes(), &hash).is_ok());
    tokio::task::spawn_blocking(check).await.unwrap_or(false)
}
