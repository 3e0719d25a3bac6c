//! The arrows between crates are those of docs/architecture.md, no more and no fewer.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may take a failure for what it is")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

type Arrows = BTreeMap<String, BTreeSet<String>>;

/// Tests run in their crate's folder.
fn root() -> &'static Path {
    Path::new("..")
}

/// What each member of the workspace is built from, of the other members; tools for tests alone are not counted.
fn built() -> Arrows {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let name = |value: &Value| value["name"].as_str().unwrap().to_owned();
    let members: BTreeSet<_> = packages.iter().map(name).collect();
    let needs = |package: &Value| {
        let needed = package["dependencies"].as_array().unwrap().iter();
        needed.filter(|it| it["kind"] != "dev").map(name).filter(|it| members.contains(it)).collect()
    };
    packages.iter().map(|package| (name(package), needs(package))).collect()
}

/// The block marked `arrows` in the document: `crate -> crate crate`, one line for each crate.
fn documented() -> Arrows {
    let text = std::fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let block = text.split("```arrows\n").nth(1).expect("a block marked `arrows`").split("```").next().unwrap();
    let line = |line: &str| {
        let (from, to) = line.split_once("->").unwrap_or_else(|| panic!("not an arrow: {line}"));
        (from.trim().to_owned(), to.split_whitespace().map(str::to_owned).collect())
    };
    block.lines().filter(|it| !it.trim().is_empty()).map(line).collect()
}

#[test]
fn crates_depend_on_each_other_only_as_the_architecture_says() {
    assert_eq!(built(), documented(), "left: the Cargo.toml files, right: docs/architecture.md");
}
