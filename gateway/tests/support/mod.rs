//! A gateway with a stub behind it, and a client that sees every byte.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use controller::{
    Credentials, Declined, Event, EventBatch, Inquiry, Knock, Opened, Refusal, Reply, Request, Transport, Tunnel, Verb,
};
use datamodel::{ApiError, Input, Key, OpaqueRef, Value, errors};
use futures::StreamExt;
use futures::future::BoxFuture;
use gateway::{ApiCertificate, Calls, ForwardClient, Gateway, GatewayConfig, TlsFiles};
use raft_store::Member;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Longer than any answer takes: a test that waits this long has failed.
pub const PATIENCE: Duration = Duration::from_secs(30);
pub const LARGEST_BODY: usize = 200_000;

/// Answers as the controller would.
#[derive(Default)]
pub struct Stub {
    asked: AtomicUsize,
    /// Set when `waits` has been called.
    pub begun: Notify,
    /// Lets `waits` go on.
    pub go_on: Notify,
    /// Itself, for work that goes on without its caller.
    pub this: parking_lot::Mutex<Option<std::sync::Weak<Stub>>>,
    received: parking_lot::Mutex<Vec<String>>,
    uploaded: Notify,
}

impl Stub {
    /// What the next upload brought; a `!` stands for an error at its end.
    pub async fn received(&self) -> String {
        let next = async {
            loop {
                if let Some(next) = self.received.lock().pop() {
                    return next;
                }
                self.uploaded.notified().await;
            }
        };
        tokio::time::timeout(PATIENCE, next).await.expect("nothing was uploaded")
    }
}

fn value(input: Input) -> Value {
    match input {
        Input::Str(text) => Value::str(text),
        Input::Int(number) => Value::Int(number),
        Input::Float(number) => Value::Float(number),
        Input::Bool(truth) => Value::Bool(truth),
        Input::Time(text) => Value::Time(text.parse().unwrap()),
        Input::Array(items) => Value::Set(items.into_iter().map(value).collect()),
        Input::Struct(members) => {
            Value::Map(members.into_iter().map(|(name, input)| (Key::from(name.as_str()), value(input))).collect())
        }
        Input::Nil => Value::str("nil"),
    }
}

#[async_trait]
impl Calls for Stub {
    async fn replaced(&self, _: &raft_store::Member) {
        std::future::pending().await
    }

    /// A console that says back what it is told.
    async fn connect(&self, knock: Knock) -> Result<Tunnel, Declined> {
        if knock.credentials == Credentials::None {
            return Err(Declined::Unauthorized);
        }
        if !knock.query.iter().any(|(name, _)| name == "uuid") {
            return Err(Declined::Absent(errors::handle_invalid("console", "")));
        }
        let (to, typed) = tokio::sync::mpsc::channel::<bytes::Bytes>(4);
        let from = futures::stream::unfold(typed, |mut typed| async move {
            let piece = typed.recv().await?;
            Some((Ok(piece), typed))
        });
        Ok(Tunnel { from: from.boxed(), to })
    }

    async fn open(&self, inquiry: Inquiry) -> Result<Opened, Declined> {
        let has = |name: &str| inquiry.query.iter().any(|(known, _)| known == name);
        if has("elsewhere") {
            return Err(Declined::Redirect(Member {
                node_id: 2,
                peer_address: "192.0.2.7:1".into(),
                api_address: "192.0.2.7".into(),
            }));
        }
        if has("refused") {
            return Err(Declined::Refused(errors::internal_error("<so>")));
        }
        let who = match &inquiry.credentials {
            Credentials::None => return Err(Declined::Unauthorized),
            Credentials::Session(session) => format!("session:{session}"),
            Credentials::Password(user, password) => format!("password:{user}:{password}"),
        };
        if inquiry.handler.verb == Verb::Get {
            let end = has("cut").then(|| Err(std::io::Error::other("cut")));
            let body = futures::stream::iter([Ok(who.into())].into_iter().chain(end)).boxed();
            return Ok(Opened::Download { content_type: "application/octet-stream", body });
        }
        let (refuse, this) = (has("refuse"), self.this.lock().clone().unwrap());
        let mut body = inquiry.body;
        // As the controller does it: nobody has to wait for it.
        let work = tokio::spawn(async move {
            let mut text = String::new();
            while let Some(piece) = body.next().await {
                text.push_str(&piece.map_or("!".to_owned(), |piece| String::from_utf8(piece.to_vec()).unwrap()));
            }
            let this = this.upgrade().unwrap();
            this.received.lock().insert(0, text);
            this.uploaded.notify_one();
            if refuse { Err(errors::restore_target_missing_device("eth0")) } else { Ok(()) }
        });
        Ok(Opened::Upload(Box::pin(async move {
            tokio::task::yield_now().await;
            work.await.unwrap()
        })))
    }

