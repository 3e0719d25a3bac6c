//! Promises of the command line that need no pool.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may take a failure for what it is")]

use std::process::{Command, Output};

fn xenith(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xenith")).args(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn every_subcommand_explains_itself_with_an_example() {
    let commands: &[&[&str]] = &[
        &[],
        &["controller"],
        &["agent"],
        &["lab"],
        &["lab", "up"],
        &["lab", "status"],
        &["lab", "kill"],
        &["lab", "pause"],
        &["lab", "resume"],
        &["lab", "start"],
        &["lab", "down"],
        &["completions"],
    ];
    for command in commands {
        let help = xenith(&[command, &["--help"][..]].concat());
        assert!(help.status.success());
        assert!(stdout(&help).contains("Example"), "{command:?}");
    }
}

#[test]
fn completions_are_made_for_three_shells_and_name_the_subcommands() {
    for shell in ["bash", "zsh", "fish"] {
        let completions = xenith(&["completions", shell]);
        assert!(completions.status.success());
        assert!(stdout(&completions).contains("resume"), "{shell}");
    }
}

#[test]
fn a_lab_that_is_not_there_is_an_error_that_says_how_to_make_it_and_leaves_stdout_empty() {
    let dir = tempfile::tempdir().unwrap();
    for command in ["status", "down"] {
        for place in [dir.path().to_owned(), dir.path().join("deeper")] {
            let refused = xenith(&["lab", command, "--dir", place.to_str().unwrap()]);
            assert!(!refused.status.success());
            assert_eq!(stdout(&refused), "");
            assert!(stderr(&refused).contains("xenith lab up --dir"), "{}", stderr(&refused));
        }
    }
    let made = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(made, 0, "looking at a lab makes nothing");
}

#[test]
fn a_daemon_told_to_check_a_broken_file_names_the_line_and_fails() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.toml");
    std::fs::write(&path, "[agent]\nlisten = \"127.0.0.1:1\"\nhosst_uuid = \"x\"\n").unwrap();
    let refused = xenith(&["agent", "--config", path.to_str().unwrap(), "--check"]);
    assert!(!refused.status.success());
    assert!(stderr(&refused).contains("hosst_uuid") && stderr(&refused).contains("line 3"), "{}", stderr(&refused));
}

#[test]
fn the_coverage_document_says_what_the_program_serves() {
    let coverage = xenith(&["coverage"]);
    assert!(coverage.status.success());
    assert_eq!(stdout(&coverage), std::fs::read_to_string("../docs/api-coverage.md").unwrap(), "run: make coverage");
}
