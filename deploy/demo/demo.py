#!/usr/bin/env python3
"""The main job, done with the stock XenAPI.py: a pool that loses its master and goes on.

Three hosts on this machine form a pool. A client logs in at a host that is not the master and follows HOST_IS_SLAVE,
clones a template, starts a real guest and watches its events. Then the master's host is killed, and the client goes on
at the next master: the guest still runs, and what was written is still there.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import XenAPI

BOLD, DIM, PLAIN = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")
FAILOVER_LIMIT = 30.0
EVENT_LIMIT = 60.0
BOOT_LIMIT = 120.0


def say(text=""):
    print(text, flush=True)


def step(text):
    say(f"\n{BOLD}{text}{PLAIN}")


class Lab:
    """A lab in a directory of its own; every command answers with its state."""

    def __init__(self, program, directory):
        self.program = program
        self.directory = directory

    def run(self, *arguments):
        command = [self.program, "lab", arguments[0], "--dir", self.directory, *arguments[1:]]
        say(f"{DIM}$ {' '.join(command)}{PLAIN}")
        done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
        if done.returncode != 0:
            sys.exit(f"demo: `xenith lab {arguments[0]}` failed")
        return json.loads(done.stdout)


def name_of(state, address):
    return next(host["name"] for host in state["hosts"] if host["address"] == address)


def url_at(host, address):
    """The host's URL with another host's address: clients keep the port."""
    return host["url"].replace(host["address"], address)


def connect(url, user, password):
    """One login, without following anybody anywhere."""
    session = XenAPI.Session(url, ignore_ssl=True)
    session.xenapi.login_with_password(user, password, "1.0", "xenith-demo")
    return session


def log_in(hosts, user, password, verbose=False):
    """What every XenAPI client does: try a host, follow HOST_IS_SLAVE, try the next one when nobody answers."""
    for host in hosts:
        url = host["url"]
        for _ in range(3):
            try:
                return connect(url, user, password), url
            except XenAPI.Failure as failure:
                if failure.details[0] != "HOST_IS_SLAVE":
                    break
                if verbose:
                    say(f"  {host['name']} answered {failure.details}: following it")
                url = url_at(host, failure.details[1])
            except OSError:
                break
    return None, None


def wait_for_event(session, token, vm, wanted, seen):
    """Follows the VM's events until its power state is the wanted one."""
    deadline = time.monotonic() + EVENT_LIMIT
    while time.monotonic() < deadline:
        batch = session.xenapi.event_from(["VM"], token, 5.0)
        token = batch["token"]
        for event in batch["events"]:
            if event["ref"] != vm or "snapshot" not in event:
                continue
            state = event["snapshot"]["power_state"]
            busy = ",".join(event["snapshot"]["current_operations"].values()) or "idle"
            if (state, busy) != seen:
                seen = (state, busy)
                say(f"  event {event['id']:>4}: {event['operation']} VM, power_state {state}, {busy}")
            if state == wanted and busy == "idle":
                return token
    sys.exit(f"demo: no event said that the VM is {wanted}")


def show_hosts(session, state):
    master = session.xenapi.pool.get_master(session.xenapi.pool.get_all()[0])
    for reference, host in sorted(session.xenapi.host.get_all_records().items(), key=lambda item: item[1]["address"]):
        mark = "master" if reference == master else ""
        say(f"  {name_of(state, host['address'])}  {host['address']:<13} {host['uuid']}  {mark}")


def find_template(session):
    templates = session.xenapi.VM.get_all_records_where('field "is_a_template" = "true"')
    ready = {ref: vm for ref, vm in templates.items() if vm["PV_kernel"] and not vm["is_a_snapshot"]}
    if not ready:
        sys.exit("demo: the pool has no template with a guest to boot")
    return sorted(ready.items(), key=lambda item: item[1]["name_label"])[0]


def guest_says(lab, host, uuid):
    """The guest counts its seconds on its console, which QEMU writes into a file."""
    path = os.path.join(lab.directory, host["name"], "agent", "domains", uuid, "console.log")
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as console:
        counts = [int(line.split()[1]) for line in console if line.startswith("XENITH-GUEST ") and line.endswith("\n")]
        return counts[-1] if counts else None
    return None


def wait_for_guest(lab, host, uuid, beyond):
    deadline = time.monotonic() + BOOT_LIMIT
    while time.monotonic() < deadline:
        count = guest_says(lab, host, uuid)
        if count is not None and count > beyond:
            return count
        time.sleep(0.1)
    sys.exit("demo: the guest says nothing on its console")


def failover(state, hosts, vm, host_to_kill, lab):
    """Kills the master's host; milliseconds until a write is acknowledged by the next master."""
    user, password = state["user"], state["password"]
    started = time.monotonic()
    victim = next(host for host in state["hosts"] if host["name"] == host_to_kill)
    for pid in (victim["controller_pid"], victim["agent_pid"]):
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    while time.monotonic() - killed < FAILOVER_LIMIT:
        session, url = log_in(hosts, user, password)
        if session:
            try:
                session.xenapi.VM.set_name_description(vm, "written after the master was lost")
                taken = (time.monotonic() - started) * 1000
                lab.run("kill", host_to_kill)  # what the two signals above left of the host: its domains
                return session, url, taken
            except (XenAPI.Failure, OSError):
                pass
        time.sleep(0.01)
    sys.exit(f"demo: no new master within {FAILOVER_LIMIT:.0f} s")


