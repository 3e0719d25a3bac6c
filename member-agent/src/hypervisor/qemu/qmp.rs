//! QEMU's machine protocol: one JSON object per line, commands in turn, events in between.
//!
//! One task owns the socket. It answers commands by their id and hands events on in order. The line, the queue and
//! every wait are bounded; whatever does not fit ends the connection, and the owner connects anew and asks how the
//! domain is.

use std::collections::HashMap;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;
use std::{fs, io};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::task::TaskTracker;

const LONGEST_LINE: usize = 1 << 20;
const QUEUED_EVENTS: usize = 256;
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// A command failed.
#[derive(Debug, Error)]
pub(super) enum QmpError {
    /// QEMU understood and declined.
    #[error("{0}")]
    Refused(String),
    /// No answer in time.
    #[error("QEMU did not answer {0} in time")]
    Late(&'static str),
    /// The connection is gone.
    #[error("the connection to QEMU is closed")]
    Closed,
    /// The socket would not open.
    #[error("no connection to QEMU: {0}")]
    Io(#[from] io::Error),
}

/// Something happened in QEMU.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Event {
    /// As QEMU names it: "SHUTDOWN".
    pub name: String,
    /// What it tells.
    pub data: Value,
}

impl Event {
    /// A text from the event's data; empty when there is none.
    pub fn text(&self, key: &str) -> &str {
        self.data.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    /// A flag from the event's data.
    pub fn flag(&self, key: &str) -> bool {
        self.data.get(key).and_then(Value::as_bool).unwrap_or_default()
    }
}

/// A connection to one QEMU.
#[derive(Debug, Clone)]
pub(super) struct Qmp {
    commands: mpsc::Sender<Command>,
}

#[derive(Debug)]
struct Command {
    name: &'static str,
    arguments: Value,
    /// Goes with the command, and is QEMU's from then on.
    file: Option<OwnedFd>,
    answer: oneshot::Sender<Result<Value, QmpError>>,
}

#[derive(Debug, Deserialize)]
struct Message {
    event: Option<String>,
    #[serde(default)]
    data: Value,
    id: Option<u64>,
    #[serde(rename = "return")]
    answer: Option<Value>,
    error: Option<Refused>,
}

#[derive(Debug, Deserialize)]
struct Refused {
    desc: String,
}

impl Qmp {
    /// Connects to the socket `qmp` in `dir`, waiting for it to appear, and makes the protocol ready.
    pub async fn connect(
        dir: &Path,
        limit: Duration,
        tasks: &TaskTracker,
    ) -> Result<(Self, mpsc::Receiver<Event>), QmpError> {
        let deadline = Instant::now() + limit;
        let stream = loop {
            match connect_in(dir).await {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= deadline => return Err(error.into()),
                Err(_) => sleep(Duration::from_millis(10)).await,
            }
        };
        let (commands, mailbox) = mpsc::channel(16);
        let (events, feed) = mpsc::channel(QUEUED_EVENTS);
        let connection = Connection { stream, events, waiting: HashMap::new(), last_id: 0 };
        tasks.spawn(connection.run(mailbox));
        let qmp = Self { commands };
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(100));
        qmp.execute("qmp_capabilities", json!({}), left).await?;
        Ok((qmp, feed))
    }

    /// Runs a command and gives what it returns.
    pub async fn execute(&self, name: &'static str, arguments: Value, limit: Duration) -> Result<Value, QmpError> {
        self.execute_with(name, arguments, None, limit).await
    }

    /// Gives QEMU an open file under a name.
    pub async fn give(&self, name: &str, file: OwnedFd, limit: Duration) -> Result<(), QmpError> {
        self.execute_with("getfd", json!({ "fdname": name }), Some(file), limit).await.map(drop)
    }

    async fn execute_with(
        &self,
        name: &'static str,
        arguments: Value,
        file: Option<OwnedFd>,
        limit: Duration,
    ) -> Result<Value, QmpError> {
        let deadline = Instant::now() + limit;
        let (answer, answered) = oneshot::channel();
        let sent = timeout_at(deadline, self.commands.send(Command { name, arguments, file, answer }));
        sent.await.map_err(|_| QmpError::Late(name))?.map_err(|_| QmpError::Closed)?;
        timeout_at(deadline, answered).await.map_err(|_| QmpError::Late(name))?.map_err(|_| QmpError::Closed)?
    }

