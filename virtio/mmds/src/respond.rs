// SPDX-License-Identifier: Apache-2.0
//! What a guest's request is answered with. Statuses and texts are Firecracker's: clients and test
//! suites look for them.

use crate::http::{Request, Response};
use crate::store::{Format, Mmds, MmdsError};
use crate::token::TokenError;

/// Where tokens are asked for.
const TOKEN_PATH: &str = "/latest/api/token";

/// The methods that mean anything to Firecracker, if not here.
const METHODS: [&str; 4] = ["GET", "PUT", "PATCH", "DELETE"];

const NO_TOKEN: &str = "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the session token.";
const NO_TTL: &str = "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.";

/// The ways in which services differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rules {
    /// Whether the data is only given to who has a token (version 2).
    pub(crate) needs_token: bool,
    /// Whether answers are text whatever was asked for, as those of EC2's service.
    pub(crate) always_text: bool,
}

/// Answers `request`.
pub(crate) fn respond(mmds: &mut Mmds, rules: Rules, request: &Request<'_>) -> Response {
    mmds.counts.requests += 1;
    if !METHODS.contains(&request.method) {
        return Response::text(501, "Unsupported HTTP method.");
    }
    let path = path_of(request.target);
    if path.is_empty() {
        return Response::text(400, "Invalid URI.");
    }
    match request.method {
        "GET" => get(mmds, rules, request, path),
        "PUT" => put(mmds, request, path),
        _ => Response {
            header: Some(("Allow".into(), "GET, PUT".into())),
            ..Response::text(405, "Not allowed HTTP method.")
        },
    }
}

fn get(mmds: &mut Mmds, rules: Rules, request: &Request<'_>, path: &str) -> Response {
    if rules.needs_token {
        match request.token {
            None => {
                mmds.counts.no_token += 1;
                return Response::text(401, NO_TOKEN);
            }
            Some(token) if !mmds.tokens.is_valid(token) => {
                mmds.counts.invalid_token += 1;
                return Response::text(401, "MMDS token not valid.");
            }
            Some(_) => {}
        }
    }
    let json = request.json && !rules.always_text;
    let format = if json { Format::Json } else { Format::Imds };
    match mmds.get(&single_slashes(path), format) {
        Ok(body) => Response {
            json,
            ..Response::text(200, body)
        },
        Err(MmdsError::UnsupportedType) => {
            Response::text(501, MmdsError::UnsupportedType.to_string())
        }
        Err(_) => not_found(path),
    }
}

/// The one thing to PUT is the wish for a token.
fn put(mmds: &mut Mmds, request: &Request<'_>, path: &str) -> Response {
    if let Some(name) = request.forwarded {
        // A token is not for whoever is behind a proxy.
        return bad_header(&format!("Unsupported header name. Key: {name}"));
    }
    if single_slashes(path) != TOKEN_PATH {
        return not_found(path);
    }
    let Some((name, value)) = request.ttl else {
        return Response::text(400, NO_TTL);
    };
    let Ok(ttl) = value.parse() else {
        return bad_header(&format!("Invalid value. Key:{name}; Value:{value}"));
    };
    match mmds.tokens.issue(ttl) {
        Ok(token) => Response {
            header: Some((name.into(), ttl.to_string())),
            ..Response::text(200, token)
        },
        Err(error @ TokenError::Ttl(_)) => Response::text(400, error.to_string()),
        Err(error @ TokenError::Random(_)) => Response::text(500, error.to_string()),
    }
}

fn bad_header(reason: &str) -> Response {
    Response::text(400, format!("Invalid header. Reason: {reason}"))
}

fn not_found(path: &str) -> Response {
    Response::text(404, format!("Resource not found: {path}."))
}

/// The path of a request's target, which may be a whole URI; empty if there is none.
fn path_of(target: &str) -> &str {
    if target.starts_with('/') {
        return target;
    }
    let rest = target.strip_prefix("http://").unwrap_or_default();
    rest.find('/').and_then(|at| rest.get(at..)).unwrap_or("")
}