def demo(lab):
    step("1. Three hosts, one pool")
    state = lab.run("up", "--hosts", "3", "--driver", "qemu")
    user, password = state["user"], state["password"]
    master = state["master"]
    others = [host for host in state["hosts"] if host["name"] != master]

    step(f"2. Logging in at {others[0]['name']}, which is not the master, with XenAPI.py {XenAPI.__file__}")
    session, url = log_in(others, user, password, verbose=True)
    if session is None:
        sys.exit("demo: nobody took the login")
    say(f"  logged in at {url}")
    show_hosts(session, state)

    step("3. Cloning a template")
    template, record = find_template(session)
    say(f"  template: {record['name_label']}")
    token = session.xenapi.event_from(["VM"], "", 0.0)["token"]
    vm = session.xenapi.VM.clone(template, "demo guest")
    session.xenapi.VM.provision(vm)
    uuid = session.xenapi.VM.get_uuid(vm)
    session.xenapi.VM.add_to_other_config(vm, "demo", "written before the master was lost")
    say(f"  VM {uuid}")

    target = others[-1]
    step(f"4. Starting it on {target['name']}: a real QEMU process")
    host = session.xenapi.host.get_by_uuid(target["uuid"])
    task = session.xenapi.Async.VM.start_on(vm, host, False, False)
    wait_for_event(session, token, vm, "Running", None)
    while session.xenapi.task.get_status(task) == "pending":
        time.sleep(0.05)
    status = session.xenapi.task.get_status(task)
    if status != "success":
        sys.exit(f"demo: the start ended as {status}: {session.xenapi.task.get_error_info(task)}")
    session.xenapi.task.destroy(task)
    say(f"  it runs on {name_of(state, session.xenapi.host.get_address(session.xenapi.VM.get_resident_on(vm)))}")
    booted = wait_for_guest(lab, target, uuid, 0)
    say(f"  its Linux is up and counts seconds on its console: {booted}")

    step(f"5. Killing the master's host, {master}, with SIGKILL")
    session, url, taken = failover(state, others, vm, master, lab)
    say(f"  {BOLD}{taken:.0f} ms{PLAIN} from the kill to the first acknowledged write, at {url}")

    step("6. What is left of it all")
    state = lab.run("status")
    show_hosts(session, state)
    record = session.xenapi.VM.get_record(vm)
    say(f"  VM {record['uuid']} is {record['power_state']} on "
        f"{name_of(state, session.xenapi.host.get_address(record['resident_on']))}")
    say(f"  its console counts on: {wait_for_guest(lab, target, uuid, booted)}")
    say(f"  other_config:demo = {record['other_config'].get('demo')!r}")
    say(f"  name_description  = {record['name_description']!r}")
    if record["power_state"] != "Running" or record["other_config"].get("demo") != "written before the master was lost":
        sys.exit("demo: something was lost")
    return state


def tell_the_rest(lab, state):
    host = next(host for host in state["hosts"] if host["name"] == state["master"])
    python = sys.executable
    step("Look around yourself")
    say(f"""  The pool is still up, in {lab.directory}; {next(h["name"] for h in state["hosts"] if h["state"] == "dead")} is dead. At the Unix socket any password will do:

    curl -s --unix-socket {host["socket"]} http://localhost/jsonrpc -d \\
      '{{"jsonrpc":"2.0","id":1,"method":"session.login_with_password","params":["{state["user"]}",""]}}'

    {python} -i -c '
import XenAPI
session = XenAPI.Session("{host["url"]}", ignore_ssl=True)
session.xenapi.login_with_password("{state["user"]}", "{state["password"]}", "1.0", "me")
print(session.xenapi.VM.get_all_records())'

    {lab.program} lab status --dir {lab.directory}
    {lab.program} lab start  --dir {lab.directory} HOST     # the dead one comes back
    {lab.program} lab down   --dir {lab.directory}          # the end of it
""")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--xenith", required=True, help="the xenith program")
    parser.add_argument("--dir", help="directory of the lab (default: a new one; an old demo's lab there is replaced)")
    parser.add_argument("--down", action="store_true", help="stop the pool at the end, rather than leave it to look around")
    return parser.parse_args()


def main():
    flags = parse()
    directory = os.path.abspath(flags.dir or os.path.join(tempfile.gettempdir(), f"xenith-demo-{os.getuid()}"))
    lab = Lab(os.path.abspath(flags.xenith), directory)
    quietly = {"stdout": subprocess.DEVNULL, "check": False}

    def clean_up():
        if os.path.exists(os.path.join(directory, "lab.json")):
            subprocess.run([lab.program, "lab", "down", "--dir", directory], **quietly)
        shutil.rmtree(directory, ignore_errors=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("demo: told to end"))
    clean_up()
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(clean_up)
        state = demo(lab)
        if not flags.down:
            tell_the_rest(lab, state)
            on_failure.pop_all()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("demo: interrupted")
