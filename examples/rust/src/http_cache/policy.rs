//! What may be kept, for how long, and what may be answered from it: the part of HTTP's rules for shared caches that the layer follows.
//!
//! Owns only judgements; pure. It is stricter than the rules where that saves it something: without an explicit lifetime nothing is kept, nor
//! is what varies by request headers, what sets a cookie, or what answers a request with credentials.

use std::time::Duration;

use http::{
    HeaderMap, Method, Request, StatusCode, Uri,
    header::{AUTHORIZATION, CACHE_CONTROL, HOST, HeaderName, RANGE, SET_COOKIE, VARY},
};

/// The longest key of the gateway, in bytes.
const KEY_BYTES_MAX: usize = 1_024;

/// What the cache has to do with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    /// None.
    Bypass,
    /// It may answer, and keep the service's answer.
    Answer(String),
    /// It must not answer, and may keep the service's answer: the client asks for a fresh one.
    Refresh(String),
    /// The request changes what is kept under the key, if it succeeds.
    Forget(String),
}

/// What the cache has to do with a request.
pub(super) fn part<B>(request: &Request<B>) -> Part {
    let (method, headers) = (request.method(), request.headers());
    let Some(key) = key(request.uri(), headers) else {
        return Part::Bypass;
    };
    if !method.is_safe() {
        return Part::Forget(key);
    }
    if method != Method::GET
        || headers.contains_key(AUTHORIZATION)
        || headers.contains_key(RANGE)
        || directive(headers, "no-store").is_some()
    {
        return Part::Bypass;
    }
    if directive(headers, "no-cache").is_some() {
        return Part::Refresh(key);
    }
    Part::Answer(key)
}

/// How long a response may be kept; `None`: not at all.
pub(super) fn lifetime(status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    let kept = [
        StatusCode::OK,
        StatusCode::NON_AUTHORITATIVE_INFORMATION,
        StatusCode::MOVED_PERMANENTLY,
        StatusCode::PERMANENT_REDIRECT,
        StatusCode::NOT_FOUND,
        StatusCode::GONE,
    ];
    if !kept.contains(&status)
        || [SET_COOKIE, VARY]
            .iter()
            .any(|name: &HeaderName| headers.contains_key(name))
        || ["no-store", "no-cache", "private"]
            .iter()
            .any(|name| directive(headers, name).is_some())
    {
        return None;
    }
    // What is said to shared caches goes before what is said to all.
    let said = directive(headers, "s-maxage").or_else(|| directive(headers, "max-age"))?;
    let seconds: u32 = said.parse().ok()?;
    (seconds > 0).then(|| Duration::from_secs(seconds.into()))
}

/// What a response is kept under: host, path and query. `None`: too long, or without a host.
fn key(uri: &Uri, headers: &HeaderMap) -> Option<String> {
    let host = uri.authority().map(|authority| authority.as_str());
    let host = host.or_else(|| headers.get(HOST)?.to_str().ok())?;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let key = format!("{}{path}", host.to_ascii_lowercase());
    (key.len() <= KEY_BYTES_MAX).then_some(key)
}

/// The value of a directive of `Cache-Control`; empty where it is there without one.
fn directive<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let fields = headers.get_all(CACHE_CONTROL).into_iter();
    let mut directives = fields
        .filter_map(|field| field.to_str().ok())
        .flat_map(|field| field.split(','));
    directives.find_map(|directive| {
        let (said, value) = directive.split_once('=').unwrap_or((directive, ""));
        let is_it = said.trim().eq_ignore_ascii_case(name);
        is_it.then(|| value.trim().trim_matches('"'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: &str, headers: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::builder()
            .method(method)
            .uri("/a?b=c")
            .header("host", "Example.org");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    fn response(headers: &[(&'static str, &str)]) -> HeaderMap {
        let fields = headers
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
        fields.collect()
    }

    #[test]
    fn a_get_may_be_answered_by_host_path_and_query() {
        let key = || "example.org/a?b=c".to_owned();
        assert_eq!(part(&request("GET", &[])), Part::Answer(key()));
        assert_eq!(
            part(&request("GET", &[("cache-control", "max-age=0, no-cache")])),
            Part::Refresh(key())
        );
        assert_eq!(part(&request("POST", &[])), Part::Forget(key()));
        assert_eq!(
            part(&request("DELETE", &[("authorization", "Bearer x")])),
            Part::Forget(key())
        );
    }

    #[test]
    fn what_is_not_for_everybody_passes_by() {
        assert_eq!(part(&request("HEAD", &[])), Part::Bypass);
        assert_eq!(part(&request("GET", &[("authorization", "Bearer x")])), Part::Bypass);
        assert_eq!(part(&request("GET", &[("range", "bytes=0-1")])), Part::Bypass);
        assert_eq!(part(&request("GET", &[("cache-control", "No-Store")])), Part::Bypass);
        let long = Request::builder()
            .uri(format!("/{}", "x".repeat(1_024)))
            .header("host", "h");
        assert_eq!(part(&long.body(()).unwrap()), Part::Bypass);
        assert_eq!(part(&Request::builder().uri("/").body(()).unwrap()), Part::Bypass);
    }

    #[test]
    fn a_response_is_kept_for_as_long_as_it_says_and_only_then() {
        let kept = |headers: &[_]| lifetime(StatusCode::OK, &response(headers));
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        assert_eq!(kept(&[("cache-control", "public, max-age=60")]), seconds(60));
        assert_eq!(kept(&[("cache-control", "max-age=60, s-maxage=\"5\"")]), seconds(5));
        assert_eq!(kept(&[("cache-control", "max-age=60"), ("set-cookie", "a=b")]), None);
        assert_eq!(kept(&[("cache-control", "max-age=60"), ("vary", "accept")]), None);
        for refused in [
            "",
            "public",
            "max-age=0",
            "max-age=never",
            "max-age=-1",
            "private, max-age=60",
            "max-age=60, no-store",
        ] {
            assert_eq!(kept(&[("cache-control", refused)]), None, "{refused}");
        }
        assert_eq!(kept(&[]), None);
        assert_eq!(
            lifetime(
                StatusCode::INTERNAL_SERVER_ERROR,
                &response(&[("cache-control", "max-age=60")])
            ),
            None
        );
    }
}
