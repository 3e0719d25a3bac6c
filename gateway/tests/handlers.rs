//! Transfers on real sockets: what old and new clients send, byte by byte.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use support::{Running, Wire};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

const DUMP: &str = "/pool/xmldbdump";

/// Everything up to the end of the connection.
async fn rest(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
    let mut out = String::new();
    tokio::time::timeout(support::PATIENCE, stream.read_to_string(&mut out)).await.unwrap().unwrap();
    out
}

/// Reads until that is there.
async fn until(stream: &mut TcpStream, what: &str) -> String {
    let mut out = Vec::new();
    while !String::from_utf8_lossy(&out).contains(what) {
        let read = tokio::time::timeout(support::PATIENCE, stream.read_buf(&mut out)).await.unwrap().unwrap();
        assert_ne!(read, 0, "{}", String::from_utf8_lossy(&out));
    }
    String::from_utf8(out).unwrap()
}

#[tokio::test]
async fn a_put_is_answered_before_its_body_is_sent() {
    let running = Running::plain().await;
    for version in ["1.0", "1.1"] {
        let mut stream = TcpStream::connect(running.gateway.plain[0]).await.unwrap();
        let head = format!("PUT {DUMP}?session_id=s HTTP/{version}\r\nHost: h\r\nContent-Length: 5\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let answer = until(&mut stream, "\r\n\r\n").await;
        assert!(answer.starts_with(&format!("HTTP/{version} 200")), "{answer}");
        assert!(!answer.contains("content-length"), "{answer}");
        stream.write_all(b"12345").await.unwrap();
        assert_eq!(running.stub.received().await, "12345");
    }
}

#[tokio::test]
async fn a_put_of_1_0_without_a_length_ends_with_the_connection() {
    let running = Running::plain().await;
    let mut stream = TcpStream::connect(running.gateway.plain[0]).await.unwrap();
    // In pieces, so that the head is not there at once.
    for piece in ["P", "UT /pool/xml", "dbdump?session_id=s HTTP/1.0\r\nHo", "st: h\r\n\r\n"] {
        stream.write_all(piece.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        tokio::task::yield_now().await;
    }
    let answer = until(&mut stream, "\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
    let sent = "x".repeat(300_000);
    stream.write_all(sent.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(running.stub.received().await, sent);
    assert_eq!(rest(&mut stream).await, "");

    // One that begins with its head, and one that is refused.
    let mut stream = TcpStream::connect(running.gateway.plain[0]).await.unwrap();
    stream.write_all(format!("PUT {DUMP}?session_id=s&refuse HTTP/1.0\r\n\r\nbody").as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let answer = rest(&mut stream).await;
    assert!(
        answer.starts_with("HTTP/1.0 200 OK\r\n") && answer.ends_with("RESTORE_TARGET_MISSING_DEVICE(eth0)\n"),
        "{answer}"
    );
    let mut stream = TcpStream::connect(running.gateway.plain[0]).await.unwrap();
    stream.write_all(b"PUT /nowhere HTTP/1.0\r\n\r\nbody").await.unwrap();
    stream.shutdown().await.unwrap();
    assert!(rest(&mut stream).await.starts_with("HTTP/1.0 404 Not Found\r\n"));
    let mut stream = TcpStream::connect(running.gateway.plain[0]).await.unwrap();
    stream.write_all(format!("PUT {DUMP} HTTP/1.0\r\n\r\nbody").as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    assert!(rest(&mut stream).await.starts_with("HTTP/1.0 401 Unauthorized\r\n"));
    running.still_serves().await;
}

#[tokio::test]
async fn a_client_that_waits_to_be_told_to_go_on_is_told() {
    let running = Running::plain().await;
    let mut stream = TcpStream::connect(running.gateway.plain[0]).await.unwrap();
    let head = format!(
        "PUT {DUMP}?session_id=s HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    assert_eq!(until(&mut stream, "\r\n\r\n").await, "HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"12345").await.unwrap();
    let answer = rest(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert_eq!(running.stub.received().await, "12345");
}

#[tokio::test]
async fn a_length_that_nobody_means_ends_with_the_connection_and_another_one_must_be_kept() {
    let running = Running::plain().await;
    for (length, received) in [(1_u64 << 50, "12345"), (6, "12345!")] {
        let mut stream = TcpStream::connect(running.gateway.plain[0]).await.unwrap();
        let head = format!("PUT {DUMP}?session_id=s HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        until(&mut stream, "\r\n\r\n").await;
        stream.write_all(b"12345").await.unwrap();
        drop(stream);
        assert_eq!(running.stub.received().await, received, "{length}");
    }
}

#[tokio::test]
async fn a_probe_without_a_body_is_answered_and_a_refusal_stands_in_the_answer() {
    let running = Running::plain().await;
    let mut wire = running.connect().await;
    wire.send(format!("PUT {DUMP}?session_id=s HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"))
        .await;
    let answer = rest(&mut wire.stream).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert_eq!(running.stub.received().await, "");
    let mut wire = running.connect().await;
    let head = format!(
        "PUT {DUMP}?session_id=s&refuse=true HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nConnection: close\r\n\r\n!"
    );
    wire.send(head).await;
    let answer = rest(&mut wire.stream).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert!(answer.contains("\r\nRESTORE_TARGET_MISSING_DEVICE(eth0)\n\r\n"), "{answer}");
}

#[tokio::test]
async fn a_download_is_streamed_and_never_chunked_for_1_0() {
    let running = Running::plain().await;
    let mut stream = TcpStream::connect(running.gateway.plain[0]).await.unwrap();
    stream.write_all(format!("GET {DUMP}?session_id=s HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
    let answer = rest(&mut stream).await.to_ascii_lowercase();
    assert!(answer.starts_with("http/1.0 200 ok\r\n") && !answer.contains("chunked"), "{answer}");
    assert!(answer.ends_with("\r\n\r\nsession:s"), "{answer}");
    // One that is cut off does not end as if it were whole.
    let mut stream = TcpStream::connect(running.gateway.plain[0]).await.unwrap();
    stream.write_all(format!("GET {DUMP}?session_id=s&cut=true HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(support::PATIENCE, stream.read_to_end(&mut answer)).await.unwrap();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    // Where it is cut before anything was flushed, not even the head is there.
    assert!(!answer.ends_with("\r\n0\r\n\r\n"), "{answer}");
}

#[tokio::test]
async fn a_session_comes_in_the_query_in_a_cookie_or_as_a_password() {
    let running = Running::plain().await;
    for (query, header, credentials) in [
        ("?session_id=OpaqueRef%3Aa", "", "session:OpaqueRef:a"),
        ("", "Cookie: a=b; session_id=OpaqueRef:c\r\n", "session:OpaqueRef:c"),
        ("", "Authorization: Basic cm9vdDpwYXNz\r\n", "password:root:pass"),
    ] {
        let mut stream = TcpStream::connect(running.gateway.plain[0]).await.unwrap();
        stream.write_all(format!("GET {DUMP}{query} HTTP/1.0\r\n{header}\r\n").as_bytes()).await.unwrap();
        let answer = rest(&mut stream).await;
        assert!(answer.ends_with(credentials), "{answer}");
    }
    let mut wire = running.connect().await;
    wire.send(format!("GET {DUMP} HTTP/1.1\r\nHost: h\r\n\r\n")).await;
    let answer = wire.answer().await;
    assert_eq!((answer.status, answer.header("www-authenticate")), (401, Some("Basic realm=\"XenAPI\"")));
}

#[tokio::test]
async fn a_redirect_is_absolute_and_keeps_way_port_and_query() {
    let running = Running::plain().await;
    let port = running.gateway.plain[0].port();
    for (version, host, location) in [
        ("1.1", "Host: pool.example:8080\r\n", format!("http://192.0.2.7:8080{DUMP}?session_id=s&elsewhere=true")),
        ("1.1", "Host: pool.example\r\n", format!("http://192.0.2.7{DUMP}?session_id=s&elsewhere=true")),
        ("1.1", "Host: [::1]:81\r\n", format!("http://192.0.2.7:81{DUMP}?session_id=s&elsewhere=true")),
        ("1.0", "", format!("http://192.0.2.7:{port}{DUMP}?session_id=s&elsewhere=true")),
    ] {
        for method in ["GET", "PUT"] {
            let mut wire = running.connect().await;
            let length = if method == "PUT" { "Content-Length: 0\r\n" } else { "" };
            wire.send(format!("{method} {DUMP}?session_id=s&elsewhere=true HTTP/{version}\r\n{host}{length}\r\n"))
                .await;
            let answer = wire.answer().await;
            assert_eq!((answer.status, answer.header("location")), (302, Some(location.as_str())));
        }
    }
    let stream = UnixStream::connect(running.directory.path().join("socket")).await.unwrap();
    let mut wire = Wire::new(stream);
    wire.send(format!("GET {DUMP}?elsewhere=true HTTP/1.1\r\nHost: h\r\n\r\n")).await;
    let answer = wire.answer().await;
    let location = format!("https://192.0.2.7{DUMP}?elsewhere=true");
    assert_eq!((answer.status, answer.header("location")), (302, Some(location.as_str())));
}

#[tokio::test]
async fn paths_are_matched_by_method_and_by_their_longest_beginning() {
    let running = Running::plain().await;
    for (request, status) in [
        ("GET / HTTP/1.1", 200),
        ("HEAD / HTTP/1.1", 200),
        ("GET /services HTTP/1.1", 404),
        ("GET /pool HTTP/1.1", 404),
        ("GET /pool/xmldbdump/?session_id=s&refused=true HTTP/1.1", 500),
        ("DELETE /pool/xmldbdump HTTP/1.1", 405),
        ("HEAD /pool/xmldbdump HTTP/1.1", 405),
    ] {
        let mut stream = TcpStream::connect(running.gateway.plain[0]).await.unwrap();
        stream.write_all(format!("{request}\r\nHost: h\r\nConnection: close\r\n\r\n").as_bytes()).await.unwrap();
        let answer = rest(&mut stream).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {answer}");
        assert_eq!(answer.ends_with("\r\n\r\n"), request.starts_with("HEAD"), "{request}: {answer}");
    }
}

#[tokio::test]
async fn a_console_is_connected_to_and_then_belongs_to_its_client() {
    let running = Running::plain().await;
    let mut stream = TcpStream::connect(running.gateway.plain[0]).await.unwrap();
    // As old clients ask: the target is a path, the session a cookie, and the first bytes may come with the head.
    let head = "CONNECT /console?uuid=1 HTTP/1.0\r\nCookie: session_id=s\r\n\r\nRFB 003.008\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let answer = until(&mut stream, "RFB 003.008\n").await;
    assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
    stream.write_all(b"more").await.unwrap();
    assert_eq!(until(&mut stream, "more").await, "more");
    stream.shutdown().await.unwrap();
    assert_eq!(rest(&mut stream).await, "");
}

#[tokio::test]
async fn a_console_that_is_not_there_or_not_for_the_caller_is_refused_by_its_status() {
    let running = Running::plain().await;
    for (target, cookie, status) in [
        ("/console?uuid=1", "", "401"),
        ("/console", "Cookie: session_id=s\r\n", "404"),
        ("/elsewhere?uuid=1", "Cookie: session_id=s\r\n", "404"),
    ] {
        let mut stream = TcpStream::connect(running.gateway.plain[0]).await.unwrap();
        stream.write_all(format!("CONNECT {target} HTTP/1.1\r\n{cookie}\r\n").as_bytes()).await.unwrap();
        let answer = rest(&mut stream).await;
        assert!(answer.starts_with(&format!("HTTP/1.0 {status} ")), "{target}: {answer}");
    }
}
