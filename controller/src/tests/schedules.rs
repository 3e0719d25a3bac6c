//! Scheduled snapshots.

use datamodel::enums::VmssFrequency;
use datamodel::fields::{message, vm, vmss};
use datamodel::{Input, Message, Ref, Vmss};

use super::{Pool, reference, text};

fn record(kind: &str, frequency: &str, schedule: &[(&str, &str)]) -> Input {
    let schedule = schedule.iter().map(|(key, value)| ((*key).to_owned(), text(*value))).collect();
    Input::Struct(vec![
        ("name_label".to_owned(), text("nightly")),
        ("type".to_owned(), text(kind)),
        ("frequency".to_owned(), text(frequency)),
        ("schedule".to_owned(), Input::Struct(schedule)),
        ("retained_snapshots".to_owned(), Input::Int(2)),
    ])
}

async fn schedule(pool: &Pool, frequency: &str, entries: &[(&str, &str)]) -> Ref<Vmss> {
    let made = pool.ask("VMSS.create", vec![record("snapshot", frequency, entries)]).await.unwrap();
    Ref::from_opaque(reference(&made))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_is_checked_when_it_is_made_and_when_it_is_changed() {
    let pool = Pool::start().await;
    for (kind, frequency, entries, code) in [
        ("snapshot", "daily", &[("hour", "25"), ("min", "0")][..], "INVALID_VALUE"),
        ("snapshot", "hourly", &[("min", "7")], "INVALID_VALUE"),
        ("snapshot", "weekly", &[("days", "someday")], "INVALID_VALUE"),
        ("snapshot_with_quiesce", "hourly", &[("min", "0")], "VALUE_NOT_SUPPORTED"),
    ] {
        assert_eq!(pool.refusal("VMSS.create", vec![record(kind, frequency, entries)]).await[0], code, "{entries:?}");
    }
    let this = schedule(&pool, "hourly", &[("min", "15")]).await;
    let ask = |name: &str, value: Input| (format!("VMSS.{name}"), vec![text(this.to_string()), value]);
    let (name, arguments) = ask("set_frequency", text("weekly"));
    pool.ask(&name, arguments).await.unwrap();
    let row = pool.get(this).await;
    assert_eq!(row.get(vmss::FREQUENCY), VmssFrequency::Weekly);
    let said = row.get(vmss::SCHEDULE);
    assert_eq!((said["min"].as_str(), said["hour"].as_str(), said["days"].as_str()), ("15", "0", "monday"));
    for (name, value) in [
        ("set_retained_snapshots", Input::Int(0)),
        ("set_retained_snapshots", Input::Int(11)),
        ("set_schedule", Input::Struct(vec![("min".to_owned(), text("0"))])),
    ] {
        let (name, arguments) = ask(name, value);
        assert_eq!(pool.refusal(&name, arguments).await[0], "INVALID_VALUE", "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_with_vms_stays() {
    let pool = Pool::start().await;
    let this = schedule(&pool, "hourly", &[("min", "0")]).await;
    let member = pool.vm("kept").await;
    pool.ask("VM.set_snapshot_schedule", vec![text(member.to_string()), text(this.to_string())]).await.unwrap();
    assert_eq!(pool.refusal("VMSS.destroy", vec![text(this.to_string())]).await, ["VMSS_HAS_VM"]);
    let none = text("OpaqueRef:NULL");
    pool.ask("VM.set_snapshot_schedule", vec![text(member.to_string()), none]).await.unwrap();
    assert!(pool.get(member).await.get(vm::SNAPSHOT_SCHEDULE).is_null());
    pool.ask("VMSS.destroy", vec![text(this.to_string())]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_runs_when_it_is_due_and_says_so_once() {
    let pool = Pool::start().await;
    pool.clock.advance(60);
    let this = schedule(&pool, "hourly", &[("min", "0")]).await;
    // The schedules are looked at, and nothing is due that was so before this one was made.
    tokio::time::sleep(std::time::Duration::from_secs(6)).await;
    assert_eq!(pool.get(this).await.get(vmss::LAST_RUN_TIME).0, 0);
    pool.clock.advance(3600);
    let told = |state: &raft_store::State| {
        let rows = state.all::<Message>().filter(|row| row.get(message::NAME) == "VMSS_SNAPSHOT_SUCCEEDED");
        rows.count()
    };
    pool.until(|state| told(state) == 1).await;
    let ran = pool.get(this).await.get(vmss::LAST_RUN_TIME);
    assert!(ran.0 > 0);
    tokio::time::sleep(std::time::Duration::from_secs(6)).await;
    assert_eq!(told(&pool.store().state()), 1, "once");
}
