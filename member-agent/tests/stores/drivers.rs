//! What is one driver's own.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use member_agent::StoreChoice;
use proto::agent::refusal::Reason;
use proto::agent::step::Action;
use proto::agent::*;
use uuid::Uuid;

use crate::common::store::*;
use crate::common::*;

/// A small file system, or none where this user may not mount.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path, size: &str) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let mut command = Command::new("mount");
        let mounted = command.args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]).arg(at).output().unwrap();
        if !mounted.status.success() {
            eprintln!("not tested: this user may not mount");
            return None;
        }
        Some(Self(at.to_owned()))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[tokio::test]
async fn a_full_store_says_how_much_is_missing_and_keeps_nothing_of_what_did_not_fit() {
    let mut place = Place::of("file").await;
    let Some(_small) = Small::mount(&place.host.config.state_dir.join("storage/local"), "6m") else { return };
    let vdi = place.made(64 * MIB).await;
    place.write(vdi, 7, "0 3M");
    let before = place.scan().await;
    assert!(before.physical_size == 6 * MIB && before.physical_utilisation >= 3 * MIB, "{before:?}");
    let (copy, clone) = (Uuid::new_v4(), Uuid::new_v4());
    let step = place.copy(vdi, copy);
    let refusal = place.volume_step(step).await.expect_err("does not fit");
    assert_eq!(refusal.reason(), Reason::NoSpace, "{refusal:?}");
    assert!(refusal.needed > refusal.available && refusal.available > MIB, "{refusal:?}");
    let after = place.scan().await;
    assert_eq!((after.physical_utilisation, after.volumes.len()), (before.physical_utilisation, 1));
    // Until there is no room for even an empty image.
    let filler = place.dir().join("filler");
    let _ = fs::write(&filler, vec![1; 6 * 1024 * 1024]);
    for step in [place.clone_of(vdi, clone), place.create_of(clone, 8 * MIB, "user")] {
        assert_eq!(why(place.volume_step(step).await), Reason::NoSpace);
    }
    assert_eq!(place.vdis().await, [vdi.to_string()].into());
    fs::remove_file(filler).unwrap();
    let step = place.clone_of(vdi, clone);
    place.volume_step(step).await.expect("there is room again");
    place.all_clean();
}

#[tokio::test]
async fn cd_images_are_volumes_of_their_names_that_nobody_changes() {
    let host = Host::start_with("sim", |config| config.stores = StoreChoice::Real).await;
    let discs = host.config.state_dir.join("discs");
    fs::create_dir(&discs).unwrap();
    fs::write(discs.join("Debian 13.iso"), vec![1; 4096]).unwrap();
    fs::write(discs.join("notes.txt"), b"none").unwrap();
    let config = HashMap::from([("location".to_owned(), discs.display().to_string())]);
    let mut place = Place::on(host, "iso", config).await;
    let found = place.scan().await.volumes;
    let [disc] = found.as_slice() else { panic!("one disc: {found:?}") };
    assert_eq!((disc.location.as_str(), disc.name.as_str()), ("Debian 13.iso", "Debian 13.iso"));
    assert!(disc.read_only && disc.virtual_size == 4096 && disc.vdi.is_empty());
    let create = place.create_of(Uuid::new_v4(), MIB, "user");
    assert_eq!(why(place.volume_step(create).await), Reason::Unsupported);
    place.store.device_config.insert("location".to_owned(), "/there/is/none".to_owned());
    let attach = place.attach();
    assert_eq!(why(place.store_step(attach).await), Reason::NoSuchStore);
    place.store.device_config.clear();
    let attach = place.attach();
    let refusal = place.store_step(attach).await.expect_err("no location");
    assert_eq!(refusal.reason(), Reason::BadConfig);
    assert!(refusal.detail.starts_with("location"), "{refusal:?}");
}

#[tokio::test]
async fn one_directory_is_not_two_stores() {
    let host = Host::start_with("sim", |config| config.stores = StoreChoice::Real).await;
    let dir = host.config.state_dir.join("images");
    fs::create_dir(&dir).unwrap();
    let config = HashMap::from([("location".to_owned(), dir.display().to_string())]);
    let mut place = Place::on(host, "file", config).await;
    let attach = place.attach();
    place.store_step(attach).await.expect("attached");
    place.store.sr = Uuid::new_v4().to_string();
    let attach = place.attach();
    assert_eq!(why(place.store_step(attach).await), Reason::BadConfig);
}

