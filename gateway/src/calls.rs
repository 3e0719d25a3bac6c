//! What the gateway needs of whoever answers, and how an answer becomes a body.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use controller::{Caller, Controller, Declined, Inquiry, Knock, OWN_KEY, Opened, Refusal, Reply, Request, Tunnel};
use datamodel::{ApiError, encode, errors, model};
use futures::FutureExt;
use futures::future::BoxFuture;
use raft_store::Member;
use tracing::Instrument;

use crate::body::Body;
use crate::forward::{ForwardClient, LONGEST, Lost};
use crate::{jsonrpc, xmlrpc};

/// A call that cannot be sent on waits this long for a master that can be reached.
const PATIENCE: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(25);
/// A master that has just been replaced may still answer what it did before.
const LAST_WORD: Duration = Duration::from_millis(250);

/// What a caller is told whose call may have been done.
const LOST: &str = "the master was lost during the call: it was done wholly or not at all; look before repeating it";

/// What a member answers that is not the master.
const NOT_HERE: [&str; 2] = [errors::HOST_IS_SLAVE, errors::HOST_IN_EMERGENCY_MODE];

/// Who answers calls.
#[async_trait]
pub trait Calls: Send + Sync + 'static {
    /// Answers a call, or says who can.
    fn call(&self, request: Request) -> BoxFuture<'_, Result<Reply, Refusal>>;

    /// Serves a request of a handler, or says who can.
    async fn open(&self, inquiry: Inquiry) -> Result<Opened, Declined>;

    /// Opens a console. Any host does, whoever is the master.
    async fn connect(&self, knock: Knock) -> Result<Tunnel, Declined>;

    /// Waits until another than that member is the master.
    async fn replaced(&self, member: &Member);
}

#[async_trait]
impl Calls for Controller {
    fn call(&self, request: Request) -> BoxFuture<'_, Result<Reply, Refusal>> {
        Self::call(self, request)
    }

    async fn open(&self, inquiry: Inquiry) -> Result<Opened, Declined> {
        Self::open(self, inquiry).await
    }

    async fn connect(&self, knock: Knock) -> Result<Tunnel, Declined> {
        Self::connect(self, knock).await
    }

    async fn replaced(&self, member: &Member) {
        Self::replaced(self, member).await;
    }
}

/// How a body is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    XmlRpc,
    JsonRpc,
}

/// A whole answer, ready for HTTP.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) content_type: String,
    pub(crate) body: Body,
}

impl Answer {
    pub(crate) fn malformed(reason: &str) -> Self {
        let mut text = b"<html><body><h1>HTTP 500 internal server error</h1>".to_vec();
        encode::xml_text(reason, &mut text);
        text.extend_from_slice(b"</body></html>");
        Self { status: 500, content_type: "text/html".into(), body: Bytes::from(text).into() }
    }

    fn not_here(begun: bool) -> Self {
        let status = if begun { BEGUN } else { MISDIRECTED };
        Self { status, content_type: String::new(), body: Body::default() }
    }
}

/// The status by which a member says to another that it is not the master.
pub(crate) const MISDIRECTED: u16 = 421;
/// The same, of a call that it may have done while it was.
pub(crate) const BEGUN: u16 = 409;

/// What it takes to answer a body.
pub(crate) struct Server {
    pub(crate) calls: Arc<dyn Calls>,
    pub(crate) forward: ForwardClient,
}

/// A call and its protocol's envelope.
pub(crate) enum Decoded {
    Call {
        method: String,
        params: Vec<datamodel::Input>,
        envelope: Envelope,
    },
    /// To be answered at once, without a call.
    Refused(ApiError, Envelope),
}

#[derive(Debug, Clone)]
pub(crate) enum Envelope {
    Xml,
    Json1(jsonrpc::Id),
    Json2(jsonrpc::Id),
}