/// `path` with one slash for each run of them.
fn single_slashes(path: &str) -> String {
    let mut last = None;
    path.chars()
        .filter(|&c| last.replace(c) != Some('/') || c != '/')
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::http::{Parsed, parse};

    fn mmds() -> Mmds {
        let mut mmds = Mmds::default();
        let data = json!({"age": 43, "name": {"first": "John"}, "empty": ""});
        mmds.put(data).unwrap();
        mmds
    }

    /// Status and body of the answer to a request with `headers`.
    fn ask(mmds: &mut Mmds, rules: Rules, line: &str, headers: &str) -> (u16, String) {
        let response = answer(mmds, rules, line, headers);
        (response.status, response.body)
    }

    fn answer(mmds: &mut Mmds, rules: Rules, line: &str, headers: &str) -> Response {
        let text = format!("{line} HTTP/1.1\r\n{headers}\r\n");
        match parse(text.as_bytes()) {
            Parsed::Request(request, _) => respond(mmds, rules, &request),
            other => panic!("{text}: {other:?}"),
        }
    }

    const V1: Rules = Rules {
        needs_token: false,
        always_text: false,
    };
    const V2: Rules = Rules {
        needs_token: true,
        always_text: false,
    };
    const JSON: &str = "Accept: application/json\r\n";
    const TTL: &str = "X-metadata-token-ttl-seconds: 60\r\n";

    #[test]
    fn version_1_answers_as_firecracker_does() {
        let mut mmds = mmds();
        for (line, headers, status, body) in [
            ("GET /name/first", "", 200, "John"),
            ("GET //name///first/", "", 200, "John"),
            ("GET http://169.254.169.254/name", "", 200, "first"),
            ("GET /name/first", JSON, 200, "\"John\""),
            ("GET /", "", 200, "age\nempty\nname/"),
            ("GET /age", JSON, 200, "43"),
            ("GET /empty", "", 200, ""),
            (
                "GET /age",
                "",
                501,
                "Cannot retrieve value. The value has an unsupported type.",
            ),
            ("GET /nobody", "", 404, "Resource not found: /nobody."),
            ("GET //x", JSON, 404, "Resource not found: //x."),
            ("GET name", "", 400, "Invalid URI."),
            ("GET http://169.254.169.254", "", 400, "Invalid URI."),
            ("GET *", "", 400, "Invalid URI."),
            ("GET /name/first", "X-metadata-token: foo\r\n", 200, "John"),
            ("PATCH /", "", 405, "Not allowed HTTP method."),
            ("DELETE /name", "", 405, "Not allowed HTTP method."),
            ("HEAD /name", "", 501, "Unsupported HTTP method."),
            ("POST *", "", 501, "Unsupported HTTP method."),
        ] {
            assert_eq!(
                ask(&mut mmds, V1, line, headers),
                (status, body.into()),
                "{line} {headers}"
            );
        }
    }

    #[test]
    fn tokens_are_asked_for_as_at_firecracker() {
        let mut mmds = mmds();
        let bounds = "Please provide a value between 1 and 21600.";
        let put = "PUT /latest/api/token";
        for (line, headers, status, body) in [
            (put, "", 400, NO_TTL),
            (
                put,
                "X-metadata-token-ttl-seconds: 0\r\n",
                400,
                &format!("Invalid time to live value provided for token: 0. {bounds}"),
            ),
            (
                put,
                "X-aws-ec2-metadata-token-ttl-seconds: 21601\r\n",
                400,
                &format!("Invalid time to live value provided for token: 21601. {bounds}"),
            ),
            (
                put,
                "X-Metadata-Token-TTL-Seconds: many\r\n",
                400,
                "Invalid header. Reason: Invalid value. Key:X-Metadata-Token-TTL-Seconds; Value:many",
            ),
            (
                put,
                "X-Forwarded-For: foo\r\nX-metadata-token-ttl-seconds: 60\r\n",
                400,
                "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For",
            ),
            (
                "PUT /latest/api/toke",
                TTL,
                404,
                "Resource not found: /latest/api/toke.",
            ),
            ("PUT /", TTL, 404, "Resource not found: /."),
        ] {
            for rules in [V1, V2] {
                assert_eq!(
                    ask(&mut mmds, rules, line, headers),
                    (status, body.into()),
                    "{line} {headers}"
                );
            }
        }
    }

    #[test]
    fn version_2_wants_a_token() {
        let mut mmds = mmds();
        let get = "GET /name/first";
        let foo = "X-metadata-token: foo\r\n";
        assert_eq!(ask(&mut mmds, V2, get, ""), (401, NO_TOKEN.into()));
        let invalid = (401, "MMDS token not valid.".into());
        assert_eq!(ask(&mut mmds, V2, get, foo), invalid);
        for (ttl, token) in [
            ("X-metadata-token-ttl-seconds", "X-metadata-token"),
            (
                "X-aws-ec2-metadata-token-ttl-seconds",
                "X-aws-ec2-metadata-token",
            ),
        ] {
            let issued = answer(
                &mut mmds,
                V2,
                "PUT //latest/api/token",
                &format!("{ttl}: 60\r\n"),
            );
            assert_eq!(issued.status, 200);
            assert_eq!(issued.header, Some((ttl.into(), "60".into())));
            let header = format!("{token}: {}\r\n", issued.body);
            assert_eq!(ask(&mut mmds, V2, get, &header), (200, "John".into()));
            assert_eq!(ask(&mut mmds, V2, "GET /x", &header).0, 404);
        }
    }

    #[test]
    fn the_methods_that_are_allowed_are_named() {
        let response = answer(&mut mmds(), V2, "DELETE /", "");
        assert_eq!(response.header, Some(("Allow".into(), "GET, PUT".into())));
    }

    #[test]
    fn a_service_like_ec2s_answers_in_text_alone() {
        let rules = Rules {
            always_text: true,
            ..V1
        };
        let response = answer(&mut mmds(), rules, "GET /name/first", JSON);
        assert_eq!((response.json, &*response.body), (false, "John"));
        assert_eq!(ask(&mut mmds(), rules, "GET /age", JSON).0, 501);
    }

    #[test]
    fn an_answer_has_its_form() {
        let response = answer(&mut mmds(), V1, "GET /name", JSON);
        assert_eq!(
            String::from_utf8(response.encode(1, true, true)).unwrap(),
            "HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
             Content-Type: application/json\r\nContent-Length: 16\r\n\r\n{\"first\":\"John\"}"
        );
        let response = answer(&mut mmds(), V1, "HEAD /", "");
        assert_eq!(
            String::from_utf8(response.encode(0, false, false)).unwrap(),
            "HTTP/1.0 501 \r\nServer: Firecracker API\r\nConnection: close\r\n\
             Content-Type: text/plain\r\nContent-Length: 24\r\n\r\n"
        );
    }
}