    /// The run state, in QEMU's words: "running", "paused", "shutdown"…
    pub async fn status(&self, limit: Duration) -> Result<String, QmpError> {
        let answer = self.execute("query-status", json!({}), limit).await?;
        Ok(answer.get("status").and_then(Value::as_str).unwrap_or_default().to_owned())
    }
}

/// A socket's path may have 107 bytes, and a state directory's may have more: the directory is opened first, and the
/// socket reached through it.
async fn connect_in(dir: &Path) -> io::Result<UnixStream> {
    let opened = fs::File::open(dir)?;
    UnixStream::connect(format!("/proc/self/fd/{}/qmp", opened.as_raw_fd())).await
}

struct Connection {
    stream: UnixStream,
    events: mpsc::Sender<Event>,
    waiting: HashMap<u64, oneshot::Sender<Result<Value, QmpError>>>,
    last_id: u64,
}

impl Connection {
    async fn run(mut self, mut mailbox: mpsc::Receiver<Command>) {
        let mut buffer = Vec::with_capacity(4096);
        loop {
            tokio::select! {
                read = self.stream.read_buf(&mut buffer) => match read {
                    Ok(0) | Err(_) => return,
                    Ok(_) => if self.take_lines(&mut buffer).is_err() { return },
                },
                command = mailbox.recv() => match command {
                    Some(command) => if self.send(command).await.is_err() { return },
                    None => return,
                },
            }
        }
    }

    async fn send(&mut self, command: Command) -> Result<(), QmpError> {
        self.last_id += 1;
        let id = self.last_id;
        let mut line = json!({ "execute": command.name, "arguments": command.arguments, "id": id }).to_string();
        line.push('\n');
        // Who no longer waits needs no answer.
        self.waiting.retain(|_, answer| !answer.is_closed());
        self.waiting.insert(id, command.answer);
        let write = async {
            let sent = match &command.file {
                Some(file) => self.send_file(line.as_bytes(), file).await?,
                None => 0,
            };
            self.stream.write_all(&line.as_bytes()[sent..]).await
        };
        timeout(WRITE_LIMIT, write).await.map_err(|_| QmpError::Late(command.name))??;
        Ok(())
    }

    /// Sends as much of the line as fits, and the file with it.
    async fn send_file(&self, line: &[u8], file: &OwnedFd) -> io::Result<usize> {
        let rights = [file.as_raw_fd()];
        loop {
            self.stream.writable().await?;
            let sent = self.stream.try_io(Interest::WRITABLE, || {
                let (parts, rights) = ([IoSlice::new(line)], [ControlMessage::ScmRights(&rights)]);
                sendmsg::<()>(self.stream.as_raw_fd(), &parts, &rights, MsgFlags::MSG_NOSIGNAL, None)
                    .map_err(io::Error::from)
            });
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => return sent,
            }
        }
    }

