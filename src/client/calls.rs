//! The calls of a client, one for each of the contract.
//!
//! Owns which of them write, and gives writes their request ids. Each is safe to drop at any await: a write that was sent goes on.

use futures_util::future::try_join_all;
use tonic::transport::Channel;

use super::{
    Client, Error, Pages, Watch, new_request_id,
    proto::gateway_client::GatewayClient,
    proto::{
        AwaitPersistedRequest, AwaitPersistedResponse, BatchGetRequest, BatchGetResponse, BatchWriteRequest,
        BatchWriteResponse, Condition, DeleteRequest, DeleteResponse, GetRequest, GetResponse, IncrementRequest,
        IncrementResponse, PutRequest, PutResponse, ScanRequest, ScanResponse, TouchRequest, TouchResponse,
        WatchRequest, WriteItem, WriteMode, write_item::Operation,
    },
    retry::Effect,
};

/// The generated client.
type Stub = GatewayClient<Channel>;

impl Client {
    /// Reads a record.
    ///
    /// # Errors
    /// Every [`Error`] but those of writes: what an absent key is answered with is no error, but an answer without an entry.
    pub async fn get(&self, request: GetRequest) -> Result<GetResponse, Error> {
        let send = |mut stub: Stub, request| Box::pin(async move { stub.get(request).await }) as _;
        self.call(Effect::Read, request, send).await
    }

    /// Writes a record.
    ///
    /// # Errors
    /// Every [`Error`]; [`super::Reason::Conflict`] and [`super::Reason::Absent`] where the condition does not hold.
    pub async fn put(&self, mut request: PutRequest) -> Result<PutResponse, Error> {
        self.name(&mut request.request_id);
        let effect = write_effect(&request.request_id, request.condition.as_ref(), request.write_mode);
        let send = |mut stub: Stub, request| Box::pin(async move { stub.put(request).await }) as _;
        self.call(effect, request, send).await
    }

    /// Makes a key absent.
    ///
    /// # Errors
    /// As of [`Client::put`].
    pub async fn delete(&self, mut request: DeleteRequest) -> Result<DeleteResponse, Error> {
        self.name(&mut request.request_id);
        let effect = write_effect(&request.request_id, request.condition.as_ref(), request.write_mode);
        let send = |mut stub: Stub, request| Box::pin(async move { stub.delete(request).await }) as _;
        self.call(effect, request, send).await
    }

    /// Adds to a counter: once, however often it has to be sent, if it has a request id.
    ///
    /// # Errors
    /// Every [`Error`]; [`super::Reason::NotACounter`], [`super::Reason::OutOfRange`].
    pub async fn increment(&self, mut request: IncrementRequest) -> Result<IncrementResponse, Error> {
        self.name(&mut request.request_id);
        let effect = decided(&request.request_id);
        let send = |mut stub: Stub, request| Box::pin(async move { stub.increment(request).await }) as _;
        self.call(effect, request, send).await
    }

    /// Sets when a record expires.
    ///
    /// # Errors
    /// Every [`Error`]; [`super::Reason::Absent`].
    pub async fn touch(&self, mut request: TouchRequest) -> Result<TouchResponse, Error> {
        self.name(&mut request.request_id);
        let effect = decided(&request.request_id);
        let send = |mut stub: Stub, request| Box::pin(async move { stub.touch(request).await }) as _;
        self.call(effect, request, send).await
    }

    /// Reads many records. A result may be a failure by itself: [`super::Failure`] can be made of it.
    ///
    /// # Errors
    /// Of the call as a whole.
    pub async fn batch_get(&self, request: BatchGetRequest) -> Result<BatchGetResponse, Error> {
        let send = |mut stub: Stub, request| Box::pin(async move { stub.batch_get(request).await }) as _;
        self.call(Effect::Read, request, send).await
    }

    /// Writes many records. A result may be a failure by itself: [`super::Failure`] can be made of it. The items are not tried again one by one.
    ///
    /// # Errors
    /// Of the call as a whole.
    pub async fn batch_write(&self, mut request: BatchWriteRequest) -> Result<BatchWriteResponse, Error> {
        for item in &mut request.items {
            match &mut item.operation {
                Some(Operation::Put(put)) => self.name(&mut put.request_id),
                Some(Operation::Delete(delete)) => self.name(&mut delete.request_id),
                None => {}
            }
        }
        let effect = batch_effect(&request.items);
        let send = |mut stub: Stub, request| Box::pin(async move { stub.batch_write(request).await }) as _;
        self.call(effect, request, send).await
    }

