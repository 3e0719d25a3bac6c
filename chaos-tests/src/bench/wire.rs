//! HTTP/1.1 with keep-alive by hand: a load generator that shares two cores with what it measures must not cost more than
//! it has to. One request on its way at a time, one buffer for what goes out and one for what comes in.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, bail};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const BUFFER: usize = 64 << 10;
/// How much of a body is kept to look at; bodies within it are kept whole.
const KEPT: usize = 32 << 10;

/// A connection to one host's `/jsonrpc`.
pub struct Wire<S = TlsStream<TcpStream>> {
    stream: S,
    head: String,
    out: Vec<u8>,
    buffer: Vec<u8>,
    /// What of the buffer is filled and not yet used: from `start` to `end`.
    start: usize,
    end: usize,
    kept: Vec<u8>,
    keep: usize,
}

/// How an answer's body is cut.
#[derive(Debug, PartialEq, Eq)]
enum Framing {
    Length(usize),
    Chunked,
}

/// An answer's body.
#[derive(Debug)]
pub struct Body<'a> {
    /// Its length in bytes.
    pub length: usize,
    /// All of it when it is short, else how it begins.
    pub first: &'a [u8],
}

impl Wire {
    /// Connects over TLS.
    pub async fn open(address: SocketAddr, tls: &Arc<ClientConfig>) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let connector = TlsConnector::from(Arc::clone(tls));
        let stream = connector.connect(ServerName::from(address.ip()), stream).await?;
        Ok(Self::over(stream, &address.to_string()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    /// A connection over this stream.
    pub fn over(stream: S, host: &str) -> Self {
        let head = format!("POST /jsonrpc HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n");
        Self { stream, head, out: Vec::new(), buffer: vec![0; BUFFER], start: 0, end: 0, kept: Vec::new(), keep: KEPT }
    }

    /// Keeps so many bytes of each body.
    #[must_use]
    pub fn keeping(self, bytes: usize) -> Self {
        Self { keep: bytes, ..self }
    }

    /// Sends one body and reads the answer to its end.
    pub async fn post(&mut self, body: &[u8]) -> anyhow::Result<Body<'_>> {
        self.out.clear();
        self.out.extend_from_slice(self.head.as_bytes());
        self.out.extend_from_slice(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
        self.out.extend_from_slice(body);
        self.stream.write_all(&self.out).await?;
        self.stream.flush().await?;

        self.kept.clear();
        let head = self.find(b"\r\n\r\n").await?;
        let framing = framing(&self.buffer[self.start..self.start + head])?;
        self.start += head + 4;
        let length = match framing {
            Framing::Length(length) => {
                self.take(length).await?;
                length
            }
            Framing::Chunked => self.chunks().await?,
        };
        Ok(Body { length, first: &self.kept })
    }

    async fn chunks(&mut self) -> anyhow::Result<usize> {
        let mut length = 0;
        loop {
            let line = self.find(b"\r\n").await?;
            let size = std::str::from_utf8(&self.buffer[self.start..self.start + line])?;
            let size = size.split(';').next().unwrap_or_default().trim();
            let size = usize::from_str_radix(size, 16).with_context(|| format!("a chunk of {size:?} bytes"))?;
            self.start += line + 2;
            self.take(size).await?;
            if self.find(b"\r\n").await? != 0 {
                bail!("a chunk is longer than it says");
            }
            self.start += 2;
            if size == 0 {
                return Ok(length);
            }
            length += size;
        }
    }

    /// Uses up so many bytes of body, and keeps the first ones.
    async fn take(&mut self, length: usize) -> anyhow::Result<()> {
        let mut missing = length;
        while missing > 0 {
            if self.start == self.end {
                self.fill().await?;
            }
            let now = missing.min(self.end - self.start);
            let kept = now.min(self.keep.saturating_sub(self.kept.len()));
            self.kept.extend_from_slice(&self.buffer[self.start..self.start + kept]);
            self.start += now;
            missing -= now;
        }
        Ok(())
    }

    /// How far it is to these bytes.
    async fn find(&mut self, wanted: &[u8]) -> anyhow::Result<usize> {
        loop {
            if let Some(position) = position(&self.buffer[self.start..self.end], wanted) {
                return Ok(position);
            }
            self.fill().await?;
        }
    }

    async fn fill(&mut self) -> anyhow::Result<()> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.end == self.buffer.len() {
            bail!("a line of the answer is too long");
        }
        match self.stream.read(&mut self.buffer[self.end..]).await? {
            0 => bail!("the connection was closed in the middle of an answer"),
            got => self.end += got,
        }
        Ok(())
    }
}

impl Body<'_> {
    /// An error unless it is a JSON-RPC 2.0 result. Keys may come in any order, but a failure is short.
    pub fn success(self) -> anyhow::Result<Self> {
        let beginning = &self.first[..self.first.len().min(64)];
        let whole_and_wrong = self.first.len() == self.length && position(self.first, b"\"error\":{").is_some();
        if position(beginning, b"\"result\":").is_some() && !whole_and_wrong {
            return Ok(self);
        }
        bail!("the pool refused: {}", String::from_utf8_lossy(&self.first[..self.first.len().min(400)]))
    }
}

