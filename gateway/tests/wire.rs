//! The bytes on the wire: every answer exactly as the published clients read it, and a server that no body can end.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use gateway::{Calls, ForwardClient, Gateway};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ProtocolVersion, RootCertStore, SignatureScheme, SupportedProtocolVersion};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use support::{LARGEST_BODY, PATIENCE, Running, Stub, Wire, call, failure, response, success};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

const MALFORMED: &str = "<html><body><h1>HTTP 500 internal server error</h1>";

#[tokio::test]
async fn an_xml_success_states_status_first() {
    let running = Running::plain().await;
    let answer = running.post("/", call("echo", "<param><value>a &lt; b</value></param>")).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.body, success("<value>a &lt; b</value>"));
    assert_eq!(answer.header("content-type"), Some("text/xml"));
    assert_eq!(answer.header("access-control-allow-origin"), Some("*"));
    assert_eq!(answer.header("cache-control"), Some("no-cache, no-store"));
}

#[tokio::test]
async fn an_xml_failure_describes_the_error_escaped() {
    let running = Running::plain().await;
    let answer = running.post("/", call("fails", "")).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.body, failure(&["VM_BAD_POWER_STATE", "&lt;r&gt;", "a&quot;b"]));
    assert_eq!(answer.header("content-type"), Some("text/xml"));
    let answer = running.post("/", call("fails_without_parameters", "")).await;
    assert_eq!(answer.body, failure(&["MESSAGE_REMOVED"]));
}

#[tokio::test]
async fn who_may_have_been_served_is_not_told_that_nothing_was_done() {
    let running = Running::plain().await;
    let answer = running.post("/", call("begun", "")).await;
    assert!(answer.body.contains("INTERNAL_ERROR") && answer.body.contains("look before repeating"), "{}", answer.body);
}

#[tokio::test]
async fn an_unknown_method_is_named() {
    let running = Running::plain().await;
    let answer = running.post("/", call("VM.fly", "")).await;
    assert_eq!(answer.body, failure(&["MESSAGE_METHOD_UNKNOWN", "VM.fly"]));
}

