//! What a web page of somebody else could do here through the browser of whoever visits it, and why it cannot.
//!
//! A page can send a request to loopback, but not without its origin: it changes nothing. It cannot read what is answered
//! to another origin. But whoever owns a name can let it lead to 127.0.0.1 after the page was loaded (DNS rebinding):
//! then page and server are of one origin for the browser, and only the name that stands in the request tells. A name is
//! answered if the configuration has it; an address and `localhost` belong to nobody.

use std::net::Ipv6Addr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{HOST, ORIGIN};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Version};
use axum::middleware::Next;
use axum::response::Response;

use super::answer::Failure;

/// Lets a request pass that is for this server, and changes nothing for a page of another one.
pub(super) async fn guard(
    State(hosts): State<Arc<[String]>>,
    request: Request,
    next: Next,
) -> Result<Response, Failure> {
    let host = known_host(&request, &hosts)?;
    // Only these are sure to change nothing.
    if ![Method::GET, Method::HEAD, Method::OPTIONS].contains(request.method()) {
        same_origin(request.headers(), host)?;
    }
    Ok(next.run(request).await)
}

/// The host that the request names, with its port; empty if it names none.
fn known_host<'a>(request: &'a Request, hosts: &[String]) -> Result<&'a str, Failure> {
    let mut written = request.headers().get_all(HOST).iter();
    let header = written.next().map(text);
    if written.next().is_some() {
        return Err(Failure::bad_request("the header host is there twice; send it once"));
    }
    // The target of HTTP/2 has an authority, and so may one of HTTP/1.1, where it wins over the header. Both are looked at.
    let authority = request.uri().authority().map(|authority| authority.as_str());
    for named in header.into_iter().chain(authority) {
        if !is_known(named, hosts) {
            let message = format!(
                "host {named:?} is not known to be this server; use its address or localhost, or add the name to hosts \
                 under [http] in shadowbox.toml"
            );
            return Err(Failure::new(StatusCode::MISDIRECTED_REQUEST, "misdirected", message).with("host", named));
        }
    }
    match authority.or(header) {
        Some(host) => Ok(host),
        // No browser speaks it, but probes of load balancers do.
        None if request.version() <= Version::HTTP_10 => Ok(""),
        None => Err(Failure::bad_request("the header host is missing; HTTP/1.1 wants it")),
    }
}

fn is_known(named: &str, hosts: &[String]) -> bool {
    if let Some(rest) = named.strip_prefix('[') {
        return rest
            .split_once(']')
            .is_some_and(|(address, port)| address.parse::<Ipv6Addr>().is_ok() && is_port(port));
    }
    let (host, port) = named.split_at(named.find(':').unwrap_or(named.len()));
    // A name may end with the dot of the root.
    let name = host.strip_suffix('.').unwrap_or(host);
    is_port(port)
        && (host.parse::<std::net::Ipv4Addr>().is_ok()
            || name.eq_ignore_ascii_case("localhost")
            || hosts.iter().any(|known| name.eq_ignore_ascii_case(known)))
}

/// Nothing, or a colon and a number: a proxy may have a port of its own.
fn is_port(text: &str) -> bool {
    text.is_empty() || text.strip_prefix(':').is_some_and(|port| port.bytes().all(|b| b.is_ascii_digit()))
}

fn same_origin(headers: &HeaderMap, host: &str) -> Result<(), Failure> {
    for origin in headers.get_all(ORIGIN).iter().map(text) {
        let authority = origin.split_once("://").map(|(_, authority)| authority);
        if !authority.is_some_and(|authority| authority.eq_ignore_ascii_case(host)) {
            let message =
                format!("pages from {origin:?} may not change anything here; use a program, or a page of {host:?}");
            return Err(Failure::new(StatusCode::FORBIDDEN, "cross_origin", message));
        }
    }
    Ok(())
}

/// What is not ASCII is no host and no origin.
fn text(value: &HeaderValue) -> &str {
    value.to_str().unwrap_or("\u{fffd}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;

    #[test]
    fn a_host_is_an_address_localhost_or_in_the_configuration() {
        let hosts = ["shadowbox.example.com".to_owned()];
        for (named, known) in [
            ("127.0.0.1:7070", true),
            ("127.0.0.1", true),
            ("192.168.1.4:80", true),
            ("[::1]:7070", true),
            ("[fe80::1]", true),
            ("localhost", true),
            ("LocalHost:7070", true),
            ("localhost.:7070", true),
            ("shadowbox.example.com", true),
            ("Shadowbox.Example.COM.:443", true),
            ("", false),
            (":7070", false),
            ("evil.example", false),
            ("evil.example:7070", false),
            ("127.0.0.1.evil.example", false),
            ("127.0.0.1.:7070", false),
            ("x.shadowbox.example.com", false),
            ("shadowbox.example.com:x", false),
            ("localhost.evil.example", false),
            ("evil.localhost", false),
            ("user@localhost", false),
            ("localhost:7070, evil.example", false),
            ("[::1", false),
            ("[::1].evil.example", false),
            ("[localhost]", false),
            ("2130706433", false),
        ] {
            assert_eq!(is_known(named, &hosts), known, "{named}");
        }
        assert!(!is_known("shadowbox.example.com", &[]));
    }

    #[test]
    fn the_authority_of_a_target_counts_as_the_header_does() {
        let status = |version, target: &str, headers: &[&str]| {
            let request = Request::builder().version(version).uri(target);
            let request = headers.iter().fold(request, |request, host| request.header(HOST, *host));
            let request = request.body(Body::empty()).unwrap();
            known_host(&request, &[]).map(str::to_owned).map_err(|failure| failure.status)
        };
        let (misdirected, bad) = (Err(StatusCode::MISDIRECTED_REQUEST), Err(StatusCode::BAD_REQUEST));
        for (version, target, headers, expected) in [
            (Version::HTTP_2, "http://localhost:7070/views", &[][..], Ok("localhost:7070".to_owned())),
            (Version::HTTP_2, "http://evil.example/views", &[], misdirected.clone()),
            (Version::HTTP_2, "http://evil.example/views", &["localhost"], misdirected.clone()),
            (Version::HTTP_11, "http://localhost/views", &["evil.example"], misdirected.clone()),
            (Version::HTTP_11, "/views", &["evil.example"], misdirected.clone()),
            (Version::HTTP_11, "/views", &["localhost"], Ok("localhost".to_owned())),
            (Version::HTTP_11, "/views", &[], bad.clone()),
            (Version::HTTP_11, "/views", &["localhost", "localhost"], bad),
            (Version::HTTP_10, "/views", &[], Ok(String::new())),
            (Version::HTTP_10, "/views", &["evil.example"], misdirected),
        ] {
            assert_eq!(status(version, target, headers), expected, "{version:?} {target} {headers:?}");
        }
    }
}
