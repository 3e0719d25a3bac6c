//! Processors, from `/proc/cpuinfo`.

use std::collections::{HashMap, HashSet};
use std::fs;

use proto::agent::Cpu;

/// All processors, and in how many sockets they sit.
pub(super) fn read() -> (Vec<Cpu>, u32) {
    parse(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

fn parse(text: &str) -> (Vec<Cpu>, u32) {
    let mut cpus = Vec::new();
    let mut sockets = HashSet::new();
    for block in text.split("\n\n") {
        let fields: HashMap<&str, &str> = block
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.trim(), value.trim()))
            .collect();
        let text = |name: &str| fields.get(name).copied().unwrap_or_default();
        let Ok(number) = text("processor").parse() else {
            continue;
        };
        sockets.insert(text("physical id").to_owned());
        let megahertz = text("cpu MHz").split('.').next().and_then(|whole| whole.parse().ok());
        cpus.push(Cpu {
            number,
            vendor: text("vendor_id").to_owned(),
            model_name: text("model name").to_owned(),
            speed_mhz: megahertz.unwrap_or_default(),
            family: text("cpu family").parse().unwrap_or_default(),
            model: text("model").parse().unwrap_or_default(),
            stepping: text("stepping").to_owned(),
            flags: text("flags").to_owned(),
        });
    }
    let sockets = u32::try_from(sockets.len()).unwrap_or(1);
    (cpus, sockets.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_processor_is_told_with_its_socket() {
        let one = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\nmodel name\t: A CPU\n\
                   stepping\t: 7\ncpu MHz\t\t: 2500.123\nphysical id\t: 0\nflags\t\t: fpu vme";
        let two = one.replace("processor\t: 0", "processor\t: 1").replace("physical id\t: 0", "physical id\t: 1");
        let (cpus, sockets) = parse(&format!("{one}\n\n{two}\n\n"));
        assert_eq!((cpus.len(), sockets), (2, 2));
        let cpu = &cpus[1];
        assert_eq!((cpu.number, cpu.speed_mhz, cpu.family, cpu.model), (1, 2500, 6, 85));
        assert_eq!((cpu.vendor.as_str(), cpu.stepping.as_str(), cpu.flags.as_str()), ("GenuineIntel", "7", "fpu vme"));
    }

    #[test]
    fn a_machine_that_tells_nothing_has_a_socket_and_no_processors() {
        assert_eq!(parse(""), (Vec::new(), 1));
    }
}