    fn take_lines(&mut self, buffer: &mut Vec<u8>) -> Result<(), QmpError> {
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            match serde_json::from_slice::<Message>(&line) {
                Ok(message) => self.take(message)?,
                Err(error) => tracing::warn!(%error, "QEMU said something that is no JSON"),
            }
        }
        if buffer.len() > LONGEST_LINE { Err(QmpError::Closed) } else { Ok(()) }
    }

    fn take(&mut self, message: Message) -> Result<(), QmpError> {
        if let Some(name) = message.event {
            // A guest that resets for ever must not fill the queue: one reset tells as much as many.
            if name == "RESET" && self.events.capacity() < QUEUED_EVENTS / 2 {
                return Ok(());
            }
            return self.events.try_send(Event { name, data: message.data }).map_err(|_| QmpError::Closed);
        }
        if let Some(answer) = message.id.and_then(|id| self.waiting.remove(&id)) {
            let outcome = match message.error {
                Some(refused) => Err(QmpError::Refused(refused.desc)),
                None => Ok(message.answer.unwrap_or_default()),
            };
            // Nobody waits any more: the time limit was faster.
            let _ = answer.send(outcome);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, BufReader};
    use tokio::net::UnixListener;

    /// Plays QEMU: greets, then answers each command with the lines that `answer` makes of it.
    fn play(dir: &Path, answer: fn(&Value) -> Vec<String>) {
        let listener = UnixListener::bind(dir.join("qmp")).expect("bind");
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.expect("accept");
            let (read, mut write) = stream.into_split();
            write.write_all(b"{\"QMP\": {\"version\": {}}}\n").await.expect("greet");
            let mut lines = BufReader::new(read).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                let command: Value = serde_json::from_str(&line).expect("command");
                for line in answer(&command) {
                    if write.write_all(line.as_bytes()).await.is_err() {
                        return;
                    }
                }
            }
        });
    }

    fn done(command: &Value) -> String {
        format!("{{\"return\": {{\"status\": \"running\"}}, \"id\": {}}}\n", command["id"])
    }

    #[tokio::test]
    async fn answers_find_their_command_and_events_keep_their_order() {
        let dir = tempfile::tempdir().expect("directory");
        play(dir.path(), |command| {
            vec!["{\"event\": \"STOP\"}\n{\"event\":".into(), " \"RESUME\", \"data\": {}}\n".into(), done(command)]
        });
        let tasks = TaskTracker::new();
        let (qmp, mut events) = Qmp::connect(dir.path(), Duration::from_secs(5), &tasks).await.expect("connect");
        assert_eq!(qmp.status(Duration::from_secs(5)).await.expect("status"), "running");
        for name in ["STOP", "RESUME", "STOP", "RESUME"] {
            assert_eq!(events.recv().await.expect("event").name, name);
        }
    }

    #[tokio::test]
    async fn a_silent_qemu_costs_no_more_than_the_limit() {
        let dir = tempfile::tempdir().expect("directory");
        play(dir.path(), |command| if command["execute"] == "qmp_capabilities" { vec![done(command)] } else { vec![] });
        let tasks = TaskTracker::new();
        let (qmp, _events) = Qmp::connect(dir.path(), Duration::from_secs(5), &tasks).await.expect("connect");
        let error = qmp.status(Duration::from_millis(50)).await.expect_err("silence");
        assert!(matches!(error, QmpError::Late("query-status")));
    }

    #[tokio::test]
    async fn a_reset_storm_does_not_push_out_the_shutdown() {
        let dir = tempfile::tempdir().expect("directory");
        play(dir.path(), |command| {
            let mut lines = vec!["{\"event\": \"RESET\", \"data\": {\"guest\": true}}\n".repeat(10_000)];
            lines.push("{\"event\": \"SHUTDOWN\", \"data\": {\"reason\": \"guest-shutdown\"}}\n".into());
            lines.push(done(command));
            lines
        });
        let tasks = TaskTracker::new();
        let (_qmp, mut events) = Qmp::connect(dir.path(), Duration::from_secs(5), &tasks).await.expect("connect");
        let mut last = events.recv().await.expect("event");
        while last.name == "RESET" {
            last = events.recv().await.expect("event");
        }
        assert_eq!((last.name.as_str(), last.text("reason")), ("SHUTDOWN", "guest-shutdown"));
    }

    #[tokio::test]
    async fn a_line_without_end_closes_the_connection() {
        let dir = tempfile::tempdir().expect("directory");
        play(dir.path(), |command| match command["execute"].as_str() {
            Some("qmp_capabilities") => vec![done(command)],
            _ => vec!["x".repeat(2 * LONGEST_LINE)],
        });
        let tasks = TaskTracker::new();
        let (qmp, _events) = Qmp::connect(dir.path(), Duration::from_secs(5), &tasks).await.expect("connect");
        assert!(matches!(qmp.status(Duration::from_secs(5)).await, Err(QmpError::Closed)));
    }
}
