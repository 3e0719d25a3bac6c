//! Promises of the lab, on real processes: three hosts with simulated guests, on addresses of this test's own.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may take a failure for what it is")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

#[allow(dead_code, reason = "the lab's own client, of which a test needs a part")]
#[path = "../src/lab/rpc.rs"]
mod rpc;

const LIMIT: Duration = Duration::from_secs(10);

/// A lab that is taken down with the test, however the test ends.
struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn at(&self) -> PathBuf {
        self.dir.path().join("pool")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xenith"));
        command.args(["lab", arguments[0], "--dir"]).arg(self.at()).args(&arguments[1..]);
        command
    }

    /// Runs a lab command; what it prints must be one JSON object and nothing else.
    fn run(&self, arguments: &[&str]) -> Value {
        let output = self.command(arguments).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {told}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn up(&self) -> Value {
        self.run(&["up", "--driver", "sim", "--base", "127.0.83.1"])
    }

    fn ask(&self, host: &Value, method: &str, arguments: &[Value]) -> Value {
        let socket = rpc::Socket::new(PathBuf::from(host["socket"].as_str().unwrap()), LIMIT);
        let call = |session: &str| {
            let all: Vec<Value> = std::iter::once(json!(session)).chain(arguments.iter().cloned()).collect();
            socket.call(method, Value::Array(all))
        };
        let limit = Instant::now() + LIMIT;
        loop {
            match socket.session(call) {
                Ok(answer) => return answer,
                Err(error) => assert!(Instant::now() < limit, "{method}: {error:#}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.command(&["down"]).output();
    }
}

fn hosts(report: &Value) -> &Vec<Value> {
    report["hosts"].as_array().unwrap()
}

fn named<'a>(report: &'a Value, name: &Value) -> &'a Value {
    hosts(report).iter().find(|host| host["name"] == *name).unwrap()
}

fn states(report: &Value) -> Vec<&str> {
    hosts(report).iter().map(|host| host["state"].as_str().unwrap()).collect()
}

fn lives(pid: &Value) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

fn processes_of(dir: &Path) -> Vec<String> {
    let lines = std::fs::read_dir("/proc").unwrap().flatten();
    let lines = lines.filter_map(|entry| std::fs::read_to_string(entry.path().join("cmdline")).ok());
    lines.filter(|line| line.contains(dir.to_str().unwrap())).collect()
}

#[test]
fn a_lab_comes_up_loses_hosts_goes_down_and_is_the_same_pool_when_it_comes_up_again() {
    let lab = Lab::new();
    let first = lab.up();
    assert_eq!(hosts(&first).len(), 3);
    assert_eq!((&first["user"], &first["password"]), (&json!("root"), &json!("xenith")));
    assert_eq!(states(&first), ["running"; 3]);
    let names: Vec<_> = hosts(&first).iter().map(|host| host["name"].clone()).collect();
    assert!(names.contains(&first["master"]));
    assert_eq!(hosts(&first)[2]["url"], "https://127.0.83.3:8443");

    // Again on a running lab: nothing is started anew.
    assert_eq!(lab.up()["hosts"], first["hosts"]);

    let member = hosts(&first).iter().find(|host| host["name"] != first["master"]).unwrap();
    let pool = lab.ask(member, "pool.get_all", &[])[0].clone();
    let uuid = lab.ask(member, "pool.get_uuid", std::slice::from_ref(&pool));
    lab.ask(member, "pool.set_name_label", &[pool.clone(), json!("kept")]);

    // One daemon alone, by its own number.
    let name = member["name"].as_str().unwrap();
    let without = lab.run(&["kill", name, "--what", "agent"]);
    assert_eq!(named(&without, &member["name"])["state"], "partial");
    assert_eq!(named(&without, &member["name"])["controller_pid"], member["controller_pid"]);
    assert!(!lives(&member["agent_pid"]) && lives(&member["controller_pid"]));
    assert_eq!(states(&lab.run(&["start", name])), ["running"; 3]);

    assert_eq!(named(&lab.run(&["pause", name]), &member["name"])["state"], "paused");
    assert_eq!(named(&lab.run(&["resume", name]), &member["name"])["state"], "running");

    // The master's whole host: another takes its place, and the write is still there.
    let master = first["master"].as_str().unwrap();
    let killed = lab.run(&["kill", master]);
    assert_eq!(named(&killed, &first["master"])["state"], "dead");
    assert_eq!(lab.ask(member, "pool.get_name_label", std::slice::from_ref(&pool)), "kept");
    let after = lab.run(&["status"]);
    assert!(names.contains(&after["master"]) && after["master"] != first["master"], "{after}");

    let down = lab.run(&["down"]);
    assert_eq!(states(&down), ["dead"; 3]);
    assert_eq!(down["master"], Value::Null);
    assert_eq!(processes_of(&lab.at()), Vec::<String>::new(), "nothing is left running");

    let second = lab.up();
    assert_eq!(states(&second), ["running"; 3]);
    let member = &hosts(&second)[0];
    assert_eq!(lab.ask(member, "pool.get_uuid", std::slice::from_ref(&pool)), uuid);
    assert_eq!(lab.ask(member, "pool.get_name_label", &[pool]), "kept");
}

#[test]
fn an_address_in_use_is_told_with_what_to_do_and_nothing_is_started() {
    let taken = std::net::TcpListener::bind("127.0.84.2:8443").unwrap();
    let lab = Lab::new();
    let refused = lab.command(&["up", "--driver", "sim", "--base", "127.0.84.1"]).output().unwrap();
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success());
    assert!(told.contains("127.0.84.2:8443 is in use") && told.contains("--base"), "{told}");
    assert_eq!(processes_of(&lab.at()), Vec::<String>::new());
    drop(taken);
}
