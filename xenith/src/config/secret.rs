//! The one secret an operator hands over: the first password of root.

use std::io::{Error, ErrorKind};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// The environment variable that is read when no file is configured.
pub const ROOT_PASSWORD_VARIABLE: &str = "XENITH_ROOT_PASSWORD";

/// Reads the first password of root from a file that only its owner can read, or else from the environment.
pub fn root_password(file: Option<&Path>) -> Result<String, Error> {
    let Some(path) = file else {
        return std::env::var(ROOT_PASSWORD_VARIABLE).map_err(|_| {
            Error::new(
                ErrorKind::NotFound,
                format!(
                    "neither founding.root_password_file nor the environment variable {ROOT_PASSWORD_VARIABLE} is set"
                ),
            )
        });
    };
    let name = |source: Error| Error::new(source.kind(), format!("{}: {source}", path.display()));
    let mode = std::fs::metadata(path).map_err(name)?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(name(Error::new(
            ErrorKind::PermissionDenied,
            format!("others can read it (mode {:o}); run: chmod 600 {}", mode & 0o777, path.display()),
        )));
    }
    let text = std::fs::read_to_string(path).map_err(name)?;
    let password = text.strip_suffix('\n').unwrap_or(&text);
    if password.is_empty() {
        return Err(name(Error::new(ErrorKind::InvalidData, "the password is empty")));
    }
    Ok(password.to_owned())
}
