//! The live page: what a browser is given, out of the binary.
//!
//! Owns the page's parts and the headers that bind the browser to them: it may fetch from this port and nowhere else, run no script but
//! ours, and keep nothing. Does not own the numbers ([`super::figures`]), which the page's script asks for once a second.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{
        HeaderName, HeaderValue, StatusCode,
        header::{
            CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
            X_FRAME_OPTIONS,
        },
    },
    response::{IntoResponse, Response},
};

use super::figures::Figures;

const PAGE: &str = include_str!("page.html");
const SCRIPT: &str = include_str!("page.js");
const STYLE: &str = include_str!("page.css");

/// What the browser may do with any answer of the page. Not cached: after an upgrade the parts must be of one build.
const HEADERS: [(HeaderName, HeaderValue); 5] = [
    (
        CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        ),
    ),
    (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
    (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    (CACHE_CONTROL, HeaderValue::from_static("no-store")),
];

pub(super) async fn page() -> impl IntoResponse {
    (HEADERS, [(CONTENT_TYPE, "text/html; charset=utf-8")], PAGE)
}

pub(super) async fn script() -> impl IntoResponse {
    (HEADERS, [(CONTENT_TYPE, "text/javascript; charset=utf-8")], SCRIPT)
}

pub(super) async fn style() -> impl IntoResponse {
    (HEADERS, [(CONTENT_TYPE, "text/css; charset=utf-8")], STYLE)
}

pub(super) async fn figures(State(figures): State<Arc<Figures>>) -> Response {
    match figures.json().await {
        Ok(json) => (HEADERS, [(CONTENT_TYPE, "application/json")], json).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_names_no_other_address() {
        for part in [PAGE, SCRIPT, STYLE] {
            for foreign in ["://", "\"//", "'//", "url(", "@import", "import("] {
                assert!(!part.contains(foreign), "{foreign}");
            }
        }
    }

    #[test]
    fn the_page_has_nothing_that_its_policy_forbids() {
        for forbidden in [" style=", "<style", " onclick", " onload", "<script>"] {
            assert!(!PAGE.contains(forbidden), "{forbidden}");
        }
        for forbidden in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
        ] {
            assert!(
                !SCRIPT.contains(forbidden),
                "{forbidden}: names of namespaces are text, and never markup"
            );
        }
    }
}
