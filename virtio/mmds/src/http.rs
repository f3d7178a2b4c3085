// SPDX-License-Identifier: Apache-2.0
//! HTTP/1 as far as the service needs it: reading a request's head, writing a response.

/// The most headers that a request may have.
const MAX_HEADERS: usize = 32;

/// What the service looks at in a request.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Request<'a> {
    pub(crate) method: &'a str,
    pub(crate) target: &'a str,
    /// The minor version of HTTP/1.
    pub(crate) minor: u8,
    /// Whether the client wants to ask for more on this connection.
    pub(crate) keep_alive: bool,
    /// Whether JSON is wanted; text is the default.
    pub(crate) json: bool,
    pub(crate) token: Option<&'a str>,
    /// The header that names the lifetime of a token, and its value.
    pub(crate) ttl: Option<(&'a str, &'a str)>,
    /// The header that a proxy adds.
    pub(crate) forwarded: Option<&'a str>,
}

/// What the bytes from a client are so far.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed<'a> {
    /// The beginning of a request.
    Incomplete,
    /// A request, of this length in bytes with its body.
    Request(Request<'a>, usize),
    /// No request that could be understood.
    Bad,
}

/// Reads the request at the beginning of `data`.
///
/// No request of the service has a body that means anything. One that comes together with its head
/// is skipped; nobody waits for one that does not.
pub(crate) fn parse(data: &[u8]) -> Parsed<'_> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let head_len = match head.parse(data) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Parsed::Incomplete,
        Err(_) => return Parsed::Bad,
    };
    let (Some(method), Some(target), Some(minor)) = (head.method, head.path, head.version) else {
        return Parsed::Bad;
    };
    let mut request = Request {
        method,
        target,
        minor,
        keep_alive: minor > 0,
        ..Request::default()
    };
    let mut body_len = None;
    for header in head.headers {
        if take_header(&mut request, &mut body_len, header).is_none() {
            return Parsed::Bad;
        }
    }
    let body_len = body_len.unwrap_or(0);
    let rest = data.len().saturating_sub(head_len);
    if body_len > rest || (body_len > 0 && method == "GET") {
        return Parsed::Bad;
    }
    Parsed::Request(request, head_len + body_len)
}

/// Notes what a header says; `None` if it makes the request a bad one. Of a header that comes
/// twice the first one counts.
fn take_header<'a>(
    request: &mut Request<'a>,
    body_len: &mut Option<usize>,
    header: &httparse::Header<'a>,
) -> Option<()> {
    let name = header.name;
    let value = std::str::from_utf8(header.value).ok()?.trim();
    let is = |other: &str| name.eq_ignore_ascii_case(other);
    if is("content-length") {
        let len = value.parse().ok()?;
        // Two that differ are how requests are smuggled.
        return (*body_len.get_or_insert(len) == len).then_some(());
    }
    if is("transfer-encoding") {
        return None;
    }
    if is("connection") {
        let has = |option: &str| {
            value
                .split(',')
                .any(|part| part.trim().eq_ignore_ascii_case(option))
        };
        request.keep_alive = !has("close") && (request.keep_alive || has("keep-alive"));
    } else if is("accept") {
        request.json = value == "application/json";
    } else if is("x-metadata-token") || is("x-aws-ec2-metadata-token") {
        request.token.get_or_insert(value);
    } else if is("x-metadata-token-ttl-seconds") || is("x-aws-ec2-metadata-token-ttl-seconds") {
        request.ttl.get_or_insert((name, value));
    } else if is("x-forwarded-for") {
        request.forwarded.get_or_insert(name);
    }
    Some(())
}

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Response {
    pub(crate) status: u16,
    /// Whether the body is JSON; it is text otherwise.
    pub(crate) json: bool,
    pub(crate) body: String,
    /// One more header, its name and its value.
    pub(crate) header: Option<(String, String)>,
}

impl Response {
    /// An answer of text.
    pub(crate) fn text(status: u16, body: impl Into<String>) -> Self {
        Self {
            status,
            json: false,
            body: body.into(),
            header: None,
        }
    }

    /// The answer to what is no request.
    pub(crate) fn bad_request() -> Self {
        Self::text(400, "Invalid request.")
    }

