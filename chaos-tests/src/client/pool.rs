//! A client of a whole pool: it has one session, and finds the master by itself.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::time::sleep;

use super::connection::{Connection, Endpoint};
use super::failure::CallError;

/// How long one try may take, unless said otherwise. Longer than a member waits for a master, so that its own answer is
/// seen.
const CALL_LIMIT: Duration = Duration::from_secs(15);
/// How long a connection may take to be made.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// A master may change while one is followed, but not forever.
const MOST_REDIRECTIONS: usize = 5;
/// Between two rounds over all hosts when nobody took a call.
const NEXT_ROUND: Duration = Duration::from_millis(10);

/// Who logs in.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// `root`, in a lab.
    pub user: String,
    /// As the lab printed it.
    pub password: String,
}

/// A client that knows all hosts and talks to one of them.
pub struct Client {
    endpoints: Vec<Endpoint>,
    current: usize,
    connection: Option<Connection>,
    session: Option<String>,
    credentials: Credentials,
    call_limit: Duration,
    key: Option<String>,
}

impl Client {
    /// A client that will try the first of these hosts first. It connects when it has something to say.
    pub fn new(endpoints: Vec<Endpoint>, credentials: Credentials) -> Self {
        Self { endpoints, current: 0, connection: None, session: None, credentials, call_limit: CALL_LIMIT, key: None }
    }

    /// The same, logged in, wherever that led.
    pub async fn connect(endpoints: Vec<Endpoint>, credentials: Credentials) -> Result<Self, CallError> {
        let mut client = Self::new(endpoints, credentials);
        client.login().await?;
        Ok(client)
    }

    /// How long one try of a call may take.
    pub fn with_call_limit(mut self, limit: Duration) -> Self {
        self.call_limit = limit;
        self
    }

    /// Another client with the same session, which talks to this host first.
    pub fn at(&self, endpoint: &Endpoint) -> Self {
        let mut other = Self::new(self.endpoints.clone(), self.credentials.clone()).with_call_limit(self.call_limit);
        other.session = self.session.clone();
        other.turn_to(endpoint.clone());
        other
    }

    /// Another client with the same session, which knows no other host than this one.
    pub fn only_at(&self, endpoint: &Endpoint) -> Self {
        let mut other = self.at(endpoint);
        other.endpoints = vec![endpoint.clone()];
        other.current = 0;
        other
    }

    /// The session; empty before a login.
    pub fn session(&self) -> &str {
        self.session.as_deref().unwrap_or_default()
    }

    /// Goes on in this session.
    pub fn set_session(&mut self, session: &str) {
        self.session = Some(session.to_owned());
    }

    /// Sends this `Idempotency-Key` with every call from now on.
    pub fn set_key(&mut self, key: &str) {
        self.key = Some(key.to_owned());
    }

    /// Whom it talks to now.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoints[self.current]
    }

    /// Logs in at the first host that takes it, following `HOST_IS_SLAVE`.
    pub async fn login(&mut self) -> Result<(), CallError> {
        let params =
            json!([self.credentials.user, self.credentials.password, datamodel_version(), "xenith-chaos-tests"]);
        let mut last = None;
        for _ in 0..self.endpoints.len() {
            match self.followed("session.login_with_password", &params).await {
                Ok(session) => {
                    self.session = session.as_str().map(str::to_owned);
                    return Ok(());
                }
                Err(error) => last = Some(error),
            }
            self.turn_to_next();
        }
        Err(last
            .unwrap_or_else(|| CallError::Unreached { at: "nobody".to_owned(), cause: "no host is known".to_owned() }))
    }

    /// One call in the session, at the host it talks to or, if that says so, at the master. The session goes first.
    pub async fn call(&mut self, method: &str, params: Value) -> Result<Value, CallError> {
        let params = self.in_session(params);
        self.followed(method, &params).await
    }

    /// A call that may be repeated safely: tried at every host, over and over, until somebody takes it or the limit is
    /// reached. A refusal that says more than "not here, not now" ends it at once.
    pub async fn persist(&mut self, limit: Duration, method: &str, params: Value) -> Result<Value, CallError> {
        let deadline = Instant::now() + limit;
        let params = self.in_session(params);
        loop {
            let error = match self.followed(method, &params).await {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            let transient = error.refusal().is_none_or(|failure| match failure.code.as_str() {
                "HOST_IS_SLAVE" | "HOST_IN_EMERGENCY_MODE" | "HOST_STILL_BOOTING" => true,
                // A member forwarded the call, and its master died over it.
                "INTERNAL_ERROR" => failure.params.first().is_some_and(|text| text.contains("the master was lost")),
                _ => false,
            });
            if !transient || Instant::now() >= deadline {
                return Err(error);
            }
            self.turn_to_next();
            sleep(NEXT_ROUND).await;
        }
    }

    /// One call with no session added and nobody followed.
    pub async fn plain(&mut self, method: &str, params: &Value) -> Result<Value, CallError> {
        let (limit, key) = (self.call_limit, self.key.clone());
        let connection = match self.connection.take().filter(|open| !open.is_closed()) {
            Some(open) => self.connection.insert(open),
            None => {
                let opened = Connection::open(self.endpoint(), CONNECT_LIMIT.min(limit)).await?;
                self.connection.insert(opened)
            }
        };
        let result = connection.call_with_key(method, params, key.as_deref(), limit).await;
        if matches!(result, Err(CallError::Lost { .. } | CallError::Late { .. } | CallError::Malformed { .. })) {
            self.connection = None;
        }
        result
    }

    async fn followed(&mut self, method: &str, params: &Value) -> Result<Value, CallError> {
        let mut result = self.plain(method, params).await;
        for _ in 0..MOST_REDIRECTIONS {
            let Err(CallError::Refused(failure)) = &result else { break };
            let Some(master) = (failure.code == "HOST_IS_SLAVE").then(|| failure.params.first()).flatten() else {
                break;
            };
            let Some(endpoint) = self.endpoint().at(master) else { break };
            self.turn_to(endpoint);
            result = self.plain(method, params).await;
        }
        result
    }

    fn in_session(&self, params: Value) -> Value {
        let mut all = vec![Value::from(self.session())];
        match params {
            Value::Array(params) => all.extend(params),
            Value::Null => {}
            other => all.push(other),
        }
        Value::Array(all)
    }

    fn turn_to(&mut self, endpoint: Endpoint) {
        self.connection = None;
        self.current = self.endpoints.iter().position(|known| *known == endpoint).unwrap_or_else(|| {
            self.endpoints.push(endpoint);
            self.endpoints.len() - 1
        });
    }

    /// Talks to the next host from now on.
    pub fn turn_to_next(&mut self) {
        self.connection = None;
        self.current = (self.current + 1) % self.endpoints.len();
    }
}

/// The API version this client was written for.
fn datamodel_version() -> &'static str {
    "2.21"
}
