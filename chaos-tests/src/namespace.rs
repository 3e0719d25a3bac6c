//! Tests that mount, or make networks: each in Linux namespaces of its own, where nobody else sees it and nothing stays.

use std::process::Command;

/// What a test needs for itself.
pub struct Namespace {
    /// Flags of `unshare(1)`.
    flags: &'static [&'static str],
    /// Succeeds there where the test can be run.
    trial: &'static str,
    needs: &'static str,
}

/// Mounts that nobody else sees.
pub const MOUNTS: Namespace = Namespace { flags: &["--mount"], trial: "true", needs: "a small disk" };

/// A network without a way out, and its devices under `/sys`.
pub const NETWORK: Namespace = Namespace {
    flags: &["--mount", "--net"],
    trial: "mount -t sysfs sysfs /sys && ip link add trial type bridge && ip tuntap add mode tap",
    needs: "a bridge with a guest on it",
};

const THERE: &str = "XENITH_TEST_NAMESPACE";

impl Namespace {
    fn unshare(&self, way: &[&str]) -> Command {
        let mut command = Command::new("unshare");
        command.args(way).args(self.flags).args(["--propagation", "private"]);
        command
    }

    /// Says whether this process is in such a namespace. If not, the test of that name is run again by one that is, and is
    /// over when that has ended; where the machine allows no namespaces it says so, and the test is not run.
    ///
    /// # Panics
    /// When the test fails there.
    #[must_use]
    pub fn is_entered_for(&self, test: &str) -> bool {
        if std::env::var_os(THERE).is_some() {
            return true;
        }
        let ways: [&[&str]; 2] = [&[], &["--user", "--map-root-user"]];
        let possible = ways.iter().find(|way| {
            let tried = self.unshare(way).args(["sh", "-c", self.trial]).output();
            tried.is_ok_and(|output| output.status.success())
        });
        let (Some(way), Ok(program)) = (possible, std::env::current_exe()) else {
            eprintln!("NOT TESTED: {test} needs {}, and this machine lets us make none (see unshare(1))", self.needs);
            return false;
        };
        let mut again = self.unshare(way);
        again.arg(program).args(["--exact", test, "--nocapture"]).env(THERE, "yes");
        let ended = again.status();
        assert!(ended.is_ok_and(|status| status.success()), "{test} failed in a namespace of its own");
        false
    }
}