#[tokio::test]
async fn a_device_is_formatted_mounted_known_again_and_let_go_of() {
    let host = Host::start_with("sim", |config| config.stores = StoreChoice::Real).await;
    // Which loop devices there are is the kernel's business; without any this cannot be tried.
    if !Command::new("losetup").arg("-f").output().is_ok_and(|output| output.status.success()) {
        eprintln!("not tested: this user has no loop device");
        return;
    }
    let device = host.config.state_dir.join("device");
    fs::File::create(&device).unwrap().set_len(32 * MIB).unwrap();
    let config = HashMap::from([("device".to_owned(), device.display().to_string())]);
    let mut place = Place::on(host, "ext", config).await;
    let store = Some(place.store.clone());
    let attach = place.attach();
    assert_eq!(why(place.store_step(attach.clone()).await), Reason::NoSuchStore);
    let create = Action::CreateStore(CreateStore { store: store.clone(), physical_size: 0 });
    place.store_step(create).await.expect("made");
    let probed = place.store_step(place.probe()).await.expect("probed").probed;
    assert_eq!(probed[0].sr, place.store.sr);
    let size = place.store_step(attach.clone()).await.expect("attached").physical_size;
    assert!(size > 16 * MIB && size < 32 * MIB, "{size}");
    let vdi = place.made(8 * MIB).await;
    // The agent dies and comes back; the file system is still there, and so is what is in it.
    place.host.stop_agent().await;
    place.host.start_agent().await;
    place.client = place.host.client().await;
    let mut other = place.store.clone();
    other.sr = Uuid::new_v4().to_string();
    let attach_other = Action::AttachStore(AttachStore { store: Some(other) });
    assert_eq!(why(place.store_step(attach_other).await), Reason::BadConfig);
    let detach = Action::DetachStore(DetachStore { store: store.clone() });
    place.store_step(detach.clone()).await.expect("let go of");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&place.store.sr), "{mounts}");
    assert_eq!(place.vdis().await, [vdi.to_string()].into());
    place.store_step(detach).await.expect("let go of");
}

/// Programs of ours in the place of the machine's.
fn programs(host: &mut Host, scripts: &[(&str, &str)]) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let dir = host.dir.path().join("programs");
    fs::create_dir_all(&dir).unwrap();
    for (name, script) in scripts {
        fs::write(dir.join(name), format!("#!/bin/sh\n{script}")).unwrap();
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    host.config.programs = Some(dir.clone());
    dir
}

/// What is said to mount. A directory takes its place, and all but the mount itself is real.
#[tokio::test]
async fn an_export_is_mounted_for_its_store_and_unmounted_after_it() {
    let mut host = Host::without_agent("sim", |config| config.stores = StoreChoice::Real);
    let export = host.dir.path().join("export");
    let Some(small) = Small::mount(&export, "16m") else { return };
    let script = format!(
        "echo \"$@\" >> {0}/asked\n[ \"$4\" = ok ] && exit 1\nfor point; do :; done\nexec /bin/mount --bind {1} \"$point\"",
        host.dir.path().display(),
        export.display()
    );
    programs(&mut host, &[("mount", &script)]);
    host.start_agent().await;
    let config = [("server", "10.0.0.7"), ("serverpath", "/srv/vms"), ("nfsversion", "4.1")];
    let config = config.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let mut place = Place::on(host, "nfs", config).await;
    let store = Some(place.store.clone());
    let mounted =
        || fs::read_to_string("/proc/self/mounts").unwrap().contains(&format!("mounts/{}", store.as_ref().unwrap().sr));
    let attach = place.attach();
    let refusal = place.store_step(attach.clone()).await.expect_err("there is no such store yet");
    assert_eq!(refusal.reason(), Reason::NoSuchStore);
    assert!(refusal.detail.contains("10.0.0.7:/srv/vms") && !mounted(), "{refusal:?}");
    place.store_step(Action::CreateStore(CreateStore { store: store.clone(), physical_size: 0 })).await.expect("made");
    let probed = place.store_step(place.probe()).await.expect("probed").probed;
    assert_eq!((probed.len(), probed[0].sr.as_str()), (1, place.store.sr.as_str()));
    assert!(!mounted());
    assert_eq!(place.store_step(attach).await.expect("attached").physical_size, 16 * MIB);
    place.made(8 * MIB).await;
    assert!(mounted() && export.join(&place.store.sr).is_dir());
    place.store_step(Action::DetachStore(DetachStore { store: store.clone() })).await.expect("let go of");
    assert!(!mounted());
    let asked = fs::read_to_string(place.host.dir.path().join("asked")).unwrap();
    assert!(
        asked.lines().all(|line| line.starts_with("-t nfs -o soft,") && line.contains(",vers=4.1 10.0.0.7:/srv/vms /"))
    );
    for (key, value) in [("server", "a,b"), ("serverpath", "srv"), ("nfsversion", "5"), ("server", "")] {
        let mut other = place.store.clone();
        other.device_config.insert(key.to_owned(), value.to_owned());
        let refusal = place.store_step(Action::AttachStore(AttachStore { store: Some(other) })).await.expect_err(value);
        assert_eq!(refusal.reason(), Reason::BadConfig);
        assert!(refusal.detail.starts_with(key), "{refusal:?}");
    }
    // Before the directory that it is in.
    drop(small);
}

