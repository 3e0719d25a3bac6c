//! Compiles the wire contracts with protox, so that no system `protoc` is needed.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    let files = ["proto/agent.proto", "proto/forward.proto", "proto/members.proto", "proto/raft.proto"];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().bytes(".xenith.raft.v1").bytes(".xenith.forward.v1").compile_fds(descriptors)?;
    Ok(())
}
