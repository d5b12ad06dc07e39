//! The connection to the gateway.
//!
//! Owns how it is opened, and how a call gets a deadline that the gateway is told of, too.

use std::time::Duration;

use tidegate::rpc::proto::gateway_client::GatewayClient;
use tonic::{
    Request,
    transport::{Channel, Endpoint},
};

/// A client of the gateway. Clones share its connection.
pub(crate) type Client = GatewayClient<Channel>;

/// The address is none.
pub type ConnectError = tonic::transport::Error;

/// A channel to the gateway at `address`, as `http://127.0.0.1:50051`, which is connected when it is first used, and again when it was lost. One
/// does for a process with a few thousand calls a second; clone it.
///
/// # Errors
/// Where the address is no URL.
pub fn connect(address: &str) -> Result<Channel, ConnectError> {
    let endpoint = Endpoint::from_shared(address.to_owned())?
        .connect_timeout(Duration::from_secs(1))
        .tcp_nodelay(true)
        // Notices a gateway that went away without a word.
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(5));
    Ok(endpoint.connect_lazy())
}

/// A request that has so long: the gateway stops then, and so does the wait for it.
pub(crate) fn within<T>(patience: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(patience);
    request
}