    fn call(&self, request: Request) -> BoxFuture<'_, Result<Reply, Refusal>> {
        Box::pin(async move {
            let Request { caller, method, params } = request;
            match method.as_str() {
                "system.listMethods" => Ok(Reply::Methods(vec!["VM.start".into(), "system.listMethods".into()])),
                "echo" => Ok(Reply::Value(params.into_iter().next().map_or(Value::Void, value))),
                "all" => Ok(Reply::Value(Value::Set(params.into_iter().map(value).collect()))),
                "void" => Ok(Reply::Value(Value::Void)),
                "panic" => panic!("a defect that the test asked for"),
                "fails" => Err(Refusal::Api(ApiError::new("VM_BAD_POWER_STATE", vec!["<r>".into(), "a\"b".into()]))),
                "fails_without_parameters" => Err(Refusal::Api(ApiError::new("MESSAGE_REMOVED", Vec::new()))),
                "events" => Ok(Reply::Events(EventBatch {
                    events: vec![Event {
                        id: 7,
                        class: "vm",
                        operation: "del",
                        reference: OpaqueRef::NULL,
                        snapshot: None,
                    }],
                    valid_ref_counts: vec![("task", 0), ("vm", 2)],
                    token: "1,2".into(),
                })),
                "next" => Ok(Reply::EventList(Vec::new())),
                "settles" => match self.asked.fetch_add(1, Ordering::SeqCst) {
                    0 | 1 => Err(Refusal::Retry),
                    times => Ok(Reply::Value(Value::Int(i64::try_from(times).unwrap()))),
                },
                "elsewhere" => Err(Refusal::Forward(Member {
                    node_id: 2,
                    peer_address: "127.0.0.1:1".into(),
                    api_address: "127.0.0.1".into(),
                })),
                "begun" => Err(Refusal::Begun(Box::new(Refusal::Api(errors::host_in_emergency_mode())))),
                "waits" => {
                    self.begun.notify_one();
                    self.go_on.notified().await;
                    Ok(Reply::Value(Value::str("done")))
                }
                "caller" => Ok(Reply::Value(Value::set(vec![
                    Value::str(if caller.transport == Transport::Unix { "unix" } else { "tcp" }),
                    Value::str(caller.peer.map_or("-".to_owned(), |peer| peer.to_string())),
                    Value::str(caller.user_agent),
                    Value::str(caller.originator),
                    Value::str(caller.idempotency_key.unwrap_or_else(|| "-".into())),
                    Value::Bool(caller.forwarded),
                ]))),
                other => Err(Refusal::Api(errors::message_method_unknown(other))),
            }
        })
    }
}

/// A running gateway and its stub.
pub struct Running {
    pub gateway: Gateway,
    pub stub: Arc<Stub>,
    pub shutdown: CancellationToken,
    pub directory: tempfile::TempDir,
}

impl Running {
    /// Plain HTTP and the Unix socket.
    pub async fn plain() -> Self {
        Self::with(|config, directory| {
            config.plain = vec!["127.0.0.1:0".parse().unwrap()];
            config.socket = Some(directory.join("socket"));
        })
        .await
    }

    pub async fn with(adjust: impl FnOnce(&mut GatewayConfig, &Path)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config(directory.path());
        adjust(&mut config, directory.path());
        let (stub, shutdown) = (Arc::new(Stub::default()), CancellationToken::new());
        *stub.this.lock() = Some(Arc::downgrade(&stub));
        let calls: Arc<dyn Calls> = Arc::<Stub>::clone(&stub);
        let gateway = Gateway::start(config, calls, ForwardClient::none(), shutdown.clone()).await.unwrap();
        Self { gateway, stub, shutdown, directory }
    }

