//! Whatever is sent, it gets its documented answer, and the process lives.

use std::time::Duration;

use chaos_tests::client::{Client, Connection, Endpoint};
use chaos_tests::lab::Lab;
use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::support::{lives, new_vm, refusal, text};

const LIMIT: Duration = Duration::from_secs(15);

async fn open(endpoint: &Endpoint) -> Connection {
    Connection::open(endpoint, LIMIT).await.unwrap()
}

fn xml(method: &str, parameters: &[&str]) -> String {
    let parameters: String = parameters.iter().map(|it| format!("<param><value>{it}</value></param>")).collect();
    format!(
        "<?xml version=\"1.0\"?><methodCall><methodName>{method}</methodName><params>{parameters}</params></methodCall>"
    )
}

fn holds(text: &[u8], wanted: &[u8]) -> bool {
    text.windows(wanted.len()).any(|window| window == wanted)
}

/// Bodies that are no request at all: what is answered is said by HTTP alone.
fn not_requests() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let (xml_type, json_type) = ("/", "/jsonrpc");
    let bomb = {
        let entities: String = (1..20).map(|n| format!("<!ENTITY e{n} \"&e{};&e{};\">", n - 1, n - 1)).collect();
        format!(
            "<?xml version=\"1.0\"?><!DOCTYPE b [<!ENTITY e0 \"boom\">{entities}]><methodCall><methodName>&e19;</methodName>\
             <params/></methodCall>"
        )
    };
    let external = "<?xml version=\"1.0\"?><!DOCTYPE b [<!ENTITY f SYSTEM \"file:///etc/passwd\">]><methodCall>\
                    <methodName>session.logout</methodName><params><param><value>&f;</value></param></params></methodCall>";
    let deep = |open: &str, close: &str| format!("{}x{}", open.repeat(100_000), close.repeat(100_000));
    vec![
        ("nothing", xml_type, Vec::new()),
        ("text", xml_type, b"hello".to_vec()),
        ("cut XML", xml_type, b"<?xml version=\"1.0\"?><methodCall><methodName>VM.get_a".to_vec()),
        ("another document", xml_type, b"<html><body/></html>".to_vec()),
        ("entities that grow", xml_type, bomb.into_bytes()),
        ("an entity from a file", xml_type, external.as_bytes().to_vec()),
        (
            "deep XML",
            xml_type,
            xml("VM.get_all", &[&deep("<array><data><value>", "</value></data></array>")]).into_bytes(),
        ),
        (
            "bad UTF-8 in XML",
            xml_type,
            [b"<methodCall><methodName>\xff\xfe", &b"</methodName></methodCall>"[..]].concat(),
        ),
        ("nothing", json_type, Vec::new()),
        ("cut JSON", json_type, br#"{"jsonrpc":"2.0","method":"VM.get"#.to_vec()),
        ("a number", json_type, b"7".to_vec()),
        ("no method", json_type, br#"{"jsonrpc":"2.0","id":1,"params":[]}"#.to_vec()),
        (
            "deep JSON",
            json_type,
            format!(r#"{{"jsonrpc":"2.0","id":1,"method":"a","params":{}"#, "[".repeat(200_000)).into_bytes(),
        ),
        ("bad UTF-8 in JSON", json_type, b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"\xff\",\"params\":[]}".to_vec()),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_gets_its_error_and_never_takes_the_process_down() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let vm = new_vm(&mut client, "unharmed").await;
    let session = client.session().to_owned();
    let processes: Vec<_> = lab.made().hosts.iter().map(|host| host.controller_pid.unwrap()).collect();

    for host in &lab.made().hosts {
        let endpoint = host.endpoint().unwrap();
        for (name, path, body) in not_requests() {
            let mut connection = open(&endpoint).await;
            let kind = if path == "/" { "text/xml" } else { "application/json" };
            // The server may close while the body is still on its way: that is an answer too.
            if let Ok(answer) = connection.post(path, kind, body, LIMIT).await {
                let refused = answer.status.is_client_error() || answer.status.is_server_error();
                // Bytes that are no text are a matter of parameters, and have an error of XenAPI's own.
                let named = name.starts_with("bad UTF-8") && holds(&answer.body, b"Invalid UTF-8");
                assert!(refused || named, "{name}: {answer:?}");
                assert!(answer.body.len() < 4096, "{name}: {} bytes", answer.body.len());
                assert!(!String::from_utf8_lossy(&answer.body).contains("root:"), "{name}: {answer:?}");
            }
        }
        let mut connection = open(&endpoint).await;
        let huge = format!(r#"{{"jsonrpc":"2.0","id":1,"method":"VM.get_all","params":["{}"]}}"#, "x".repeat(64 << 20));
        if let Ok(answer) = connection.post("/jsonrpc", "application/json", huge, LIMIT).await {
            assert!(answer.status.is_client_error() || answer.status.is_server_error(), "{:?}", answer.status);
        }
    }

    let unknown = "OpaqueRef:11111111-2222-3333-4444-555555555555";
    let table: [(&str, Value, &str, &[&str]); 13] = [
        ("No.such_thing", json!([session]), "MESSAGE_METHOD_UNKNOWN", &["No.such_thing"]),
        ("VM", json!([session]), "MESSAGE_METHOD_UNKNOWN", &["VM"]),
        ("", json!([session]), "MESSAGE_METHOD_UNKNOWN", &[""]),
        ("VM.start", json!([session, vm]), "MESSAGE_PARAMETER_COUNT_MISMATCH", &["VM.start", "3", "1"]),
        ("VM.get_record", json!([session]), "MESSAGE_PARAMETER_COUNT_MISMATCH", &["VM.get_record", "1", "0"]),
        ("VM.get_record", json!([session, vm, vm]), "MESSAGE_PARAMETER_COUNT_MISMATCH", &["VM.get_record", "1", "2"]),
        ("VM.get_record", json!([session, unknown]), "HANDLE_INVALID", &["VM", unknown]),
        ("VM.get_record", json!([session, "nonsense"]), "HANDLE_INVALID", &["VM", "nonsense"]),
        ("VM.get_record", json!([session, "OpaqueRef:NULL"]), "HANDLE_INVALID", &["VM", "OpaqueRef:NULL"]),
        ("host.get_record", json!([session, vm]), "HANDLE_INVALID", &["host", &vm]),
        ("VM.get_by_uuid", json!([session, "nonsense"]), "UUID_INVALID", &["VM", "nonsense"]),
        ("VM.get_all", json!([unknown]), "SESSION_INVALID", &[unknown]),
        ("VM.get_all", json!([unknown, "surplus"]), "MESSAGE_PARAMETER_COUNT_MISMATCH", &["VM.get_all", "0", "1"]),
    ];
    for (method, parameters, code, params) in table {
        let answer = refusal(client.plain(method, &parameters).await);
        let params: Vec<_> = params.iter().map(|it| (*it).to_owned()).collect();
        assert_eq!(answer, (code.to_owned(), params), "{method} {parameters}");
    }
    for (method, parameters) in [
        ("VM.set_name_label", json!([session, vm, ["a", "list"]])),
        ("VM.set_other_config", json!([session, vm, "no map"])),
        ("VM.start", json!([session, vm, "perhaps", {}])),
        ("VM.get_all_records_where", json!([session, "field ("])),
        ("event.from", json!([session, ["vm"], "no token", 0.0])),
        ("session.login_with_password", json!([1, {}, [], null])),
    ] {
        refusal(client.plain(method, &parameters).await);
    }
    let label = client.call("VM.get_name_label", json!([vm])).await.unwrap();
    assert_eq!(label, "unharmed");
    assert!(processes.iter().all(|pid| lives(*pid)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_of_one_wire_is_good_on_the_other_and_both_answer_alike() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let endpoint = lab.made().master().unwrap().endpoint().unwrap();
    let mut connection = open(&endpoint).await;
    let session = client.session().to_owned();
    let vm = new_vm(&mut client, "<both> & \"more\" ü").await;

    for path in ["/", "/RPC2"] {
        let answer =
            connection.post(path, "text/xml", xml("VM.get_name_label", &[&session, &vm]), LIMIT).await.unwrap();
        assert_eq!((answer.status, &answer.headers["content-type"]), (StatusCode::OK, &"text/xml".parse().unwrap()));
        assert_eq!(
            String::from_utf8_lossy(&answer.body),
            "<?xml version=\"1.0\"?><methodResponse><params><param><value><struct><member><name>Status</name><value>Success\
             </value></member><member><name>Value</name><value>&lt;both&gt; &amp; &quot;more&quot; ü</value></member></struct>\
             </value></param></params></methodResponse>"
        );
    }
    let answer = connection.post("/RPC2", "text/xml", xml("VM.get_record", &[&session, "x"]), LIMIT).await.unwrap();
    let body = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(
        answer.status == StatusCode::OK && body.contains("<value>HANDLE_INVALID</value><value>VM</value>"),
        "{body}"
    );
    assert!(body.contains("<name>Status</name><value>Failure</value>") && !body.contains("<fault>"), "{body}");

    let body = json!({"method": "VM.get_name_label", "params": [session, vm], "id": "one"}).to_string();
    let answer = connection.post("/jsonrpc", "application/json", body, LIMIT).await.unwrap();
    assert_eq!(answer.headers["content-type"], "application/json");
    let value: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(value, json!({"result": "<both> & \"more\" ü", "error": null, "id": "one"}));

    let asked = [("origin", "http://page"), ("access-control-request-headers", "content-type")];
    let answer = connection.request(Method::OPTIONS, "/jsonrpc", &asked, "", LIMIT).await.unwrap();
    assert_eq!(
        (answer.status, &answer.headers["access-control-allow-origin"]),
        (StatusCode::OK, &"*".parse().unwrap())
    );
    let allowed = answer.headers["access-control-allow-headers"].to_str().unwrap();
    assert!(allowed.contains("content-type"), "{allowed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_unix_socket_takes_any_password_at_every_host_and_reaches_the_master() {
    let lab = Lab::sim().await.unwrap();
    for host in &lab.made().hosts {
        let mut local = Client::new(vec![host.local()], lab.made().credentials());
        for (user, password) in [("root", ""), ("root", "wrong"), ("nobody", "\u{0}")] {
            let session = local.plain("session.login_with_password", &json!([user, password])).await.unwrap();
            local.set_session(&text(&session));
            local.call("pool.get_all", json!([])).await.unwrap();
        }
        let vm = new_vm(&mut local, &host.name).await;
        assert_eq!(local.call("VM.get_name_label", json!([vm])).await.unwrap(), host.name.as_str());
        let session = local.session().to_owned();
        let mut master = lab.client_at(lab.made().master().unwrap()).unwrap();
        let label = master.plain("VM.get_name_label", &json!([session, vm])).await.unwrap();
        assert_eq!(label, host.name.as_str());

        // Chunks both ways, and a request in pieces.
        let body = json!({"jsonrpc": "2.0", "id": 1, "method": "VM.get_uuid", "params": [session, vm]}).to_string();
        let (first, second) = body.split_at(20);
        let request = format!(
            "POST /jsonrpc HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{first}\r\n{:x}\r\n{second}\r\n0\r\n\r\n",
            first.len(),
            second.len()
        );
        let mut stream = UnixStream::connect(&host.socket).await.unwrap();
        for piece in request.as_bytes().chunks(33) {
            stream.write_all(piece).await.unwrap();
        }
        let mut answer = String::new();
        timeout(LIMIT, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"result\":\""), "{answer}");
    }
    let over_tcp = lab
        .client_at(lab.made().master().unwrap())
        .unwrap()
        .plain("session.login_with_password", &json!(["root", "wrong"]))
        .await;
    assert_eq!(refusal(over_tcp).0, "SESSION_AUTHENTICATION_FAILED");
}