#[tokio::test]
async fn an_export_that_cannot_be_mounted_is_no_store_and_says_what_mount_said() {
    let mut host = Host::without_agent("sim", |config| config.stores = StoreChoice::Real);
    programs(&mut host, &[("mount", "echo 'mount.nfs: Connection refused' >&2; exit 32")]);
    host.start_agent().await;
    let config = [("server", "10.0.0.7"), ("serverpath", "/srv/vms")];
    let config = config.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let mut place = Place::on(host, "nfs", config).await;
    let attach = place.attach();
    let refusal = place.store_step(attach).await.expect_err("no server");
    assert_eq!(refusal.reason(), Reason::NoSuchStore);
    assert!(refusal.detail.contains("Connection refused"), "{refusal:?}");
}

/// A volume group of files: name, size and permission. It knows the words that the driver uses, as LVM's manuals have
/// them, and nothing else.
const VOLUME_GROUP: &str = r#"
cd "$(dirname "$0")" && mkdir -p group && me=$(basename "$0")
echo "$me $*" >> said
value() { want=$1; shift; while [ $# -gt 1 ]; do [ "$1" = "$want" ] && { echo "$2"; return; }; shift; done; }
for last; do :; done; lv=${last##*/}; name=$(value -n "$@")
case $me in
  vgcreate) touch group/.made ;;
  vgremove) rm -rf group ;;
  pvs) [ -e group/.made ] && echo "  $(cat named)" || true ;;
  pvcreate|pvremove|vgchange|lvchange) ;;
  lvcreate) case "$*" in
      *thin-pool*) echo "${last}" > named; echo "1000000000 rw" > group/pool ;;
      *--thinpool*) size=$(value -V "$@"); echo "${size%b} rw" > "group/$name" ;;
      *) read -r size _ < "group/$lv" && echo "$size $(value -p "$@")" > "group/$name" ;;
    esac ;;
  lvresize) size=$(value -L "$@"); read -r _ mode < "group/$lv" && echo "${size%b} $mode" > "group/$lv" ;;
  lvrename) shift 2; mv "group/$1" "group/$2" ;;
  lvremove) rm "group/$lv" ;;
  lvs) [ -e group/.made ] || { echo "  Volume group \"$last\" not found" >&2; exit 5; }
    printf '{"report":[{"lv":['; comma=
    for file in group/*; do read -r size mode < "$file"
      [ "$mode" = r ] && attr=Vri-a-tz-- || attr=Vwi-a-tz--
      printf '%s{"lv_name":"%s","lv_size":"%s","lv_attr":"%s","data_percent":"10.00","origin":""}' "$comma" "${file##*/}" "$size" "$attr"; comma=,
    done; echo ']}]}' ;;
  *) echo "unknown: $me" >&2; exit 1 ;;
esac
"#;