impl Server {
    /// Answers a body, here or at the member that can.
    pub(crate) async fn answer(&self, protocol: Protocol, body: Bytes, mut caller: Caller) -> Answer {
        // While the lead moves, members name a master that is gone already: looking again is safe as long as the
        // call was not sent.
        let start = tokio::time::Instant::now();
        let mut deadline = start + PATIENCE;
        // What an earlier try of a change may have done; nobody may be told afterwards that nothing was.
        let mut open = false;
        loop {
            let begun = tokio::time::Instant::now();
            if begun >= deadline || start.elapsed() >= LONGEST {
                break;
            }
            let decoded = match protocol {
                Protocol::XmlRpc => xmlrpc::decode(&body),
                Protocol::JsonRpc => jsonrpc::decode(&body),
            };
            let (method, params, envelope) = match decoded {
                Ok(Decoded::Call { method, params, envelope }) => (method, params, envelope),
                Ok(Decoded::Refused(error, envelope)) => return fail(&envelope, &error),
                Err(reason) => {
                    tracing::debug!(reason, peer = ?caller.peer, "malformed body");
                    return Answer::malformed(&reason);
                }
            };
            let effect = Effect::of(&method);
            if effect == Effect::Long {
                recognise(&mut caller);
            }
            let span = tracing::info_span!("call", message = %method, peer = ?caller.peer);
            let request = Request { caller: caller.clone(), method, params };
            let call = AssertUnwindSafe(self.calls.call(request).instrument(span)).catch_unwind();
            let outcome = match call.await {
                Ok(Err(Refusal::Begun(refusal))) => {
                    open = true;
                    Ok(Err(*refusal))
                }
                outcome => outcome,
            };
            match outcome {
                Ok(Ok(reply)) => return succeed(&envelope, reply),
                // Another member took this host for the master: it looks again, and its client never knows.
                Ok(Err(Refusal::Api(error))) if caller.forwarded && NOT_HERE.contains(&error.code) => {
                    return Answer::not_here(open);
                }
                Ok(Err(Refusal::Api(error))) if open && error.code == errors::HOST_IN_EMERGENCY_MODE => {
                    return fail(&envelope, &errors::internal_error(LOST));
                }
                Ok(Err(Refusal::Api(error))) => return fail(&envelope, &error),
                Ok(Err(Refusal::Forward(member))) => {
                    if effect == Effect::Short {
                        recognise(&mut caller);
                    }
                    match self.send(&member, protocol, body.clone(), &caller).await {
                        Ok(answer) => return answer,
                        Err(Lost::NotSent(reason)) => {
                            tracing::debug!(
                                member = member.node_id,
                                reason,
                                "the master is not reached; looking again"
                            );
                            tokio::time::sleep(LOOK_AGAIN).await;
                        }
                        // A read, or a call that the next master knows again.
                        Err(Lost::Unknown(reason)) if effect != Effect::Unknowable => {
                            tracing::debug!(member = member.node_id, reason, "an answer was lost; asking again");
                            open |= effect != Effect::None;
                            tokio::time::sleep(LOOK_AGAIN).await;
                        }
                        Err(Lost::Unknown(reason)) => {
                            tracing::warn!(member = member.node_id, reason, "the master's answer is lost");
                            return fail(&envelope, &errors::internal_error(LOST));
                        }
                    }
                }
                Ok(Err(Refusal::Retry | Refusal::Begun(_))) => tokio::time::sleep(LOOK_AGAIN).await,
                Err(_) => {
                    tracing::error!("a call panicked");
                    return fail(&envelope, &errors::internal_error("a defect of the server; its log says more"));
                }
            }
            // A call that waited long, as `event.from` does, and then lost its master has not been impatient.
            if begun.elapsed() >= PATIENCE {
                deadline = tokio::time::Instant::now() + PATIENCE;
            }
        }
        let error = if open { errors::internal_error(LOST) } else { errors::host_in_emergency_mode() };
        match protocol {
            Protocol::XmlRpc => fail(&Envelope::Xml, &error),
            Protocol::JsonRpc => match jsonrpc::decode(&body) {
                Ok(Decoded::Call { envelope, .. } | Decoded::Refused(_, envelope)) => fail(&envelope, &error),
                Err(reason) => Answer::malformed(&reason),
            },
        }
    }
}

impl Server {
    /// Sends a call on. A master that is stopped, or that went without a word, does not hold the caller longer than
    /// until there is another one.
    async fn send(&self, member: &Member, protocol: Protocol, body: Bytes, caller: &Caller) -> Result<Answer, Lost> {
        let replaced = async {
            self.calls.replaced(member).await;
            // It may be about to answer.
            tokio::time::sleep(LAST_WORD).await;
        };
        tokio::select! {
            answer = self.forward.send(member, protocol, body, caller) => answer,
            () = replaced => Err(Lost::Unknown("another host is the master now".into())),
        }
    }
}

/// What asking twice would do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    /// Nothing: it reads.
    None,
    /// One transaction. Whoever commits it is told what became of it, so that it needs a key only to be sent on.
    Short,
    /// More than that, and a master may be lost in the middle of it: it is always given a key.
    Long,
    /// It has no session under which it could be known again.
    Unknowable,
}

impl Effect {
    fn of(method: &str) -> Self {
        let plain = method.strip_prefix("Async.").or_else(|| method.strip_prefix("InternalAsync."));
        let Some(message) = model().message(plain.unwrap_or(method)) else { return Self::Unknowable };
        let class = message.class.def().name;
        if plain.is_none()
            && (message.full_name == "event.from" || (message.name.starts_with("get_") && message.takes_session))
        {
            return Self::None;
        }
        if !message.takes_session || class == "session" || class == "event" {
            return Self::Unknowable;
        }
        if plain.is_none() && message.implicit.is_some() { Self::Short } else { Self::Long }
    }
}

/// Gives a call a key, if its client did not: asked again, it is known again.
fn recognise(caller: &mut Caller) {
    if caller.idempotency_key.is_none() {
        caller.idempotency_key = Some(format!("{OWN_KEY}{}", uuid::Uuid::new_v4().simple()));
    }
}

fn answer(envelope: &Envelope, body: Body) -> Answer {
    let content_type = if matches!(envelope, Envelope::Xml) { "text/xml" } else { "application/json" };
    Answer { status: 200, content_type: content_type.into(), body }
}

fn fail(envelope: &Envelope, error: &ApiError) -> Answer {
    let mut body = Body::default();
    match envelope {
        Envelope::Xml => xmlrpc::failure(error, body.text()),
        Envelope::Json1(id) => jsonrpc::failure_1(error, id, body.text()),
        Envelope::Json2(id) => jsonrpc::failure_2(error, id, body.text()),
    }
    answer(envelope, body)
}

fn succeed(envelope: &Envelope, reply: Reply) -> Answer {
    let mut body = Body::default();
    match envelope {
        Envelope::Xml => {
            let bare = matches!(reply, Reply::Methods(_));
            xmlrpc::success_head(bare, body.text());
            body.xml(reply);
            xmlrpc::success_tail(bare, body.text());
        }
        Envelope::Json1(id) => {
            body.text().extend_from_slice(b"{\"result\":");
            body.json(reply);
            body.text().extend_from_slice(b",\"error\":null,\"id\":");
            id.write_to(body.text());
            body.text().push(b'}');
        }
        Envelope::Json2(id) => {
            body.text().extend_from_slice(b"{\"jsonrpc\":\"2.0\",\"result\":");
            body.json(reply);
            body.text().extend_from_slice(b",\"id\":");
            id.write_to(body.text());
            body.text().push(b'}');
        }
    }
    answer(envelope, body)
}
