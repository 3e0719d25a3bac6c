//! Which path is whose: one table, by method first and then by the longest prefix that fits.

use controller::{HANDLERS, Handler, Verb};
use hyper::Method;

use crate::calls::Protocol;

/// Whoever answers a path.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    /// A call.
    Call(Protocol),
    /// The page that says what this is; at its very path alone.
    Page,
    /// Something that is fetched from the pool or sent to it.
    Handler(&'static Handler),
}

/// What the gateway answers itself.
const OWN: &[(&Method, &str, Target)] = &[
    (&Method::POST, "/jsonrpc", Target::Call(Protocol::JsonRpc)),
    // Whatever else is posted anywhere is XML-RPC: that is where clients fall back to.
    (&Method::POST, "/", Target::Call(Protocol::XmlRpc)),
    (&Method::GET, "/", Target::Page),
];

/// Whoever answers this; none where nobody does.
pub(crate) fn find(method: &Method, path: &str) -> Option<Target> {
    // A head is what a page would have; handlers have none without their body.
    let asked = if *method == Method::HEAD { &Method::GET } else { method };
    let own = OWN.iter().map(|(of, prefix, target)| (*of, *prefix, *target));
    let handlers = HANDLERS.iter().map(|handler| (verb(handler), handler.path, Target::Handler(handler)));
    let fitting = own.chain(handlers).filter(|(of, prefix, _)| *of == asked && path.starts_with(prefix));
    match fitting.max_by_key(|(_, prefix, _)| prefix.len()) {
        Some((_, prefix, Target::Page)) if prefix != path => None,
        Some((_, _, Target::Handler(_))) if *method == Method::HEAD => None,
        Some((_, _, target)) => Some(target),
        None => None,
    }
}

/// Whether anybody answers this path in another way.
pub(crate) fn known(path: &str) -> bool {
    HANDLERS.iter().any(|handler| path.starts_with(handler.path)) || path == "/"
}

fn verb(handler: &Handler) -> &'static Method {
    match handler.verb {
        Verb::Get => &Method::GET,
        Verb::Put => &Method::PUT,
    }
}
