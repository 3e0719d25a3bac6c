#!/usr/bin/env python3
"""The sample flows of the SDK's documents with the stock XenAPI.py: install from a template, power-cycle, start behind a
task, watch all events.

Run by a test: `sdk_flows.py LAB`, LAB being the lab's state as JSON; its guests are real. Prints one JSON object for each
flow that it has come through.
"""

import json
import sys
import threading
import time

import XenAPI

MIB = 1 << 20
GUEST_LIMIT = 120.0
EVENT_LIMIT = 20.0


def did(what, **more):
    print(json.dumps({"did": what, **more}), flush=True)


def check(truth, text):
    if not truth:
        sys.exit(f"sdk_flows: {text}")


def log_in(lab):
    url = next(host["url"] for host in lab["hosts"] if host["name"] == lab["master"])
    session = XenAPI.Session(url, ignore_ssl=True)
    session.xenapi.login_with_password(lab["user"], lab["password"], "1.0", "xenith-test")
    return session


def until(limit, what, ask):
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        answer = ask()
        if answer:
            return answer
        time.sleep(0.2)
    sys.exit(f"sdk_flows: not within {limit:.0f} s: {what}")


def install(x):
    """A network by its PIF, a template by its name, a disk on the default SR; then the guest says what it is."""
    pifs = x.PIF.get_all_records()
    lowest = min(pifs, key=lambda ref: pifs[ref]["device"])
    network = pifs[lowest]["network"]
    vms = x.VM.get_all_records()
    templates = [ref for ref, vm in vms.items() if vm["is_a_template"] and "Xenith guest" in vm["name_label"]]
    check(templates, "no template of the small guest")
    vm = x.VM.clone(templates[0], "installed by a script")
    x.VM.set_name_description(vm, "made from a template")
    vif = {
        "device": "0",
        "network": network,
        "VM": vm,
        "MAC": "",
        "MTU": "1500",
        "qos_algorithm_type": "",
        "qos_algorithm_params": {},
        "other_config": {},
    }
    x.VIF.create(vif)
    x.VM.set_PV_args(vm, f"{x.VM.get_PV_args(vm)} noninteractive".strip())
    sr = x.pool.get_default_SR(x.pool.get_all()[0])
    disk = f'<disk device="0" size="{64 * MIB}" sr="{x.SR.get_uuid(sr)}" bootable="true" type="system"/>'
    x.VM.add_to_other_config(vm, "disks", f"<provision>{disk}</provision>")
    x.VM.provision(vm)
    check(len(x.VM.get_VBDs(vm)) == 1, "the disk was not made")
    x.VM.start(vm, False, False)
    check(x.VM.get_power_state(vm) == "Running", "it does not run")

    def os_version():
        metrics = x.VM.get_guest_metrics(vm)
        return metrics != "OpaqueRef:NULL" and x.VM_guest_metrics.get_os_version(metrics)

    def address():
        metrics = x.VM.get_guest_metrics(vm)
        return metrics != "OpaqueRef:NULL" and x.VM_guest_metrics.get_networks(metrics).get("0/ip")

    version = until(GUEST_LIMIT, "the guest to say what it is", os_version)
    until(GUEST_LIMIT, "the guest to have an address", address)
    did("install", vm=vm, os=version)
    return vm


def power_cycle(x, vm):
    """Every state and back."""

    def go(call, state, *arguments):
        getattr(x.VM, call)(vm, *arguments)
        check(x.VM.get_power_state(vm) == state, f"{call}: {x.VM.get_power_state(vm)}")

    go("pause", "Paused")
    go("unpause", "Running")
    go("suspend", "Suspended")
    go("resume", "Running", False, False)
    go("clean_reboot", "Running")

    def answers():
        metrics = x.VM.get_guest_metrics(vm)
        return metrics != "OpaqueRef:NULL" and x.VM_guest_metrics.get_live(metrics)

    until(GUEST_LIMIT, "the guest to be up again", answers)
    go("clean_shutdown", "Halted")
    go("start", "Paused", True, False)
    go("unpause", "Running")
    go("hard_reboot", "Running")
    go("hard_shutdown", "Halted")
    try:
        x.VM.pause(vm)
        check(False, "a halted VM was paused")
    except XenAPI.Failure as failure:
        check(failure.details[0] == "VM_BAD_POWER_STATE", failure.details)
    did("power-cycle")


def start_behind_a_task(x, vm):
    task = x.Async.VM.start(vm, False, False)
    until(GUEST_LIMIT, "the task to end", lambda: x.task.get_status(task) != "pending")
    record = x.task.get_record(task)
    check(record["status"] == "success", record)
    check(record["progress"] == 1.0 and record["name_label"] == "Async.VM.start", record)
    x.task.destroy(task)
    check(x.VM.get_power_state(vm) == "Running", "it does not run")
    failing = x.Async.VM.start(vm, False, False)
    until(EVENT_LIMIT, "the second task to end", lambda: x.task.get_status(failing) != "pending")
    error = x.task.get_error_info(failing)
    check(error[0] == "VM_BAD_POWER_STATE", error)
    did("asynchronous start")


def watch_all_events(lab, x, vm):
    """The old interface as the sample has it, and the new one."""
    x.event.register(["*"])
    other = log_in(lab)

    def change():
        time.sleep(0.5)
        other.xenapi.VM.set_name_description(vm, "heard by everybody")
        other.xenapi.VM.hard_shutdown(vm)

    changing = threading.Thread(target=change)
    changing.start()
    heard, deadline = [], time.monotonic() + EVENT_LIMIT
    while time.monotonic() < deadline:
        for event in x.event.next():
            check({"id", "class", "operation", "ref"} <= set(event), event)
            check(event["operation"] == "del" or "snapshot" in event, event)
            if event["ref"] == vm:
                heard.append((event["operation"], event["snapshot"]["power_state"]))
        if heard and heard[-1][1] == "Halted":
            break
    changing.join()
    check(heard and heard[-1] == ("mod", "Halted"), f"heard only {heard}")
    x.event.unregister(["*"])

    batch = x.event_from(["*"], "", 0.0)
    classes = {event["class"] for event in batch["events"]}
    check({"pool", "host", "vm", "sr", "pbd", "network", "pif"} <= classes, f"the first batch is not all: {classes}")
    x.VM.destroy(vm)
    gone, token = [], batch["token"]
    while not gone and time.monotonic() < deadline + EVENT_LIMIT:
        batch = x.event_from(["*"], token, 5.0)
        token = batch["token"]
        gone = [event for event in batch["events"] if event["ref"] == vm and event["operation"] == "del"]
    check(gone, "nobody heard of its end")
    did("watch all events")


def main():
    lab = json.loads(sys.argv[1])
    session = log_in(lab)
    x = session.xenapi
    vm = install(x)
    power_cycle(x, vm)
    start_behind_a_task(x, vm)
    watch_all_events(lab, x, vm)
    x.session.logout()


if __name__ == "__main__":
    main()
