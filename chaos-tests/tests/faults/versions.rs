//! Hosts of two versions in one pool: a host with a limit reads what the version read that had this format, and no more.

use std::time::Duration;

use chaos_tests::client::{Client, Connection};
use chaos_tests::history::load::Load;
use chaos_tests::lab::{Lab, What, program};
use http::Method;

use crate::support::{SOON, until};
use crate::{SOME, log};

/// The first release's format. The next one brought restores of the database.
const OLDER: &str = "1";

const LIMIT: Duration = Duration::from_secs(15);

/// Long enough for a master to look several times whether the pool can go over to a newer format.
const SEVERAL_LOOKS: Duration = Duration::from_secs(2);

/// Makes a host one of the newest version, or one of an older one again.
fn limit(lab: &Lab, host: &str, limit: Option<&str>) {
    let path = lab.dir().join(host).join("controller.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let older = format!("format_limit = {OLDER}\n");
    let text = match limit {
        None => text.replace(&older, ""),
        Some(limit) => text.replace("[store]\n", &format!("[store]\nformat_limit = {limit}\n")),
    };
    std::fs::write(&path, text).unwrap();
}

/// Puts the database in its own place, as a dry run: what it is answered, which is nothing where all is well.
async fn dry_restore(lab: &Lab, client: &mut Client) -> String {
    client.login().await.unwrap();
    let path = format!("/pool/xmldbdump?session_id={}", client.session());
    let mut connection = Connection::open(client.endpoint(), LIMIT).await.unwrap();
    let dump = connection.request(Method::GET, &path, &[], "", LIMIT).await.unwrap();
    let path = format!("{path}&dry_run=true");
    let answer = connection.request(Method::PUT, &path, &[], dump.body, LIMIT).await.unwrap();
    assert!(answer.status.is_success(), "{answer:?} of {}", lab.dir().display());
    String::from_utf8(answer.body.to_vec()).unwrap()
}

fn gone_over(lab: &Lab) -> bool {
    lab.made().hosts.iter().any(|host| log(lab, &host.name).contains("the pool goes over to it"))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_saw_fits_together_while_hosts_are_upgraded_and_an_old_one_that_comes_late_is_told_so() {
    let older = ["--wait", "60", "--format-limit", OLDER];
    let lab = Lab::with(&program().unwrap(), &std::env::temp_dir(), 3, "sim", &older).await.unwrap();
    let mut client = lab.client().await.unwrap();
    let mut load = Load::start(&lab).await.unwrap();
    load.some_more(SOME).await.unwrap();
    assert!(dry_restore(&lab, &mut client).await.contains("NOT_SUPPORTED_DURING_UPGRADE"));

    // The first one is the master, so that masters of the old version have members of the new one, and the reverse.
    let (last, first) = lab.made().hosts.split_last().unwrap();
    for host in first {
        lab.kill(&host.name, What::Controller).await.unwrap();
        load.some_more(SOME).await.unwrap();
        limit(&lab, &host.name, None);
        lab.start(&host.name, What::Controller).await.unwrap();
        load.some_more(SOME).await.unwrap();
    }
    // Now a master of the newer version writes for a member of the older one.
    if lab.status().await.unwrap().master.as_deref() == Some(&last.name) {
        lab.kill(&last.name, What::Controller).await.unwrap();
        load.some_more(SOME).await.unwrap();
        lab.start(&last.name, What::Controller).await.unwrap();
    }
    tokio::time::sleep(SEVERAL_LOOKS).await;
    load.some_more(SOME).await.unwrap();
    assert!(!gone_over(&lab), "the pool writes what one of its hosts does not read");
    assert!(dry_restore(&lab, &mut client).await.contains("NOT_SUPPORTED_DURING_UPGRADE"));

    lab.kill(&last.name, What::Controller).await.unwrap();
    limit(&lab, &last.name, None);
    lab.start(&last.name, What::Controller).await.unwrap();
    until(SOON, "the pool to go over to the newer format", async || gone_over(&lab).then_some(())).await;
    // And the last one, too: what is tried below is a database of the newer format.
    let at = "the pool is at a newer format from here on";
    until(SOON, "the last host to follow", async || log(&lab, &last.name).contains(at).then_some(())).await;
    assert_eq!(dry_restore(&lab, &mut client).await, "");
    load.some_more(SOME).await.unwrap();

    // The old version on a database of the new one ends, and says why.
    limit(&lab, &last.name, Some(OLDER));
    lab.kill(&last.name, What::Controller).await.unwrap();
    let refused = lab.start(&last.name, What::Controller).await.unwrap_err().to_string();
    for told in ["the database is of format ", "this version reads up to 1: start the newer version again, or upgrade"]
    {
        assert!(refused.contains(told), "{refused}");
    }
    load.some_more(SOME).await.unwrap();

    // One that has lost its database is sent nothing, and says why.
    for file in std::fs::read_dir(lab.dir().join(&last.name).join("controller")).unwrap().flatten() {
        // The promises stay, or the host would be a stranger.
        if file.path().is_file() && file.file_name() != "promises" {
            std::fs::remove_file(file.path()).unwrap();
        }
    }
    lab.start(&last.name, What::Controller).await.unwrap();
    let told = "the pool writes a newer format than this version reads";
    until(SOON, "the old host to say why it gets nothing", async || log(&lab, &last.name).contains(told).then_some(()))
        .await;
    load.some_more(SOME).await.unwrap();

    // Upgraded after all, it has everything again.
    lab.kill(&last.name, What::Controller).await.unwrap();
    limit(&lab, &last.name, None);
    lab.start(&last.name, What::Controller).await.unwrap();
    let whole = "all that this node had lost is there again";
    until(SOON, "the upgraded host to have everything", async || log(&lab, &last.name).contains(whole).then_some(()))
        .await;
    load.settle(&lab).await.unwrap();
}