/// What is said to LVM, also after a crash between two of its commands.
#[tokio::test]
async fn volumes_of_a_volume_group_come_from_its_pool_and_go_back_by_their_names() {
    let mut host = Host::without_agent("sim", |config| config.stores = StoreChoice::Real);
    let names = ["pvcreate", "vgcreate", "lvcreate", "lvs", "pvs", "lvresize", "lvrename", "lvremove", "vgchange"];
    let more = ["lvchange", "vgremove", "pvremove"];
    let scripts: Vec<_> = names.into_iter().chain(more).map(|name| (name, VOLUME_GROUP)).collect();
    let dir = programs(&mut host, &scripts);
    host.start_agent().await;
    let config = HashMap::from([("device".to_owned(), "/dev/sdx,/dev/sdy".to_owned())]);
    let mut place = Place::on(host, "lvm", config).await;
    let store = Some(place.store.clone());
    let attach = place.attach();
    assert_eq!(why(place.store_step(attach.clone()).await), Reason::NoSuchStore);
    place.store_step(Action::CreateStore(CreateStore { store: store.clone(), physical_size: 0 })).await.expect("made");
    let probed = place.store_step(place.probe()).await.expect("probed").probed;
    assert_eq!(probed[0].sr, place.store.sr);
    let sizes = place.store_step(attach).await.expect("attached");
    assert_eq!((sizes.physical_size, sizes.physical_utilisation), (1_000_000_000, 100_000_000));
    let vdi = place.made(8 * MIB).await;
    let (snapshot, clone) = (Uuid::new_v4(), Uuid::new_v4());
    let step = place.snapshot(vdi, snapshot);
    assert!(place.volume_step(step).await.expect("snapshot").read_only);
    let step = place.clone_of(vdi, clone);
    assert!(!place.volume_step(step).await.expect("clone").read_only);
    let step = place.resize(vdi, 16 * MIB);
    assert_eq!(place.volume_step(step).await.expect("grown").virtual_size, 16 * MIB);
    let step = place.revert(vdi, snapshot);
    assert_eq!(place.volume_step(step).await.expect("goes back").virtual_size, 8 * MIB);
    // Died on the way back: the old name is put aside, and the new one is there or not.
    fs::rename(dir.join(format!("group/{vdi}")), dir.join(format!("group/old-{vdi}"))).unwrap();
    assert!(place.vdis().await.contains(&vdi.to_string()));
    fs::rename(dir.join(format!("group/{vdi}")), dir.join(format!("group/old-{vdi}"))).unwrap();
    fs::copy(dir.join(format!("group/{clone}")), dir.join(format!("group/new-{vdi}"))).unwrap();
    assert_eq!(place.vdis().await, [vdi, snapshot, clone].map(|vdi| vdi.to_string()).into());
    let left = fs::read_dir(dir.join("group")).unwrap().filter_map(Result::ok).map(|entry| entry.file_name());
    assert!(left.into_iter().all(|name| !name.to_string_lossy().contains(&format!("-{vdi}"))));
    for vdi in [vdi, snapshot, clone] {
        let step = place.destroy(vdi);
        place.volume_step(step).await.expect("gone");
    }
    place.store_step(Action::DestroyStore(DestroyStore { store })).await.expect("destroyed");
    let said = fs::read_to_string(dir.join("said")).unwrap();
    assert!(said.contains("pvcreate -q -y -ff /dev/sdx /dev/sdy\n"), "{said}");
    assert!(
        said.contains(&format!("lvcreate -q -y -s -kn -p r -n {snapshot} xenith-{}/{vdi}\n", place.store.sr)),
        "{said}"
    );
}

#[tokio::test]
async fn simulated_stores_fail_and_are_full_on_order() {
    let mut place = Place::of("sim").await;
    place.store.device_config.insert("physical_size".to_owned(), (20 * MIB).to_string());
    let vdi = place.made(8 * MIB).await;
    let create = place.create_of(Uuid::new_v4(), 16 * MIB, "user");
    let refusal = place.volume_step(create).await.expect_err("full");
    assert_eq!((refusal.reason(), refusal.needed, refusal.available), (Reason::NoSpace, 16 * MIB, 12 * MIB));
    place.host.order("[[fail_next]]\nstep = \"snapshot_volume\"\nreason = \"failed\"\ndetail = \"on order\"\n");
    let step = place.snapshot(vdi, Uuid::new_v4());
    let refusal = place.volume_step(step.clone()).await.expect_err("on order");
    assert_eq!((refusal.reason(), refusal.detail.as_str()), (Reason::Failed, "on order"));
    let step = place.snapshot(vdi, Uuid::new_v4());
    place.volume_step(step).await.expect("only once");
}

#[tokio::test(flavor = "multi_thread")]
async fn stores_that_come_at_once_are_all_known_to_the_next_agent() {
    let mut place = Place::of("file").await;
    let mut attaching = tokio::task::JoinSet::new();
    for _ in 0..32 {
        let (mut client, sr) = (place.client.clone(), Uuid::new_v4());
        let store = Store { sr: sr.to_string(), ..place.store.clone() };
        let step = Step {
            pool: POOL.to_owned(),
            epoch: client.epoch,
            operation: operation(),
            vm: sr.to_string(),
            action: Some(Action::AttachStore(AttachStore { store: Some(store) })),
            ..Step::default()
        };
        attaching.spawn(async move { client.calls.perform(step).await.expect("call").into_inner().result });
    }
    for outcome in attaching.join_all().await {
        assert!(matches!(outcome, Some(outcome::Result::Store(_))), "{outcome:?}");
    }
    place.host.stop_agent().await;
    let kept = fs::read_to_string(place.host.config.state_dir.join("stores.json")).expect("kept");
    assert_eq!(kept.matches("\"sr\"").count(), 32, "{kept}");
    place.host.start_agent().await;
}
