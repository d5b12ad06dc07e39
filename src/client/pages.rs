//! The pages of a scan, one after the other.
//!
//! Owns where it stands. Does not own the pages, nor what a scan may miss: `gateway.proto` says that.

use super::{
    Client, Error,
    proto::{ScanRecord, ScanRequest},
};

/// A scan under way. Can be dropped at any time, and gone on with later from its [`Pages::token`].
#[derive(Debug, Clone)]
pub struct Pages {
    client: Client,
    request: ScanRequest,
    is_at_end: bool,
}

impl Pages {
    pub(super) fn new(client: Client, request: ScanRequest) -> Pages {
        Pages {
            client,
            request,
            is_at_end: false,
        }
    }

    /// The records of the next page, of which there may be none before the last page; `None` once there is no more page. After an error the
    /// same page may be asked for again.
    ///
    /// # Errors
    /// As of [`Client::scan`].
    pub async fn next(&mut self) -> Result<Option<Vec<ScanRecord>>, Error> {
        if self.is_at_end {
            return Ok(None);
        }
        let page = self.client.scan(self.request.clone()).await?;
        self.is_at_end = page.next_page_token.is_empty();
        self.request.page_token = page.next_page_token;
        Ok(Some(page.records))
    }

    /// Where the next page begins; empty at the beginning, and at the end.
    pub fn token(&self) -> &str {
        &self.request.page_token
    }

    /// Whether there is no more page.
    pub fn is_at_end(&self) -> bool {
        self.is_at_end
    }
}
