//! The pool's database, fetched and put back with curl: over HTTPS, at the master and by way of another host.

use std::path::Path;

use chaos_tests::client::Client;
use chaos_tests::lab::{Host, Lab, What};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::support::{SOON, new_vm, plugged, refusal, text, until};

/// What curl was answered.
#[derive(Debug)]
struct Answer {
    status: u16,
    /// Where the last redirection led; empty where there was none that was not followed.
    location: String,
    body: String,
}

/// curl, with these arguments, at that path of a host. It trusts anyone, as clients of new pools do.
async fn curl(host: &Host, path: &str, arguments: &[&str]) -> Answer {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--insecure", "--max-time", "60", "--write-out"]);
    command.args(["\n%{http_code} %{redirect_url}", &format!("{}{path}", host.url.trim_end_matches('/'))]);
    let output = command.args(arguments).kill_on_drop(true).output().await.expect("curl is installed");
    assert!(output.status.success(), "{path} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    let printed = String::from_utf8(output.stdout).unwrap();
    let (body, last) = printed.rsplit_once('\n').unwrap();
    let (status, location) = last.split_once(' ').unwrap();
    Answer { status: status.parse().unwrap(), location: location.to_owned(), body: body.to_owned() }
}

const PATH: &str = "/pool/xmldbdump";

/// Follows redirections, and shows the password to whom they lead.
const FOLLOW: &str = "--location-trusted";

fn by_session(client: &Client, more: &str) -> String {
    format!("{PATH}?session_id={}{more}", client.session())
}

/// The rows of a dump: what comes before them says when it was made.
fn rows(dump: &str) -> &str {
    dump.split_once("</manifest>").unwrap_or_else(|| panic!("no dump: {dump}")).1
}

/// Everything in the pool that a dump is about and that a host's death does not change.
async fn contents(client: &mut Client) -> Value {
    let mut all = json!({});
    for class in ["VM", "VBD", "VIF", "VDI", "SR", "PBD", "network", "PIF", "pool"] {
        let mut records = client.persist(SOON, &format!("{class}.get_all_records"), json!([])).await.unwrap();
        for record in records.as_object_mut().unwrap().values_mut().filter_map(Value::as_object_mut) {
            // The pool finds these out by itself; `master` and the like move.
            for found_out in ["master", "metrics", "guest_metrics", "consoles", "last_booted_record", "domid"] {
                record.remove(found_out);
            }
        }
        all[class] = records;
    }
    all
}

/// What differs, by object and field.
fn differences(before: &Value, after: &Value) -> Vec<String> {
    let empty = serde_json::Map::new();
    let objects = |all: &Value| -> Vec<(String, String)> {
        let classes = all.as_object().unwrap().iter();
        classes.flat_map(|(class, of)| of.as_object().unwrap().keys().map(|it| (class.clone(), it.clone()))).collect()
    };
    let mut keys = objects(before);
    keys.extend(objects(after));
    keys.sort();
    keys.dedup();
    let mut out = Vec::new();
    for (class, reference) in keys {
        let (old, new) = (before[&class][&reference].as_object(), after[&class][&reference].as_object());
        if old.is_none() || new.is_none() {
            out.push(format!("{class} {reference}: before {}, after {}", old.is_some(), new.is_some()));
        }
        for (field, value) in old.unwrap_or(&empty) {
            if new.is_some_and(|new| new.get(field) != Some(value)) {
                out.push(format!("{class}.{field} {reference}: {value} is {}", new.unwrap()[field]));
            }
        }
    }
    out
}

async fn nothing_is_told_to_strangers(lab: &Lab, client: &Client, dump: &Path) {
    let mut other = lab.client().await.unwrap();
    let over = by_session(&other, "");
    other.call("session.logout", json!([])).await.unwrap();
    let master = lab.made().master().unwrap();
    let upload = dump.to_str().unwrap();
    let of_nobody = format!("{PATH}?session_id=OpaqueRef:11111111-2222-3333-4444-555555555555");
    let strangers: [(&str, &[&str]); 6] = [
        (PATH, &[]),
        (PATH, &["--user", "root:wrong"]),
        (PATH, &["--user", "nobody:password"]),
        (PATH, &["--cookie", "session_id=nonsense"]),
        (&of_nobody, &[]),
        (&over, &[]),
    ];
    for (path, how) in strangers {
        for sending in [&[][..], &["--upload-file", upload]] {
            let answer = curl(master, path, &[how, sending].concat()).await;
            assert_eq!(answer.status, 401, "{path} {how:?} {sending:?}: {answer:?}");
            assert!(!answer.body.contains("<row"), "{path} {how:?}: {answer:?}");
        }
    }
    // A host that is not the master knows nobody and sends everybody on, before it has read anything.
    for member in lab.made().others() {
        let answer = curl(member, &by_session(client, ""), &["--upload-file", upload]).await;
        let wanted = format!("{}{}", master.url.trim_end_matches('/'), by_session(client, ""));
        assert_eq!((answer.status, answer.location), (302, wanted));
        let answer = curl(member, PATH, &["--user", "root:wrong", FOLLOW]).await;
        assert_eq!(answer.status, 401);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_pool_is_as_it_was_dumped_also_after_all_hosts_were_killed() {
    let lab = Lab::sim().await.unwrap();
    let mut client = lab.client().await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (master, member) = (lab.made().master().unwrap(), lab.made().others()[0]);
    let as_root = format!("{}:{}", lab.made().user, lab.made().password);
    let as_root = ["--user", as_root.as_str()];
    let (renamed, destroyed) = (new_vm(&mut client, "renamed").await, new_vm(&mut client, "destroyed <&> ü").await);
    let running = new_vm(&mut client, "running").await;
    client.call("VM.provision", json!([running])).await.unwrap();
    client.call("VM.start", json!([running, false, false])).await.unwrap();
    client.call("VM.add_to_other_config", json!([renamed, "key", "value"])).await.unwrap();
    plugged(&mut client).await;
    let before = contents(&mut client).await;

    // The same dump, whoever is asked and however the asker is known.
    let dump = curl(master, PATH, &as_root).await;
    assert_eq!(dump.status, 200, "{dump:?}");
    for (host, path, how) in [
        (master, by_session(&client, ""), vec![]),
        (master, PATH.to_owned(), vec!["--cookie".to_owned(), format!("session_id={}", client.session())]),
        (member, by_session(&client, ""), vec![FOLLOW.to_owned()]),
        (member, PATH.to_owned(), vec!["--user".to_owned(), as_root[1].to_owned(), FOLLOW.to_owned()]),
    ] {
        let how: Vec<_> = how.iter().map(String::as_str).collect();
        let answer = curl(host, &path, &how).await;
        assert_eq!(answer.status, 200, "{path} {how:?}");
        assert_eq!(rows(&answer.body), rows(&dump.body), "{path} {how:?}");
    }
    let (whole, cut) = (dir.path().join("pool.xml"), dir.path().join("cut.xml"));
    std::fs::write(&whole, &dump.body).unwrap();
    std::fs::write(&cut, &dump.body[..dump.body.len() / 2]).unwrap();
    let (whole_dump, cut) = (whole.to_str().unwrap(), cut.to_str().unwrap());

    client.call("VM.destroy", json!([destroyed])).await.unwrap();
    client.call("VM.set_name_label", json!([renamed, "another name"])).await.unwrap();
    client.call("VM.remove_from_other_config", json!([renamed, "key"])).await.unwrap();
    new_vm(&mut client, "made since").await;
    let changed = contents(&mut client).await;
    assert!(!differences(&before, &changed).is_empty());

    // Nothing of this changes anything.
    nothing_is_told_to_strangers(&lab, &client, &whole).await;
    let sending = ["--upload-file", whole_dump];
    for (host, path, how) in [
        (master, by_session(&client, "&dry_run=true"), vec![]),
        (master, format!("{PATH}?dry_run=true"), as_root.to_vec()),
        (member, by_session(&client, "&dry_run=true"), vec![FOLLOW]),
        (member, format!("{PATH}?dry_run=true"), [&as_root[..], &[FOLLOW]].concat()),
    ] {
        let answer = curl(host, &path, &[&how[..], &sending].concat()).await;
        assert_eq!((answer.status, answer.body.as_str()), (200, ""), "{path} {how:?}");
    }
    for path in [by_session(&client, "&dry_run=true"), by_session(&client, "")] {
        let answer = curl(master, &path, &["--upload-file", cut]).await;
        assert!(answer.body.contains("IMPORT_ERROR_PREMATURE_EOF"), "{path}: {answer:?}");
    }
    assert_eq!(differences(&changed, &contents(&mut client).await), Vec::<String>::new());

    // By way of a host that is not the master, in a session, with a task that is told.
    let mut bystander = lab.client().await.unwrap();
    let task = text(&client.call("task.create", json!(["restore", ""])).await.unwrap());
    let path = by_session(&client, &format!("&task_id={task}"));
    let answer = curl(member, &path, &[&sending[..], &[FOLLOW]].concat()).await;
    assert_eq!((answer.status, answer.body.as_str()), (200, ""));
    assert_eq!(client.call("task.get_status", json!([task])).await.unwrap(), "success");
    assert_eq!(differences(&before, &contents(&mut client).await), Vec::<String>::new());
    assert_eq!(refusal(bystander.call("VM.get_all", json!([])).await).0, "SESSION_INVALID");

    // At the master, with a name and a password: no session is left.
    client.call("VM.set_name_label", json!([renamed, "a third name"])).await.unwrap();
    let answer = curl(master, PATH, &[&as_root[..], &sending].concat()).await;
    assert_eq!((answer.status, answer.body.as_str()), (200, ""));
    assert_eq!(refusal(client.call("VM.get_all", json!([])).await).0, "SESSION_INVALID");
    client.login().await.unwrap();
    assert_eq!(differences(&before, &contents(&mut client).await), Vec::<String>::new());

    // Everything dies, guests too.
    kill_everything(&lab).await;
    lab.up_again(&[]).await.unwrap();
    until(SOON, "the guest that died with its host to be shown as halted", async || {
        let state = client.persist(SOON, "VM.get_power_state", json!([running])).await.unwrap();
        (state == "Halted").then_some(())
    })
    .await;
    plugged(&mut client).await;
    let after = contents(&mut client).await;
    let about_the_dead = |difference: &String| difference.contains(&running) && difference.starts_with("VM.");
    let left: Vec<_> = differences(&before, &after).into_iter().filter(|it| !about_the_dead(it)).collect();
    assert_eq!(left, Vec::<String>::new());
    for field in ["name_label", "uuid", "VBDs", "VIFs", "memory_static_max", "other_config"] {
        assert_eq!(after["VM"][&running][field], before["VM"][&running][field], "{field}");
    }
    client.persist(SOON, "VM.start", json!([running, false, false])).await.unwrap();
}

async fn kill_everything(lab: &Lab) {
    let state = lab.status().await.unwrap();
    let processes = state.hosts.iter().flat_map(|host| [host.controller_pid, host.agent_pid]);
    for process in processes.map(|pid| Pid::from_raw(pid.expect("a process"))).collect::<Vec<_>>() {
        kill(process, Signal::SIGKILL).unwrap();
    }
    for host in &lab.made().hosts {
        lab.kill(&host.name, What::Host).await.unwrap();
    }
}
