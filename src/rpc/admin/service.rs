//! The service of `tidegate.v1.Admin`: decode, call the gateway, encode. It decides nothing.

use tonic::{Request, Response, Status};

use super::convert;
use crate::{
    clock::wall_time,
    gateway::Gateway,
    model::Timestamp,
    rpc::{
        proto::{StatsRequest, StatsResponse, admin_server::Admin as AdminRpc},
        status::to_status,
    },
    telemetry::calls::CallMetrics,
};

/// The service, one for all connections.
#[derive(Clone)]
pub(super) struct AdminService {
    gateway: Gateway,
    calls: CallMetrics,
    started: Timestamp,
}

impl AdminService {
    pub(super) fn new(gateway: Gateway, calls: CallMetrics) -> AdminService {
        AdminService {
            gateway,
            calls,
            started: wall_time(),
        }
    }
}

#[tonic::async_trait]
impl AdminRpc for AdminService {
    async fn stats(&self, request: Request<StatsRequest>) -> Result<Response<StatsResponse>, Status> {
        let namespace = convert::stats(request.get_ref()).map_err(to_status)?;
        let stats = self.gateway.stats(&self.calls, namespace);
        Ok(Response::new(convert::stats_response(stats, self.started)))
    }
}
