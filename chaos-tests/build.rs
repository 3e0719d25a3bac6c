//! Compiles the few calls of etcd that the benchmarks make, and those by which a master drives its agents, with protox, so that no system `protoc` is needed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto/etcd.proto");
    println!("cargo:rerun-if-changed=../proto/proto/agent.proto");
    let descriptors = protox::compile(["etcd.proto", "agent.proto"], ["proto", "../proto/proto"])?;
    tonic_prost_build::configure().build_server(false).compile_fds(descriptors)?;
    Ok(())
}
