//! A request for a handler: session and query out of a head, and the answer of one that is not served here.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use controller::{ByteStream, Credentials, Declined, Handler, Inquiry, Knock};
use datamodel::encode;
use http::request::Parts;
use hyper::header::{AUTHORIZATION, COOKIE, HOST};
use hyper::{HeaderMap, StatusCode};
use percent_encoding::percent_decode_str;

use super::{Origin, Site, caller};

/// An answer that is decided before any body is read.
#[derive(Debug)]
pub(super) struct Plain {
    pub(super) status: StatusCode,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Bytes,
}

impl Plain {
    /// A page that says so.
    pub(super) fn page(status: StatusCode, text: &str) -> Self {
        let title = format!("{} {}", status.as_u16(), status.canonical_reason().unwrap_or_default());
        let mut body =
            format!("<!doctype html><html><head><title>{title}</title></head><body><h1>{title}</h1><p>").into_bytes();
        encode::xml_text(text, &mut body);
        body.extend_from_slice(b"</p></body></html>\n");
        Self { status, headers: vec![("content-type", "text/html".to_owned())], body: body.into() }
    }

    fn with(mut self, name: &'static str, value: String) -> Self {
        self.headers.push((name, value));
        self
    }
}

/// What a request for a handler asks.
pub(super) fn inquiry(handler: &'static Handler, origin: &Origin, head: &Parts, body: ByteStream) -> Inquiry {
    let query = decode_query(head.uri.query().unwrap_or_default());
    let credentials = credentials(&query, &head.headers);
    Inquiry { caller: caller(origin, &head.headers), handler, query, credentials, body }
}

/// What a request for a console asks.
pub(super) fn knock(origin: &Origin, head: &Parts) -> Knock {
    let query = decode_query(head.uri.query().unwrap_or_default());
    let credentials = credentials(&query, &head.headers);
    Knock { caller: caller(origin, &head.headers), query, credentials }
}

/// The answer to a request that this host does not serve.
pub(super) fn declined(why: Declined, site: &Site, origin: &Origin, head: &Parts) -> Plain {
    match why {
        Declined::Unauthorized => {
            Plain::page(StatusCode::UNAUTHORIZED, "A session or a name and a password are needed.")
                .with("www-authenticate", "Basic realm=\"XenAPI\"".to_owned())
        }
        Declined::Forbidden(error) => Plain::page(StatusCode::FORBIDDEN, &error.to_string()),
        Declined::Redirect(master) => {
            let path = head.uri.path_and_query().map_or("/", |path| path.as_str());
            let location = location(&master.api_address, site, origin, &head.headers, path);
            Plain::page(StatusCode::FOUND, "The pool's master answers this.").with("location", location)
        }
        Declined::Unavailable(error) => Plain::page(StatusCode::SERVICE_UNAVAILABLE, &error.to_string()),
        Declined::Absent(error) => Plain::page(StatusCode::NOT_FOUND, &error.to_string()),
        Declined::Refused(error) => Plain::page(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

/// The same at another host: clients take ports and scheme from the way they came, so this does too.
fn location(address: &str, site: &Site, origin: &Origin, headers: &HeaderMap, path: &str) -> String {
    let (scheme, usual) = if origin.secure { ("https", 443) } else { ("http", 80) };
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    let named = host.and_then(|host| host.parse::<http::uri::Authority>().ok());
    let port = match (origin.port, named) {
        // Over the host's own socket there is none to take.
        (None, _) => site.https_port,
        (Some(_), Some(named)) => named.port_u16(),
        (Some(port), None) => Some(port),
    };
    let address = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
    match port.filter(|port| *port != usual) {
        Some(port) => format!("{scheme}://{address}:{port}{path}"),
        None => format!("{scheme}://{address}{path}"),
    }
}

fn decode_query(query: &str) -> Vec<(String, String)> {
    let decode = |text: &str| percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned();
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(name, value)| (decode(name), decode(value)))
        .collect()
}

fn credentials(query: &[(String, String)], headers: &HeaderMap) -> Credentials {
    let in_query = query.iter().find(|(name, _)| name == "session_id").map(|(_, value)| value.clone());
    if let Some(session) = in_query.or_else(|| cookie(headers)).filter(|session| !session.is_empty()) {
        return Credentials::Session(session);
    }
    basic(headers).map_or(Credentials::None, |(user, password)| Credentials::Password(user, password))
}

fn cookie(headers: &HeaderMap) -> Option<String> {
    let all = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(';'));
    let named = all.filter_map(|pair| pair.trim().split_once('=')).find(|(name, _)| *name == "session_id");
    named.map(|(_, value)| percent_decode_str(value).decode_utf8_lossy().into_owned())
}

fn basic(headers: &HeaderMap) -> Option<(String, String)> {
    let text = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, encoded) = text.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = String::from_utf8(BASE64_STANDARD.decode(encoded.trim()).ok()?).ok()?;
    let (user, password) = decoded.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_decoded_pair_by_pair() {
        let pairs = decode_query("session_id=OpaqueRef%3A1&dry_run=true&flag&a+b=%26%3D&&");
        let pairs: Vec<_> = pairs.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(pairs, [("session_id", "OpaqueRef:1"), ("dry_run", "true"), ("flag", ""), ("a b", "&=")]);
    }

    #[test]
    fn a_session_goes_before_a_cookie_and_both_before_a_password() {
        let mut headers = HeaderMap::new();
        assert_eq!(credentials(&[], &headers), Credentials::None);
        headers.insert(AUTHORIZATION, "Basic cm9vdDphOmI=".parse().unwrap());
        assert_eq!(credentials(&[], &headers), Credentials::Password("root".into(), "a:b".into()));
        headers.insert(COOKIE, "other=1; session_id=OpaqueRef:2".parse().unwrap());
        assert_eq!(credentials(&[], &headers), Credentials::Session("OpaqueRef:2".into()));
        let query = [("session_id".to_owned(), "OpaqueRef:1".to_owned())];
        assert_eq!(credentials(&query, &headers), Credentials::Session("OpaqueRef:1".into()));
    }
}