fn position(text: &[u8], wanted: &[u8]) -> Option<usize> {
    text.windows(wanted.len()).position(|window| window == wanted)
}

fn framing(head: &[u8]) -> anyhow::Result<Framing> {
    let head = std::str::from_utf8(head)?;
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        bail!("the answer is {status:?}");
    }
    for line in lines {
        let Some((name, value)) = line.split_once(':') else { continue };
        if name.eq_ignore_ascii_case("content-length") {
            return Ok(Framing::Length(value.trim().parse()?));
        }
        if name.eq_ignore_ascii_case("transfer-encoding") && value.trim().eq_ignore_ascii_case("chunked") {
            return Ok(Framing::Chunked);
        }
    }
    bail!("the answer does not say where it ends")
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    /// Answers each request with the next of these, a few bytes at a time.
    async fn with_answers(answers: Vec<String>, piece: usize) -> Wire<tokio::io::DuplexStream> {
        let (ours, mut theirs) = duplex(256 << 10);
        tokio::spawn(async move {
            let mut request = vec![0; 4096];
            for answer in answers {
                if theirs.read(&mut request).await.unwrap() == 0 {
                    return;
                }
                for part in answer.as_bytes().chunks(piece) {
                    theirs.write_all(part).await.unwrap();
                    tokio::task::yield_now().await;
                }
            }
        });
        Wire::over(ours, "test")
    }

    fn sized(body: &str) -> String {
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    }

    #[tokio::test]
    async fn answers_are_read_to_their_end_however_they_are_cut() {
        let long = format!("{{\"jsonrpc\":\"2.0\",\"result\":\"{}\"}}", "x".repeat(200_000));
        let cut = long.as_bytes().chunks(70_001).map(|part| (part.len(), String::from_utf8_lossy(part)));
        let cut: String = cut.map(|(length, part)| format!("{length:X};note\r\n{part}\r\n")).collect();
        let chunked = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n{cut}0\r\n\r\n");
        let short = sized("{\"result\":1}");
        for piece in [1_000, 17, 65_536] {
            let answers = vec![sized(&long), short.clone(), chunked.clone(), short.clone(), sized("")];
            let mut wire = with_answers(answers, piece).await;
            for length in [long.len(), 12, long.len(), 12] {
                let body = wire.post(b"{}").await.unwrap().success().unwrap();
                assert_eq!((body.length, body.first.len()), (length, length.min(KEPT)));
            }
            wire.post(b"{}").await.unwrap().success().unwrap_err();
            wire.post(b"{}").await.unwrap_err();
        }
    }

    #[tokio::test]
    async fn refusals_and_other_statuses_are_errors() {
        let refusal = sized("{\"jsonrpc\":\"2.0\",\"error\":{\"code\":1,\"message\":\"HANDLE_INVALID\",\"data\":[]}}");
        let late = sized("{\"result\":null,\"id\":1,\"error\":{\"code\":1}}");
        let mut wire = with_answers(vec![refusal, late, "HTTP/1.1 500 Oops\r\n\r\n".into()], 4096).await;
        for _ in 0..2 {
            wire.post(b"{}").await.unwrap().success().unwrap_err();
        }
        wire.post(b"{}").await.unwrap_err();
    }
}