#[tokio::test]
async fn the_list_of_methods_is_a_bare_array_in_xml_only() {
    let running = Running::plain().await;
    let answer = running.post("/", call("system.listMethods", "")).await;
    let names = "<value><array><data><value>VM.start</value><value>system.listMethods</value></data></array></value>";
    assert_eq!(answer.body, response(names));
    let answer = running.post("/jsonrpc", r#"{"method":"system.listMethods","params":[],"id":1}"#).await;
    assert_eq!(answer.body, r#"{"result":["VM.start","system.listMethods"],"error":null,"id":1}"#);
}

#[tokio::test]
async fn void_is_the_empty_string() {
    let running = Running::plain().await;
    assert_eq!(running.post("/", call("void", "")).await.body, success("<value></value>"));
    let answer = running.post("/jsonrpc", r#"{"jsonrpc":"2.0","method":"void","id":1}"#).await;
    assert_eq!(answer.body, r#"{"jsonrpc":"2.0","result":"","id":1}"#);
}

#[tokio::test]
async fn events_travel_with_typed_counts_and_without_a_snapshot_of_the_destroyed() {
    let running = Running::plain().await;
    let member = |name: &str, value: &str| format!("<member><name>{name}</name><value>{value}</value></member>");
    let event: String = [("id", "7"), ("timestamp", "0.0"), ("class", "vm"), ("operation", "del")]
        .iter()
        .map(|(name, value)| member(name, value))
        .chain([member("ref", "OpaqueRef:NULL")])
        .collect();
    let batch = format!(
        "<value><struct>{}{}{}</struct></value>",
        member("events", &format!("<array><data><value><struct>{event}</struct></value></data></array>")),
        member(
            "valid_ref_counts",
            &format!("<struct>{}{}</struct>", member("task", "<i4>0</i4>"), member("vm", "<i4>2</i4>"))
        ),
        member("token", "1,2")
    );
    assert_eq!(running.post("/", call("events", "")).await.body, success(&batch));
    let answer = running.post("/jsonrpc", r#"{"jsonrpc":"2.0","method":"events","id":1}"#).await;
    let events = r#"[{"id":"7","timestamp":"0.0","class":"vm","operation":"del","ref":"OpaqueRef:NULL"}]"#;
    let counts = r#"{"task":0,"vm":2}"#;
    let result = format!(r#"{{"events":{events},"valid_ref_counts":{counts},"token":"1,2"}}"#);
    assert_eq!(answer.body, format!(r#"{{"jsonrpc":"2.0","result":{result},"id":1}}"#));
    assert_eq!(running.post("/", call("next", "")).await.body, success("<value><array><data></data></array></value>"));
}

#[tokio::test]
async fn json_1_states_that_there_is_no_error() {
    let running = Running::plain().await;
    let answer = running.post("/jsonrpc", r#"{"method":"echo","params":[true],"id":"x"}"#).await;
    assert_eq!((answer.status, answer.body.as_str()), (200, r#"{"result":true,"error":null,"id":"x"}"#));
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let answer = running.post("/jsonrpc", r#"{"method":"fails","params":[],"id":3}"#).await;
    assert_eq!(answer.body, r#"{"result":null,"error":["VM_BAD_POWER_STATE","<r>","a\"b"],"id":3}"#);
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/json")));
}

#[tokio::test]
async fn json_2_has_an_error_only_where_there_is_one() {
    let running = Running::plain().await;
    let answer = running.post("/jsonrpc", r#"{"jsonrpc":"2.0","method":"echo","params":[1.0,2],"id":0}"#).await;
    assert_eq!((answer.status, answer.body.as_str()), (200, r#"{"jsonrpc":"2.0","result":1.0,"id":0}"#));
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let answer = running.post("/jsonrpc", r#"{"jsonrpc":"2.0","method":"fails","params":[],"id":0}"#).await;
    let error = r#"{"code":1,"message":"VM_BAD_POWER_STATE","data":["<r>","a\"b"]}"#;
    assert_eq!(answer.body, format!(r#"{{"jsonrpc":"2.0","error":{error},"id":0}}"#));
    let answer = running.post("/jsonrpc", r#"{"jsonrpc":"2.0","method":"fails_without_parameters","id":0}"#).await;
    let error = r#"{"code":1,"message":"MESSAGE_REMOVED","data":[]}"#;
    assert_eq!(answer.body, format!(r#"{{"jsonrpc":"2.0","error":{error},"id":0}}"#));
}

#[tokio::test]
async fn json_params_may_be_absent_null_or_an_object_in_2_and_must_be_an_array_in_1() {
    let running = Running::plain().await;
    for (params, result) in
        [("", "[]"), (r#","params":null"#, "[]"), (r#","params":{"a":1}"#, r#"[{"a":1}]"#), (r#","params":[5]"#, "[5]")]
    {
        let answer = running.post("/jsonrpc", format!(r#"{{"jsonrpc":"2.0","method":"all"{params},"id":1}}"#)).await;
        assert_eq!(answer.body, format!(r#"{{"jsonrpc":"2.0","result":{result},"id":1}}"#));
        let answer = running.post("/jsonrpc", format!(r#"{{"method":"all"{params},"id":1}}"#)).await;
        assert_eq!(answer.status, if params.ends_with(']') { 200 } else { 500 }, "{params}");
    }
}

#[tokio::test]
async fn a_json_id_comes_back_as_it_was_sent() {
    let running = Running::plain().await;
    for id in ["0", "-1", "9223372036854775807", r#""""#, r#""a\"b""#, r#""7""#, r#""ü""#] {
        for (head, tail) in [(r#"{"jsonrpc":"2.0","#, ""), ("{", r#","error":null"#)] {
            let answer = running.post("/jsonrpc", format!(r#"{head}"method":"echo","params":["v"],"id":{id}}}"#)).await;
            assert_eq!(answer.body, format!(r#"{head}"result":"v"{tail},"id":{id}}}"#));
        }
    }
}

/// HTTP 500 with the reason in HTML, the connection closed, the next client served.
async fn is_malformed(running: &Running, path: &str, body: impl AsRef<[u8]>, reason: &str) {
    let mut wire = running.connect().await;
    let answer = wire.post(path, body).await;
    assert_eq!(answer.status, 500, "{reason}: {}", answer.body);
    assert!(answer.body.starts_with(MALFORMED) && answer.body.contains(reason), "{reason}: {}", answer.body);
    assert_eq!(answer.header("content-type"), Some("text/html"));
    assert_eq!(answer.header("connection"), Some("close"));
    assert!(wire.ends().await, "{reason}: the connection stays");
    running.still_serves().await;
}

#[tokio::test]
async fn what_is_no_json_call_is_http_500() {
    let running = Running::plain().await;
    let deep = format!(r#"{{"method":"echo","params":{}{},"id":1}}"#, "[".repeat(10_000), "]".repeat(10_000));
    for (body, reason) in [
        (r#"{"jsonrpc":"2.0","method":"void"}"#, "a call has an id"),
        (r#"{"jsonrpc":"2.0","method":"void","id":null}"#, "a call has an id"),
        (r#"{"jsonrpc":"2.0","method":"void","id":[1]}"#, "a call has an id"),
        (r#"{"jsonrpc":"2.0","method":"void","id":1.0}"#, "the id is no integer"),
        (r#"{"jsonrpc":"2.0","method":"void","id":18446744073709551615}"#, "the id is no integer"),
        (r#"[{"jsonrpc":"2.0","method":"void","id":1}]"#, "batches are not served"),
        (r#"{"jsonrpc":"1.0","method":"void","params":[],"id":1}"#, "the version is 2.0"),
        (r#"{"jsonrpc":2.0,"method":"void","params":[],"id":1}"#, "the version is 2.0"),
        (r#"{"jsonrpc":"2.0","params":[],"id":1}"#, "a call has a method"),
        (r#"{"jsonrpc":"2.0","method":"void","params":"x","id":1}"#, "params is an array"),
        (r#"{"jsonrpc":"2.0","method":"void","params":[],"id":1"#, "not JSON"),
        ("", "not JSON"),
        ("<methodCall/>", "not JSON"),
        (&deep, "not JSON: recursion limit"),
    ] {
        is_malformed(&running, "/jsonrpc", body, reason).await;
    }
}

#[tokio::test]
async fn what_is_no_xml_call_is_http_500() {
    let running = Running::plain().await;
    let whole = call("echo", "<param><value>x</value></param>");
    for cut in (1..whole.len()).step_by(7) {
        is_malformed(&running, "/", &whole[..cut], "").await;
    }
    for (body, reason) in [
        ("", "the body is cut short"),
        ("hello", "text where a tag belongs"),
        (r#"{"method":"void","params":[],"id":1}"#, "text where a tag belongs"),
        ("<methodCall><methodName>void</methodName></methodCall>", "&lt;params&gt; expected"),
        ("<methodCall><methodName> </methodName><params/></methodCall>", "the method has no name"),
        ("<methodResponse/>", "&lt;methodCall&gt; expected"),
        (&call("echo", "<param><value><int/></value></param>"), "unknown type"),
        (&call("echo", "<param><value><int>one</int></value></param>"), "not an integer"),
        (&call("echo", "<param><value>x</wrong></param>"), "bad XML"),
    ] {
        is_malformed(&running, "/", body, reason).await;
    }
}

#[tokio::test]
async fn an_xml_bomb_is_refused_at_its_first_line() {
    let running = Running::plain().await;
    let mut bomb = String::from("<?xml version=\"1.0\"?><!DOCTYPE bomb [<!ENTITY a0 \"ha\">");
    for level in 1..30 {
        bomb.push_str(&format!("<!ENTITY a{level} \"{}\">", format!("&a{};", level - 1).repeat(10)));
    }
    bomb.push_str("]><methodCall><methodName>echo</methodName><params><param><value>&a29;</value></param>");
    bomb.push_str("</params></methodCall>");
    is_malformed(&running, "/", &bomb, "a document type is not allowed").await;
    let outside = "<!DOCTYPE x [<!ENTITY e SYSTEM \"file:///etc/passwd\">]>";
    let stolen =
        format!("{outside}{}", &call("echo", "<param><value>&e;</value></param>")["<?xml version=\"1.0\"?>".len()..]);
    is_malformed(&running, "/", stolen, "a document type is not allowed").await;
    is_malformed(&running, "/", call("echo", "<param><value>&e;</value></param>"), "unknown entity &amp;e;").await;
}

#[tokio::test]
async fn xml_may_be_nested_to_a_depth_and_no_deeper() {
    let running = Running::plain().await;
    let nested = |depth: usize| {
        let open = "<value><array><data>".repeat(depth);
        call("echo", &format!("<param>{open}{}</param>", "</data></array></value>".repeat(depth)))
    };
    // methodCall, params and param are three levels, each array three more.
    let answer = running.post("/", nested(20)).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.body.matches("<array>").count(), 20);
    is_malformed(&running, "/", nested(21), "nested too deeply").await;
    is_malformed(&running, "/", nested(4000), "nested too deeply").await;
}

#[tokio::test]
async fn bytes_that_are_no_utf8_are_an_invalid_value() {
    let running = Running::plain().await;
    let mut body = call("echo", "<param><value>@</value></param>").into_bytes();
    for byte in &mut body {
        *byte = if *byte == b'@' { 0xff } else { *byte };
    }
    let answer = running.post("/", &body).await;
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("text/xml")));
    assert!(answer.body.contains("<value>INVALID_VALUE</value><value>Invalid UTF-8 string in parameter</value>"));
    running.still_serves().await;
    let answer = running.post("/jsonrpc", b"{\"method\":\"echo\",\"params\":[\"\xc3\x28\"],\"id\":1}").await;
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/json")));
    let json: serde_json::Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(json["error"]["message"], "INVALID_VALUE");
    assert_eq!(json["error"]["data"][0], "Invalid UTF-8 string in parameter");
    running.still_serves().await;
}

#[tokio::test]
async fn a_body_may_be_as_large_as_the_limit_and_no_larger() {
    let running = Running::plain().await;
    let room = LARGEST_BODY - call("echo", "<param><value></value></param>").len();
    let text = "x".repeat(room);
    let answer = running.post("/", call("echo", &format!("<param><value>{text}</value></param>"))).await;
    assert_eq!(answer.body, success(&format!("<value>{text}</value>")));
    for path in ["/", "/jsonrpc"] {
        is_malformed(&running, path, "x".repeat(LARGEST_BODY + 1), "the body cannot be read").await;
    }
}

#[tokio::test]
async fn a_chunked_body_is_read_and_limited() {
    let running = Running::plain().await;
    let mut wire = running.connect().await;
    wire.send("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    for piece in call("echo", "<param><value>pieces</value></param>").as_bytes().chunks(10) {
        wire.send(format!("{:x}\r\n", piece.len())).await;
        wire.send(piece).await;
        wire.send("\r\n").await;
    }
    wire.send("0\r\n\r\n").await;
    let answer = wire.answer().await;
    assert_eq!((answer.status, answer.body), (200, success("<value>pieces</value>")));
    let mut wire = running.connect().await;
    wire.send("POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    wire.send(format!("{:x}\r\n{}\r\n", LARGEST_BODY + 1, "x".repeat(LARGEST_BODY + 1))).await;
    let answer = wire.answer().await;
    assert_eq!(answer.status, 500);
    assert!(answer.body.contains("the body cannot be read"), "{}", answer.body);
    running.still_serves().await;
}

#[tokio::test]
async fn one_connection_serves_many_calls_in_order() {
    let running = Running::plain().await;
    let mut wire = running.connect().await;
    for number in 0..20 {
        let answer = wire.post("/RPC2", call("echo", &format!("<param><value>{number}</value></param>"))).await;
        assert_eq!(answer.body, success(&format!("<value>{number}</value>")));
        assert_ne!(answer.header("connection"), Some("close"));
        let answer = wire.post("/jsonrpc", format!(r#"{{"method":"echo","params":[{number}],"id":{number}}}"#)).await;
        assert_eq!(answer.body, format!(r#"{{"result":{number},"error":null,"id":{number}}}"#));
    }
    // Sent before the first is answered.
    let body = call("echo", "<param><value>a</value></param>");
    let one = format!("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    wire.send(format!("{one}{}", one.replace(">a<", ">b<"))).await;
    assert_eq!(wire.answer().await.body, success("<value>a</value>"));
    assert_eq!(wire.answer().await.body, success("<value>b</value>"));
}

#[tokio::test]
async fn an_api_failure_keeps_the_connection() {
    let running = Running::plain().await;
    let mut wire = running.connect().await;
    for _ in 0..3 {
        assert_eq!(wire.post("/", call("fails", "")).await.status, 200);
    }
    assert_eq!(wire.post("/", call("void", "")).await.body, success("<value></value>"));
}

#[tokio::test]
async fn http_1_0_closes_unless_asked_to_stay() {
    let running = Running::plain().await;
    let body = call("void", "");
    let head = |more: &str| format!("POST / HTTP/1.0\r\n{more}Content-Length: {}\r\n\r\n{body}", body.len());
    let mut wire = running.connect().await;
    wire.send(head("")).await;
    let answer = wire.answer().await;
    assert_ne!(answer.header("connection"), Some("keep-alive"));
    assert_eq!((answer.version.as_str(), answer.status, answer.body), ("HTTP/1.0", 200, success("<value></value>")));
    assert!(wire.ends().await);
    let mut wire = running.connect().await;
    for _ in 0..2 {
        wire.send(head("Connection: Keep-Alive\r\n")).await;
        let answer = wire.answer().await;
        assert_eq!(answer.header("connection"), Some("keep-alive"));
        assert_eq!(answer.body, success("<value></value>"));
    }
}

#[tokio::test]
async fn a_preflight_echoes_the_headers_asked_for() {
    let running = Running::plain().await;
    for path in ["/", "/json", "/jsonrpc"] {
        let mut wire = running.connect().await;
        wire.send(format!(
            "OPTIONS {path} HTTP/1.1\r\nHost: h\r\nAccess-Control-Request-Headers: content-type, x-own\r\n\r\n"
        ))
        .await;
        let answer = wire.answer().await;
        assert_eq!((answer.status, answer.body.as_str()), (200, ""));
        let allowed = answer.header("access-control-allow-headers");
        assert_eq!(allowed, Some("content-type, x-own, X-Requested-With"));
        assert_eq!(answer.header("access-control-allow-origin"), Some("*"));
        assert!(answer.header("access-control-allow-methods").is_some_and(|methods| methods.contains("POST")));
        wire.send("OPTIONS / HTTP/1.1\r\nHost: h\r\n\r\n").await;
        assert_eq!(wire.answer().await.header("access-control-allow-headers"), Some("X-Requested-With"));
    }
}

#[tokio::test]
async fn whatever_is_posted_elsewhere_is_xml_rpc() {
    let running = Running::plain().await;
    for path in ["/", "/RPC2", "/json", "/xmlrpc", "/a/b/c?d=e"] {
        let answer = running.post(path, call("void", "")).await;
        assert_eq!((answer.status, answer.body), (200, success("<value></value>")), "{path}");
    }
    for path in ["/jsonrpc", "/jsonrpc/", "/jsonrpc?x=y"] {
        let answer = running.post(path, r#"{"jsonrpc":"2.0","method":"void","id":1}"#).await;
        assert_eq!(answer.body, r#"{"jsonrpc":"2.0","result":"","id":1}"#, "{path}");
    }
}

#[tokio::test]
async fn a_browser_finds_a_page_at_the_root_and_nothing_elsewhere() {
    let running = Running::plain().await;
    let mut wire = running.connect().await;
    for (request, status, content_type) in [
        ("GET / HTTP/1.1", 200, "text/html"),
        ("GET /x HTTP/1.1", 404, "text/html"),
        ("GET /jsonrpc HTTP/1.1", 404, "text/html"),
        ("DELETE / HTTP/1.1", 405, "text/html"),
        ("PUT /import HTTP/1.1", 405, "text/html"),
    ] {
        wire.send(format!("{request}\r\nHost: h\r\n\r\n")).await;
        let answer = wire.answer().await;
        assert_eq!((answer.status, answer.header("content-type")), (status, Some(content_type)), "{request}");
        assert!(!answer.body.is_empty());
    }
}

#[tokio::test]
async fn what_is_not_http_ends_its_own_connection_only() {
    let running = Running::plain().await;
    let mut wire = running.connect().await;
    wire.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n").await;
    assert_eq!(wire.answer().await.status, 400);
    assert!(wire.ends().await);
    let mut left = running.connect().await;
    left.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n<methodCall>").await;
    drop(left);
    running.still_serves().await;
}

#[tokio::test]
async fn a_head_without_end_is_cut_off() {
    let running = Running::plain().await;
    let (mut from, mut to) = TcpStream::connect(running.gateway.plain[0]).await.unwrap().into_split();
    to.write_all(b"POST / HTTP/1.1\r\nHost: h\r\nX-Long: ").await.unwrap();
    let talking = tokio::spawn(async move { while to.write_all(&[b'x'; 4096]).await.is_ok() {} });
    tokio::time::timeout(PATIENCE, talking).await.expect("the server goes on listening").unwrap();
    let mut answer = Vec::new();
    // What the server said may be lost with what it did not read.
    let _ = from.read_to_end(&mut answer).await;
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431 "), "{}", String::from_utf8_lossy(&answer));
    running.still_serves().await;
}

#[tokio::test]
async fn a_defect_is_an_internal_error_and_the_connection_lives() {
    let running = Running::plain().await;
    let mut wire = running.connect().await;
    let reason = "a defect of the server; its log says more";
    assert_eq!(wire.post("/", call("panic", "")).await.body, failure(&["INTERNAL_ERROR", reason]));
    let answer = wire.post("/jsonrpc", r#"{"jsonrpc":"2.0","method":"panic","id":5}"#).await;
    let error = format!(r#"{{"code":1,"message":"INTERNAL_ERROR","data":["{reason}"]}}"#);
    assert_eq!(answer.body, format!(r#"{{"jsonrpc":"2.0","error":{error},"id":5}}"#));
    assert_eq!(wire.post("/", call("void", "")).await.body, success("<value></value>"));
    running.still_serves().await;
}

#[tokio::test]
async fn a_call_is_asked_again_while_the_lead_moves() {
    let running = Running::plain().await;
    assert_eq!(running.post("/", call("settles", "")).await.body, success("<value>2</value>"));
}

#[tokio::test]
async fn without_a_master_in_reach_clients_hear_of_an_emergency() {
    let running = Running::plain().await;
    let xml = running.post("/", call("elsewhere", ""));
    let json = running.post("/jsonrpc", r#"{"jsonrpc":"2.0","method":"elsewhere","id":"e"}"#);
    let (xml, json) = tokio::join!(xml, json);
    assert_eq!(xml.body, failure(&["HOST_IN_EMERGENCY_MODE"]));
    let error = r#"{"code":1,"message":"HOST_IN_EMERGENCY_MODE","data":[]}"#;
    assert_eq!(json.body, format!(r#"{{"jsonrpc":"2.0","error":{error},"id":"e"}}"#));
}

#[tokio::test]
async fn a_caller_is_known_by_address_and_headers() {
    let running = Running::plain().await;
    let mut wire = running.connect().await;
    let body = r#"{"method":"caller","params":[],"id":1}"#;
    wire.send(format!(
        "POST /jsonrpc HTTP/1.1\r\nHost: h\r\nUser-Agent: ua/1\r\nOriginator: me\r\nIdempotency-Key: k\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    ))
    .await;
    let result = r#"["tcp","127.0.0.1","ua/1","me","k",false]"#;
    assert_eq!(wire.answer().await.body, format!(r#"{{"result":{result},"error":null,"id":1}}"#));
}

#[tokio::test]
async fn the_unix_socket_marks_its_callers_and_is_the_owners_alone() {
    let running = Running::plain().await;
    let path = running.directory.path().join("socket");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut wire = Wire::new(UnixStream::connect(&path).await.unwrap());
    let answer = wire.post("/jsonrpc", r#"{"method":"caller","params":[],"id":1}"#).await;
    assert_eq!(answer.body, r#"{"result":["unix","-","","","-",false],"error":null,"id":1}"#);
    running.shutdown.cancel();
    running.gateway.ended().await;
    assert!(!path.exists());
}

#[tokio::test]
async fn a_socket_left_behind_is_replaced() {
    let running = Running::with(|config, directory| {
        let path = directory.join("socket");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        config.socket = Some(path);
    })
    .await;
    let mut wire = Wire::new(UnixStream::connect(running.directory.path().join("socket")).await.unwrap());
    assert_eq!(wire.post("/", call("void", "")).await.status, 200);
}

#[tokio::test]
async fn a_call_under_way_is_answered_before_the_gateway_ends() {
    let running = Running::plain().await;
    let mut wire = running.connect().await;
    let body = call("waits", "");
    wire.send(format!("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n{body}", body.len())).await;
    running.stub.begun.notified().await;
    running.shutdown.cancel();
    running.stub.go_on.notify_one();
    let answer = wire.answer().await;
    assert_eq!((answer.status, answer.body), (200, success("<value>done</value>")));
    assert!(wire.ends().await);
    let address = running.gateway.plain[0];
    running.gateway.ended().await;
    assert!(TcpStream::connect(address).await.is_err(), "something still listens");
}

#[tokio::test]
async fn an_address_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut config = support::config(directory.path());
    config.plain = vec![taken.local_addr().unwrap()];
    let calls: Arc<dyn Calls> = Arc::new(Stub::default());
    let refused = Gateway::start(config, calls, ForwardClient::none(), CancellationToken::new()).await;
    let Err(error) = refused else { panic!("two listeners on one address") };
    assert!(error.to_string().contains(&taken.local_addr().unwrap().to_string()), "{error}");
}

/// What one of the published clients knows under TLS 1.2: RSA alone. An ECDSA certificate ends the handshake.
fn knows_rsa_alone() -> CryptoProvider {
    use SignatureScheme::{RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PSS_SHA256, RSA_PSS_SHA384, RSA_PSS_SHA512};
    let rsa = [RSA_PSS_SHA256, RSA_PSS_SHA384, RSA_PSS_SHA512, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384];
    let mut provider = aws_lc_rs::default_provider();
    let known = provider.signature_verification_algorithms;
    let mapping: Vec<_> = known.mapping.iter().copied().filter(|(scheme, _)| rsa.contains(scheme)).collect();
    provider.signature_verification_algorithms = WebPkiSupportedAlgorithms { mapping: mapping.leak(), ..known };
    provider
}

async fn over_tls(running: &Running, version: &'static SupportedProtocolVersion) -> Wire<TlsStream<TcpStream>> {
    trusting(&running.directory.path().join("made/certificate.pem"), running, version).await
}

async fn trusting(
    made: &Path,
    running: &Running,
    version: &'static SupportedProtocolVersion,
) -> Wire<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(made).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(knows_rsa_alone()))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = TcpStream::connect(running.gateway.tls[0]).await.unwrap();
    // By address: such a client sends no server name.
    let name = ServerName::try_from("127.0.0.1").unwrap();
    Wire::new(TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap())
}

async fn tls() -> Running {
    Running::with(|config, _| config.tls = vec!["127.0.0.1:0".parse().unwrap()]).await
}

#[tokio::test]
async fn tls_1_2_and_1_3_are_served_with_an_rsa_certificate_made_at_first_start() {
    let running = tls().await;
    for (version, agreed) in [(&TLS12, ProtocolVersion::TLSv1_2), (&TLS13, ProtocolVersion::TLSv1_3)] {
        let mut wire = over_tls(&running, version).await;
        assert_eq!(wire.stream.get_ref().1.protocol_version(), Some(agreed));
        let shown = wire.stream.get_ref().1.peer_certificates().unwrap()[0].to_vec();
        let kept = CertificateDer::from_pem_file(running.directory.path().join("made/certificate.pem")).unwrap();
        assert_eq!(shown, kept.to_vec());
        for _ in 0..2 {
            let answer = wire.post("/", call("void", "")).await;
            assert_eq!((answer.status, answer.body), (200, success("<value></value>")));
        }
        let answer = wire.post("/jsonrpc", r#"{"method":"caller","params":[],"id":1}"#).await;
        assert_eq!(answer.body, r#"{"result":["tcp","127.0.0.1","","","-",false],"error":null,"id":1}"#);
    }
}

#[tokio::test]
async fn a_client_that_speaks_no_tls_ends_nothing_but_its_handshake() {
    let running = tls().await;
    let mut wire = Wire::new(TcpStream::connect(running.gateway.tls[0]).await.unwrap());
    wire.send("POST / HTTP/1.1\r\n\r\n").await;
    let mut alert = Vec::new();
    let _ = wire.stream.read_to_end(&mut alert).await;
    assert!(!alert.starts_with(b"HTTP"), "answered without TLS");
    assert_eq!(over_tls(&running, &TLS13).await.post("/", call("void", "")).await.status, 200);
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn the_key_is_the_owners_alone_and_both_files_outlive_a_restart() {
    let running = tls().await;
    let made = running.directory.path().join("made");
    assert_eq!(mode(&made.join("key.pem")), 0o600);
    let read = || ["certificate.pem", "key.pem"].map(|name| std::fs::read(made.join(name)).unwrap());
    let first = read();
    let certificate = support::config(running.directory.path()).certificate;
    let again = Running::with(|config, _| {
        config.tls = vec!["127.0.0.1:0".parse().unwrap()];
        config.certificate = certificate;
    })
    .await;
    assert_eq!(read(), first);
    let mut wire = trusting(&made.join("certificate.pem"), &again, &TLS12).await;
    assert_eq!(wire.post("/", call("void", "")).await.status, 200);
}

#[tokio::test]
async fn a_start_that_was_cut_off_leaves_nothing_that_stops_the_next() {
    let running = Running::with(|config, directory| {
        // A key that others may read, and no certificate yet.
        std::fs::create_dir(directory.join("made")).unwrap();
        let key = support::tls_files(directory).key;
        std::fs::write(&key, "half a k").unwrap();
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
        config.tls = vec!["127.0.0.1:0".parse().unwrap()];
    })
    .await;
    assert_eq!(over_tls(&running, &TLS12).await.post("/", call("void", "")).await.status, 200);
    assert_eq!(mode(&running.directory.path().join("made/key.pem")), 0o600);
    let mut names: Vec<_> = std::fs::read_dir(running.directory.path().join("made"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["certificate.pem", "key.pem"]);
}
