//! Compiles `proto/` with protox, a protobuf compiler in Rust, so that a build needs no `protoc`.
//!
//! Owns the generated code's shape: `bytes` fields are `Bytes` (a slice of the received buffer, not a copy), messages travel
//! through our own codec (`rpc/codec.rs`), and the descriptor set is kept for server reflection.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

#[expect(
    clippy::disallowed_methods,
    reason = "cargo speaks to build scripts through the environment"
)]
fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    println!("cargo::rerun-if-changed=migrations");
    let descriptors = protox::compile(["tidegate/v1/gateway.proto", "tidegate/v1/admin.proto"], ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("tidegate_descriptor.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".")
        .codec_path("crate::rpc::codec::Codec")
        .build_transport(false)
        .compile_fds(descriptors)?;
    // The journal's records are nobody's contract: they stay out of reflection.
    tonic_prost_build::configure()
        .bytes(".")
        .compile_fds(protox::compile(["tidegate/journal/v1/journal.proto"], ["proto"])?)?;
    Ok(())
}
