//! Promises of the configuration files.

use std::os::unix::fs::PermissionsExt;

use super::*;

const CONTROLLER: &str = include_str!("../../../deploy/examples/controller.toml");
const WITNESS: &str = include_str!("../../../deploy/examples/witness.toml");
const AGENT: &str = include_str!("../../../deploy/examples/agent.toml");

/// The examples name files of a real installation; here they get files of their own.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["ca.pem", "host.pem", "host.key"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        Self { dir }
    }

    fn load<T: DeserializeOwned + Check>(&self, text: &str) -> Result<T, ConfigError> {
        let path = self.dir.path().join("config.toml");
        std::fs::write(&path, text.replace("/etc/xenith/tls", self.dir.path().to_str().unwrap())).unwrap();
        load(&path)
    }

    fn refusal(&self, text: &str) -> String {
        self.load::<ControllerConfig>(text).unwrap_err().to_string()
    }
}

#[test]
fn the_examples_are_valid_and_say_the_defaults() {
    let place = Place::new();
    let controller: ControllerConfig = place.load(CONTROLLER).unwrap();
    let defaults = Raft::default();
    assert_eq!(controller.raft.heartbeat_ms, defaults.heartbeat_ms);
    assert_eq!(controller.raft.election_min_ms, defaults.election_min_ms);
    assert_eq!(controller.raft.election_max_ms, defaults.election_max_ms);
    assert_eq!(controller.founding.as_ref().unwrap().members.len(), 3);
    let membership = Membership::default();
    assert_eq!(controller.membership.voters, membership.voters);
    assert_eq!(controller.membership.replace_after_ms, membership.replace_after_ms);
    place.load::<AgentConfig>(AGENT).unwrap();
    place.load::<WitnessConfig>(WITNESS).unwrap();
}

#[test]
fn what_a_program_writes_it_reads_back() {
    let place = Place::new();
    let controller: ControllerConfig = place.load(CONTROLLER).unwrap();
    let text = toml::to_string_pretty(&controller).unwrap();
    let again: ControllerConfig = place.load(&text).unwrap();
    assert_eq!(toml::to_string_pretty(&again).unwrap(), text);
}

#[test]
fn an_unknown_key_is_refused_with_its_line_and_the_keys_that_are_known() {
    let refusal = Place::new().refusal(&CONTROLLER.replace("heartbeat_ms", "heart_beat_ms"));
    assert!(refusal.contains("unknown field `heart_beat_ms`"), "{refusal}");
    assert!(refusal.contains("line ") && refusal.contains("`heartbeat_ms`"), "{refusal}");
}

#[test]
fn combinations_that_cannot_work_name_the_key_to_change() {
    let place = Place::new();
    for (from, to, key) in [
        ("election_max_ms = 300", "election_max_ms = 110", "raft.election_max_ms"),
        ("election_min_ms = 150", "election_min_ms = 60", "raft.election_min_ms"),
        ("node_id = 1", "node_id = 9", "founding.members"),
        ("node_id = 1", "node_id = 0", "node_id"),
        ("/etc/xenith/tls/host.key", "/nowhere/host.key", "tls.key"),
        ("[log]", "[store]\nformat_limit = 99\n[log]", "store.format_limit"),
    ] {
        let text = CONTROLLER.replacen(from, to, 1);
        assert_ne!(text, CONTROLLER);
        let refusal = place.refusal(&text);
        assert!(refusal.contains(&format!(": {key}: ")), "{key}: {refusal}");
    }
}

#[test]
fn a_password_that_others_could_read_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("root-password");
    std::fs::write(&path, "correct horse\n").unwrap();
    let allow = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    allow(0o640);
    let refusal = root_password(Some(&path)).unwrap_err().to_string();
    assert!(refusal.contains("chmod 600"), "{refusal}");
    allow(0o600);
    assert_eq!(root_password(Some(&path)).unwrap(), "correct horse");
}