    pub async fn connect(&self) -> Wire<TcpStream> {
        Wire::new(TcpStream::connect(self.gateway.plain[0]).await.unwrap())
    }

    /// One call on a connection of its own.
    pub async fn post(&self, path: &str, body: impl AsRef<[u8]>) -> Answer {
        self.connect().await.post(path, body).await
    }

    /// Proves that the gateway serves as if nothing had happened.
    pub async fn still_serves(&self) {
        let answer = self.post("/", call("echo", "<param><value>alive</value></param>")).await;
        assert_eq!((answer.status, answer.body), (200, success("<value>alive</value>")));
    }
}

pub fn config(directory: &Path) -> GatewayConfig {
    GatewayConfig {
        tls: Vec::new(),
        plain: Vec::new(),
        socket: None,
        certificate: ApiCertificate::of(tls_files(directory)),
        largest_body: LARGEST_BODY,
        connections: 64,
    }
}

pub fn tls_files(directory: &Path) -> TlsFiles {
    TlsFiles {
        certificate: directory.join("made/certificate.pem"),
        key: directory.join("made/key.pem"),
        addresses: vec!["127.0.0.1".parse().unwrap()],
        hostname: "localhost".into(),
    }
}

/// An HTTP answer.
#[derive(Debug)]
pub struct Answer {
    pub version: String,
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// A connection as bytes.
pub struct Wire<S> {
    pub stream: S,
    buffer: Vec<u8>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    pub fn new(stream: S) -> Self {
        Self { stream, buffer: Vec::new() }
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    pub async fn post(&mut self, path: &str, body: impl AsRef<[u8]>) -> Answer {
        let body = body.as_ref();
        self.send(format!("POST {path} HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n", body.len())).await;
        self.send(body).await;
        self.answer().await
    }

    async fn more(&mut self) -> usize {
        let read = tokio::time::timeout(PATIENCE, self.stream.read_buf(&mut self.buffer)).await;
        read.expect("the server is silent").unwrap()
    }

    /// The next answer; its length must be stated.
    pub async fn answer(&mut self) -> Answer {
        let end = loop {
            if let Some(at) = self.buffer.windows(4).position(|four| four == b"\r\n\r\n") {
                break at;
            }
            assert_ne!(self.more().await, 0, "the connection ended inside the head");
        };
        let head = String::from_utf8(self.buffer.drain(..end + 4).collect()).unwrap();
        let mut lines = head.trim_end().split("\r\n");
        let (version, status) = lines.next().unwrap().split_once(' ').unwrap();
        let headers: Vec<(String, String)> = lines
            .map(|line| line.split_once(": ").unwrap())
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let mut answer =
            Answer { version: version.to_owned(), status: status[..3].parse().unwrap(), headers, body: String::new() };
        let length: usize = answer.header("content-length").expect("a stated length").parse().unwrap();
        while self.buffer.len() < length {
            assert_ne!(self.more().await, 0, "the connection ended inside the body");
        }
        answer.body = String::from_utf8(self.buffer.drain(..length).collect()).unwrap();
        answer
    }

    /// Whether the server has ended the connection, with nothing left unread.
    pub async fn ends(&mut self) -> bool {
        self.buffer.is_empty() && self.more().await == 0
    }
}

/// An XML-RPC call.
pub fn call(method: &str, params: &str) -> String {
    format!(
        "<?xml version=\"1.0\"?><methodCall><methodName>{method}</methodName><params>{params}</params></methodCall>"
    )
}

/// What stands around each XML-RPC answer.
pub fn response(value: &str) -> String {
    format!("<?xml version=\"1.0\"?><methodResponse><params><param>{value}</param></params></methodResponse>")
}

pub fn success(value: &str) -> String {
    response(&format!(
        "<value><struct><member><name>Status</name><value>Success</value></member>\
         <member><name>Value</name>{value}</member></struct></value>"
    ))
}

pub fn failure(words: &[&str]) -> String {
    let words: String = words.iter().map(|word| format!("<value>{word}</value>")).collect();
    response(&format!(
        "<value><struct><member><name>Status</name><value>Failure</value></member>\
         <member><name>ErrorDescription</name><value><array><data>{words}</data></array></value></member></struct></value>"
    ))
}