    /// Reads a page of records.
    ///
    /// # Errors
    /// Every [`Error`] but those of writes.
    pub async fn scan(&self, request: ScanRequest) -> Result<ScanResponse, Error> {
        let send = |mut stub: Stub, request| Box::pin(async move { stub.scan(request).await }) as _;
        self.call(Effect::Read, request, send).await
    }

    /// Reads all pages of records, from the request's token on.
    pub fn pages(&self, request: ScanRequest) -> Pages {
        Pages::new(self.clone(), request)
    }

    /// Waits until the store has a write, or all writes that the gateways had acknowledged. "All", which names no write, is asked of every gateway
    /// of this client together, and holds once each of them has answered for itself; the dead letters are those of all of them.
    ///
    /// # Errors
    /// Every [`Error`] but those of writes; [`super::Reason::NotPersisted`], [`super::Reason::DeadLettered`]. Of "all": the first of any gateway.
    pub async fn await_persisted(&self, request: AwaitPersistedRequest) -> Result<AwaitPersistedResponse, Error> {
        let send: fn(_, _) -> _ =
            |mut stub: Stub, request| Box::pin(async move { stub.await_persisted(request).await }) as _;
        if request != AwaitPersistedRequest::default() {
            return self.call(Effect::Read, request, send).await;
        }
        let asked =
            (0..self.channels.gateways).map(|place| self.call_at(place, Effect::ReadHere, request.clone(), send));
        let answers = try_join_all(asked).await?;
        let mut all = AwaitPersistedResponse::default();
        for answer in answers {
            all.dead_lettered = all.dead_lettered.saturating_add(answer.dead_lettered);
        }
        Ok(all)
    }

    /// Watches changes, from the request's token on. It begins with the first [`Watch::next`].
    pub fn watch(&self, request: WatchRequest) -> Watch {
        Watch::new(self.clone(), request)
    }

    /// Gives a write its id, unless it has one or none is wanted.
    fn name(&self, request_id: &mut String) {
        if self.options.request_ids && request_id.is_empty() {
            *request_id = new_request_id();
        }
    }
}

/// Of what may be written behind unless it says otherwise.
fn write_effect(request_id: &str, condition: Option<&Condition>, write_mode: i32) -> Effect {
    Effect::Write {
        has_id: !request_id.is_empty(),
        holds_everywhere: condition.is_some() || write_mode == WriteMode::Through as i32,
    }
}

/// Of what the store decides.
fn decided(request_id: &str) -> Effect {
    Effect::Write {
        has_id: !request_id.is_empty(),
        holds_everywhere: true,
    }
}

/// Of several: what holds of each.
fn batch_effect(items: &[WriteItem]) -> Effect {
    let effects = items.iter().map(|item| match &item.operation {
        Some(Operation::Put(put)) => write_effect(&put.request_id, put.condition.as_ref(), put.write_mode),
        Some(Operation::Delete(delete)) => {
            write_effect(&delete.request_id, delete.condition.as_ref(), delete.write_mode)
        }
        // It is refused.
        None => decided("none"),
    });
    effects.fold(decided("all"), |all, one| match (all, one) {
        (
            Effect::Write {
                has_id,
                holds_everywhere,
            },
            Effect::Write {
                has_id: has_one,
                holds_everywhere: holds_one,
            },
        ) => Effect::Write {
            has_id: has_id && has_one,
            holds_everywhere: holds_everywhere && holds_one,
        },
        (Effect::Read | Effect::ReadHere, other) | (other, Effect::Read | Effect::ReadHere) => other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_as_safe_to_repeat_as_the_least_of_its_items() {
        let put = |request_id: &str, write_mode: WriteMode| WriteItem {
            operation: Some(Operation::Put(PutRequest {
                request_id: request_id.to_owned(),
                write_mode: write_mode as i32,
                ..PutRequest::default()
            })),
        };
        let through = put("a", WriteMode::Through);
        let behind = put("b", WriteMode::Behind);
        let bare = put("", WriteMode::Through);
        let of = |has_id, holds_everywhere| Effect::Write {
            has_id,
            holds_everywhere,
        };
        assert_eq!(batch_effect(std::slice::from_ref(&through)), of(true, true));
        assert_eq!(batch_effect(&[through.clone(), behind]), of(true, false));
        assert_eq!(batch_effect(&[through, bare]), of(false, true));
    }
}
