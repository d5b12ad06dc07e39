//! Server reflection: what a port tells generic tools of the services that it serves.
//!
//! Owns which descriptors are known and which services are listed. The contract has two services, each on a port of its own, so a port
//! lists its own and not the other's.

use std::io;

use tonic_reflection::server::Builder;

use crate::rpc::{
    proto::DESCRIPTORS,
    router::{ErasedService, erase},
};

const V1: &str = "grpc.reflection.v1.ServerReflection";
const V1ALPHA: &str = "grpc.reflection.v1alpha.ServerReflection";

/// Server reflection, in the two versions that tools speak.
#[derive(Clone)]
pub(crate) struct Reflection {
    v1: ErasedService,
    v1alpha: ErasedService,
}

impl Reflection {
    /// Reflection of a port that serves `service`, health, and itself.
    ///
    /// # Errors
    /// The descriptors of the contract are broken.
    pub(crate) fn of(service: &str) -> io::Result<Reflection> {
        let builder = |own: &str| {
            Builder::configure()
                .register_encoded_file_descriptor_set(DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                // Not a service: the details of our errors, so that tools can show them.
                .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
                .with_service_name("grpc.health.v1.Health")
                .with_service_name(own)
                .with_service_name(service)
        };
        Ok(Reflection {
            v1: erase(builder(V1).build_v1().map_err(io::Error::other)?),
            v1alpha: erase(builder(V1ALPHA).build_v1alpha().map_err(io::Error::other)?),
        })
    }

    /// The service of this name, if it is reflection in one of its versions.
    pub(crate) fn named(&self, service: &str) -> Option<&ErasedService> {
        match service {
            V1 => Some(&self.v1),
            V1ALPHA => Some(&self.v1alpha),
            _ => None,
        }
    }
}
