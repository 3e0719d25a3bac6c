#!/usr/bin/env python3
"""The stock XenAPI.py at work in a pool that loses its masters.

Run by a test: `xenapi_py.py LAB HOST`, LAB being the lab's state as JSON and HOST the name of a host that is not the
master. Prints one JSON object for each thing it has done, and reads a line where it is to wait for the test.
"""

import contextlib
import json
import sys
import time

import XenAPI

FOLLOW_LIMIT = 30.0
EVENT_LIMIT = 20.0
WRITES = 20


def did(what, **more):
    print(json.dumps({"did": what, **more}), flush=True)


def told_to_go_on():
    if not sys.stdin.readline():
        sys.exit("the test is gone")


def check(truth, text):
    if not truth:
        sys.exit(f"xenapi_py: {text}")


class Client:
    """What a script does around XenAPI.py: it knows the hosts, and follows whoever says who the master is."""

    def __init__(self, lab, first):
        self.user, self.password = lab["user"], lab["password"]
        self.addresses = {host["address"]: host["url"] for host in lab["hosts"]}
        self.url = next(host["url"] for host in lab["hosts"] if host["name"] == first)
        self.session = None

    def log_in(self):
        """One login, which follows HOST_IS_SLAVE; whom it was sent to, if anyone."""
        sent_to = None
        for _ in range(3):
            self.session = XenAPI.Session(self.url, ignore_ssl=True)
            try:
                self.session.xenapi.login_with_password(self.user, self.password, "1.0", "xenith-test")
                return sent_to
            except XenAPI.Failure as failure:
                if failure.details[0] != "HOST_IS_SLAVE":
                    raise
                sent_to = failure.details[1]
                self.url = self.addresses[sent_to]
        sys.exit("xenapi_py: sent from host to host")

    def follow(self):
        """A login at whatever host takes it, as after the loss of a connection."""
        deadline = time.monotonic() + FOLLOW_LIMIT
        while time.monotonic() < deadline:
            for url in self.addresses.values():
                self.url = url
                with contextlib.suppress(OSError, XenAPI.Failure):
                    self.log_in()
                    return
            time.sleep(0.02)
        sys.exit("xenapi_py: no host takes the login")

    def in_session(self, handle):
        """The same host, in a session that was made before."""
        session = XenAPI.Session(self.url, ignore_ssl=True)
        session._session = handle  # as plug-ins do, which are handed a session
        return session

    @property
    def xenapi(self):
        return self.session.xenapi


class Watch:
    """The events of one VM, each of which must come once, in order, and none be missed."""

    def __init__(self, xenapi, vm):
        self.vm = vm
        self.seen = []
        self.token = xenapi.event_from([f"VM/{vm}"], "", 0.0)["token"]

    def until(self, xenapi, text):
        deadline = time.monotonic() + EVENT_LIMIT
        while time.monotonic() < deadline:
            batch = xenapi.event_from([f"VM/{self.vm}"], self.token, 5.0)
            self.token = batch["token"]
            for event in batch["events"]:
                check(event["ref"] == self.vm and event["class"] == "vm", f"an event of another object: {event}")
                self.seen.append(event["snapshot"]["name_description"])
            if self.seen and self.seen[-1] == text:
                return
        sys.exit(f"xenapi_py: no event of {text!r}; seen: {self.seen}")


def list_every_class(session):
    """Every get_all_records there is; records of one class must all have the same fields."""
    methods = session.system.listMethods()  # without a session, and a bare array
    classes = sorted(name.removesuffix(".get_all_records") for name in methods if name.endswith(".get_all_records"))
    counts = {}
    for name in classes:
        try:
            records = getattr(session.xenapi, name).get_all_records()
        except XenAPI.Failure as failure:
            check(failure.details == ["MESSAGE_REMOVED"], f"{name}.get_all_records: {failure.details}")
            counts[name] = None
            continue
        counts[name] = len(records)
        fields = {frozenset(record) for record in records.values()}
        check(len(fields) <= 1, f"records of {name} have different fields")
        check(all(ref.startswith("OpaqueRef:") for ref in records), f"{name} has strange references")
    return counts


def write_and_hear(xenapi, vm, watch, title):
    """Writes one after the other, each heard before the next: so each event must come by itself."""
    expected = [f"{title} {number}" for number in range(WRITES)]
    start = len(watch.seen)
    for text in expected:
        xenapi.VM.set_name_description(vm, text)
        watch.until(xenapi, text)
    check(watch.seen[start:] == expected, f"events came otherwise than written: {watch.seen[start:]}")


def main():
    lab, first = json.loads(sys.argv[1]), sys.argv[2]
    client = Client(lab, first)
    sent_to = client.log_in()
    did("log in", sent_to=sent_to, url=client.url)

    did("list", counts=list_every_class(client.session), version=client.session.API_version)

    templates = client.xenapi.VM.get_all_records_where('field "is_a_template" = "true"')
    check(templates, "the pool has no templates")
    template = sorted(templates, key=lambda ref: (len(templates[ref]["VBDs"]), templates[ref]["name_label"]))[0]
    vm = client.xenapi.VM.clone(template, "made by XenAPI.py")
    client.xenapi.VM.add_to_other_config(vm, "kept", "through every change of master")
    watch = Watch(client.xenapi, vm)
    write_and_hear(client.xenapi, vm, watch, "first master")
    did("write", vm=vm, url=client.url)

    # The master changes, and the host that was master lives: the client goes on at the same URL and sees nothing of it.
    told_to_go_on()
    write_and_hear(client.xenapi, vm, watch, "second master")
    did("go on at the old master", url=client.url)

    # The master's host dies: the connection may break, so the client logs in elsewhere. Its first session and its token
    # are still good.
    handle = client.session.handle
    told_to_go_on()
    client.follow()
    write_and_hear(client.xenapi, vm, watch, "third master")
    old = client.in_session(handle).xenapi
    record = old.VM.get_record(vm)
    check(record["other_config"].get("kept") == "through every change of master", "an acknowledged write is lost")
    write_and_hear(old, vm, watch, "first session")
    did("follow", url=client.url)

    # The dead host is back; a login there leads to the master again.
    told_to_go_on()
    client.url = lab_url(lab, first)
    client.log_in()
    check(sorted(list_every_class(client.session)), "no classes")
    client.xenapi.VM.destroy(vm)
    client.session.xenapi.session.logout()
    did("end")


def lab_url(lab, name):
    return next(host["url"] for host in lab["hosts"] if host["name"] == name)


if __name__ == "__main__":
    main()