    /// The bytes to send. `has_body` is false for an answer to HEAD, which only tells what would
    /// be there.
    pub(crate) fn encode(&self, minor: u8, keep_alive: bool, has_body: bool) -> Vec<u8> {
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let kind = if self.json {
            "application/json"
        } else {
            "text/plain"
        };
        let mut text = format!(
            "HTTP/1.{minor} {} \r\nServer: Firecracker API\r\nConnection: {connection}\r\n",
            self.status
        );
        if let Some((name, value)) = &self.header {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        let len = self.body.len();
        text.push_str(&format!(
            "Content-Type: {kind}\r\nContent-Length: {len}\r\n\r\n"
        ));
        if has_body {
            text.push_str(&self.body);
        }
        text.into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn request(text: &str) -> Request<'_> {
        match parse(text.as_bytes()) {
            Parsed::Request(request, len) if len == text.len() => request,
            other => panic!("{text:?}: {other:?}"),
        }
    }

    #[test]
    fn what_matters_is_found() {
        let text = "PUT /a HTTP/1.1\r\nHost: x\r\nX-METADATA-Token: t \r\naccept: application/json\
                    \r\nX-aws-ec2-metadata-token-ttl-seconds: 5\r\nX-Forwarded-For: y\r\n\r\n";
        assert_eq!(
            request(text),
            Request {
                method: "PUT",
                target: "/a",
                minor: 1,
                keep_alive: true,
                json: true,
                token: Some("t"),
                ttl: Some(("X-aws-ec2-metadata-token-ttl-seconds", "5")),
                forwarded: Some("X-Forwarded-For"),
            }
        );
    }

    #[test]
    fn connections_are_kept_as_http_says() {
        for (version, connection, kept) in [
            ("1.1", "", true),
            ("1.1", "Connection: close\r\n", false),
            ("1.1", "Connection: x, Close\r\n", false),
            ("1.0", "", false),
            ("1.0", "Connection: keep-alive\r\n", true),
        ] {
            let text = format!("GET / HTTP/{version}\r\n{connection}\r\n");
            assert_eq!(request(&text).keep_alive, kept, "{text}");
        }
    }

    #[test]
    fn other_forms_than_json_are_text() {
        for (accept, json) in [
            ("application/json", true),
            ("*/*", false),
            ("text/plain", false),
            ("text/html, application/json", false),
        ] {
            let text = format!("GET / HTTP/1.1\r\nAccept: {accept}\r\n\r\n");
            assert_eq!(request(&text).json, json, "{accept}");
        }
    }

    #[test]
    fn a_body_is_skipped_and_never_waited_for() {
        let with_body = |method, len, body| {
            format!("{method} / HTTP/1.1\r\nContent-Length: {len}\r\n\r\n{body}")
        };
        request(&with_body("GET", "0", ""));
        request(&with_body("PUT", "4", "body"));
        for text in [
            with_body("PUT", "5", "body"),
            with_body("GET", "4", "body"),
            with_body("PUT", "-1", ""),
            with_body("PUT", "99999999999999999999", ""),
            with_body("PUT", "18446744073709551615", "x"),
            with_body("PUT", "1\r\nContent-Length: 2", "xy"),
            with_body("PUT", "0\r\nTransfer-Encoding: chunked", "0\r\n\r\n"),
        ] {
            assert_eq!(parse(text.as_bytes()), Parsed::Bad, "{text}");
        }
    }

    #[test]
    fn requests_may_follow_each_other() {
        let text = "GET /a HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\n\r\n";
        let Parsed::Request(first, len) = parse(text.as_bytes()) else {
            panic!("no request");
        };
        assert_eq!(first.target, "/a");
        assert_eq!(request(&text[len..]).target, "/b");
    }

    #[test]
    fn half_a_request_is_incomplete_and_nonsense_is_bad() {
        let text = "GET /a HTTP/1.1\r\nHost: x\r\n\r\n";
        for len in 0..text.len() {
            assert_eq!(parse(&text.as_bytes()[..len]), Parsed::Incomplete, "{len}");
        }
        let many = "a: b\r\n".repeat(MAX_HEADERS + 1);
        for text in [
            "\0\r\n\r\n",
            "GET\r\n\r\n",
            "GET / HTTP/2.0\r\n\r\n",
            "GET / HTTP/1.1\r\nno colon\r\n\r\n",
            &format!("GET / HTTP/1.1\r\n{many}\r\n"),
        ] {
            assert_eq!(parse(text.as_bytes()), Parsed::Bad, "{text:?}");
        }
        let no_text = b"GET / HTTP/1.1\r\na: \xff\r\n\r\n";
        assert_eq!(parse(no_text), Parsed::Bad);
    }

    proptest! {
        #[test]
        fn no_input_is_too_strange(data in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut text = b"GET / HTTP/1.1\r\n".to_vec();
            text.extend(&data);
            parse(&data);
            if let Parsed::Request(_, len) = parse(&text) {
                prop_assert!(len <= text.len());
            }
        }
    }
}
