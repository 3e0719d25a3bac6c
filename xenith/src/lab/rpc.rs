//! As much of a XenAPI client as the lab needs: one JSON-RPC call over a host's Unix socket, where every caller is root.
//!
//! HTTP/1.0 asks for the plainest answer there is: no chunks, and the connection's end is the answer's end.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde_json::{Value, json};

const LARGEST_ANSWER: u64 = 64 << 20;

/// A host's socket.
pub struct Socket {
    path: PathBuf,
    limit: Duration,
}

impl Socket {
    /// Calls through this socket, each of which may take so long.
    pub fn new(path: PathBuf, limit: Duration) -> Self {
        Self { path, limit }
    }

    /// Whether something listens there.
    pub fn is_served(&self) -> bool {
        UnixStream::connect(&self.path).is_ok()
    }

    /// One call, with its session among the arguments where it takes one.
    pub fn call(&self, method: &str, params: Value) -> anyhow::Result<Value> {
        let body = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).to_string();
        let head = format!(
            "POST /jsonrpc HTTP/1.0\r\nHost: localhost\r\nUser-Agent: xenith-lab\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let mut stream = UnixStream::connect(&self.path)?;
        stream.set_read_timeout(Some(self.limit))?;
        stream.set_write_timeout(Some(self.limit))?;
        stream.write_all((head + &body).as_bytes())?;
        let mut answer = Vec::new();
        stream.take(LARGEST_ANSWER).read_to_end(&mut answer)?;
        let end = answer.windows(4).position(|window| window == b"\r\n\r\n");
        let (head, body) = answer.split_at(end.context("no HTTP answer")?);
        let status = head.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
        if status != b"200" {
            bail!("HTTP status {}", String::from_utf8_lossy(status));
        }
        let mut answer: Value = serde_json::from_slice(&body[4..])?;
        match answer.get_mut("result") {
            Some(result) => Ok(result.take()),
            None => Err(anyhow!("{}", answer["error"]["message"].as_str().unwrap_or("no result"))),
        }
    }

    /// Runs calls in one session.
    pub fn session<T>(&self, calls: impl FnOnce(&str) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let session = self.call("session.login_with_password", json!(["root", "", "1.0", "xenith-lab"]))?;
        let session = session.as_str().context("the login answered no session")?;
        let result = calls(session);
        // A session that cannot be ended now expires by itself.
        let _ = self.call("session.logout", json!([session]));
        result
    }
}

/// What a host says of its pool.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PoolView {
    /// Uuid of the pool.
    pub pool: Option<String>,
    /// Uuid of the master.
    pub master: Option<String>,
    /// Uuids of the hosts that are enabled and live.
    pub serving: Vec<String>,
}

/// Asks a host for its pool, by way of its socket.
pub fn pool_view(path: &Path, limit: Duration) -> anyhow::Result<PoolView> {
    let socket = Socket::new(path.to_owned(), limit);
    socket.session(|session| {
        let all = |class: &str| socket.call(&format!("{class}.get_all_records"), json!([session]));
        let (pools, hosts, metrics) = (all("pool")?, all("host")?, all("host_metrics")?);
        let pool = pools.as_object().and_then(|pools| pools.values().next());
        let master = pool.and_then(|pool| pool["master"].as_str());
        let uuid = |reference: &str| hosts[reference]["uuid"].as_str().map(str::to_owned);
        let serves = |host: &Value| {
            host["enabled"] == true && host["metrics"].as_str().is_some_and(|metric| metrics[metric]["live"] == true)
        };
        let serving = hosts.as_object().into_iter().flatten().filter(|(_, host)| serves(host));
        Ok(PoolView {
            pool: pool.and_then(|pool| pool["uuid"].as_str()).map(str::to_owned),
            master: master.and_then(uuid),
            serving: serving.filter_map(|(reference, _)| uuid(reference)).collect(),
        })
    })
}
