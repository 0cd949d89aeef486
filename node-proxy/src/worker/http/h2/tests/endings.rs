//! Requests that do not go through: refusals, resets, retries, timeouts, drains.

use ::h2::Reason as Code;

use super::*;

#[test]
fn a_refused_request_gets_status_reason_and_text() {
    on_worker(async {
        let script = Script::new();
        *script.refuse.borrow_mut() =
            Some(LocalReply::new(403, 7, Reason::PolicyDenied, "policy web denies it"));
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        let (response, _) = client.send_request(get("/"), true).unwrap();
        let mut response = response.await.unwrap();
        assert_eq!(response.status(), 403);
        assert_eq!(response.headers()[crate::worker::reason::HEADER], "DENY");
        assert_eq!(read(response.body_mut()).await.unwrap().0, b"policy web denies it\n");
        assert_eq!(script.ended(1).await[0].status, 403);
    });
}

#[test]
fn a_refused_grpc_call_gets_trailers_only() {
    on_worker(async {
        let script = Script::new();
        *script.refuse.borrow_mut() =
            Some(LocalReply::new(403, 7, Reason::PolicyDenied, "100% denied\u{e9}"));
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        let (response, _body) = client.send_request(grpc("/pkg.Service/Method"), false).unwrap();
        let response = response.await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["grpc-status"], "7");
        assert_eq!(response.headers()["grpc-message"], "100%25 denied%C3%A9");
        assert_eq!(response.headers()["content-type"], "application/grpc");
        assert!(response.body().is_end_stream());
        let outcomes = script.ended(1).await;
        assert_eq!((outcomes[0].status, outcomes[0].grpc_status), (200, Some(7)));
    });
}

#[test]
fn a_client_that_cancels_cancels_the_upstream_with_its_code() {
    on_worker(async {
        let script = Script::new();
        let codes = watch::Sender::new(Vec::new());
        let seen = codes.clone();
        upstream(&script, move |request, mut response| {
            let codes = codes.clone();
            async move {
                if request.uri().path() == "/answered" {
                    let mut out = response.send_response(ok(), false).unwrap();
                    let code = std::future::poll_fn(|cx| out.poll_reset(cx)).await.unwrap();
                    codes.send_modify(|codes| codes.push(code));
                } else {
                    let code = std::future::poll_fn(|cx| response.poll_reset(cx)).await.unwrap();
                    codes.send_modify(|codes| codes.push(code));
                }
            }
        })
        .await;
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;

        let (response, mut stream) = client.send_request(get("/waiting"), true).unwrap();
        // The upstream has the request before the cancel: `seen` tells by the call's line in the script.
        while script.seen.borrow().is_empty() {
            tokio::task::yield_now().await;
        }
        stream.send_reset(Code::CANCEL);
        drop(response);
        let mut seen = seen.subscribe();
        assert_eq!(*seen.wait_for(|codes| codes.len() == 1).await.unwrap(), [Code::CANCEL]);

        let (response, mut stream) = client.send_request(get("/answered"), true).unwrap();
        let response = response.await.unwrap();
        stream.send_reset(Code::INTERNAL_ERROR);
        drop(response);
        assert_eq!(
            *seen.wait_for(|codes| codes.len() == 2).await.unwrap(),
            [Code::CANCEL, Code::INTERNAL_ERROR]
        );
        for outcome in script.ended(2).await {
            assert!(outcome.reasons.has(Reason::DownstreamTermination));
        }
    });
}

#[test]
fn an_upstream_reset_in_the_body_keeps_its_code_and_never_looks_complete() {
    on_worker(async {
        let script = Script::new();
        upstream(&script, |request, mut response| async move {
            let code = request.uri().path()[1..].parse::<u32>().unwrap();
            let mut out = response.send_response(ok(), false).unwrap();
            out.send_data(Bytes::from_static(b"part"), false).unwrap();
            // The reset must not overtake the data.
            tokio::time::sleep(Duration::from_millis(1)).await;
            out.send_reset(code.into());
        })
        .await;
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        for (code, expected) in [
            (Code::ENHANCE_YOUR_CALM, Code::ENHANCE_YOUR_CALM),
            (Code::INTERNAL_ERROR, Code::INTERNAL_ERROR),
            (Code::REFUSED_STREAM, Code::INTERNAL_ERROR),
            (Code::NO_ERROR, Code::INTERNAL_ERROR),
        ] {
            let (response, _) = client.send_request(get(&format!("/{}", u32::from(code))), true).unwrap();
            let error = match response.await {
                Ok(mut response) => read(response.body_mut()).await.unwrap_err(),
                Err(error) => error,
            };
            assert_eq!(error.reason(), Some(expected));
        }
        for outcome in script.ended(4).await {
            assert!(outcome.reasons.has(Reason::UpstreamReset));
        }
    });
}

#[test]
fn a_lost_upstream_ends_grpc_with_unavailable_and_the_rest_with_a_reset() {
    on_worker(async {
        for is_grpc in [true, false] {
            let script = Script::new();
            let (near, far) = tokio::io::duplex(64 << 10);
            let (cut, cutter) = tokio::sync::oneshot::channel::<()>();
            tokio::task::spawn_local(async move {
                let mut connection = ::h2::server::handshake(far).await.unwrap();
                let (_, mut response) = connection.accept().await.unwrap().unwrap();
                let _out = response.send_response(ok(), false).unwrap();
                tokio::select! {
                    _ = connection.accept() => {}
                    _ = cutter => {}
                }
            });
            let (handle, connection) = client_handshake(near, &HttpLimits::default()).await.unwrap();
            tokio::task::spawn_local(connection);
            script.upstreams.borrow_mut().push_back(handle);
            let (near, _) = proxy(&script, HttpLimits::default());
            let mut client = client(near).await;
            let request = if is_grpc { grpc("/s/m") } else { get("/") };
            let (response, _) = client.send_request(request, true).unwrap();
            let mut response = response.await.unwrap();
            cut.send(()).unwrap();
            let end = read(response.body_mut()).await;
            if is_grpc {
                let trailers = end.unwrap().1.unwrap();
                assert_eq!(trailers["grpc-status"], "14");
                assert_eq!(trailers[crate::worker::reason::HEADER], "UC");
            } else {
                assert_eq!(end.unwrap_err().reason(), Some(Code::INTERNAL_ERROR));
            }
            assert!(script.ended(1).await[0].reasons.has(Reason::UpstreamTermination));
        }
    });
}

/// An upstream that refuses the first `times` requests with `REFUSED_STREAM`.
async fn refusing(script: &Script, times: u32) {
    let left = Rc::new(Cell::new(times));
    upstream(script, move |request, mut response| {
        let left = Rc::clone(&left);
        async move {
            if left.get() > 0 {
                left.set(left.get() - 1);
                response.send_reset(Code::REFUSED_STREAM);
            } else {
                echo(request, response).await;
            }
        }
    })
    .await;
}

fn retry_if_possible(script: &Script) {
    *script.on_failure.borrow_mut() = Some(Box::new(|failure, replay| {
        if replay.possible {
            Verdict::Retry
        } else {
            Verdict::Reply(LocalReply::unavailable(Reason::RetryLimit, format!("{failure:?}")))
        }
    }));
}

#[test]
fn a_refused_stream_is_sent_again_with_its_body_and_trailers() {
    on_worker(async {
        let script = Script::new();
        retry_if_possible(&script);
        refusing(&script, 2).await;
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        let (response, mut body) = client.send_request(grpc("/s/m"), false).unwrap();
        body.send_data(Bytes::from_static(b"all of "), false).unwrap();
        body.send_data(Bytes::from_static(b"it"), false).unwrap();
        let mut trailers = HeaderMap::new();
        trailers.insert("x-end", "1".parse().unwrap());
        body.send_trailers(trailers.clone()).unwrap();
        let mut response = response.await.unwrap();
        assert_eq!(response.headers()["x-saw-x-added"], "yes");
        assert_eq!(read(response.body_mut()).await.unwrap(), (b"all of it".to_vec(), Some(trailers)));
        assert_eq!(script.seen.borrow()[1..], ["Refused true", "Refused true"]);
    });
}

#[test]
fn a_body_announced_beyond_the_replay_cap_is_sent_elsewhere_while_none_of_it_was_sent() {
    on_worker(async {
        let script = Script::new();
        retry_if_possible(&script);
        refusing(&script, 1).await;
        let limits = HttpLimits { replay_cap: 10, ..HttpLimits::default() };
        let (near, _) = proxy(&script, limits);
        let mut client = client(near).await;
        let mut request = post("/");
        request.headers_mut().insert("content-length", 16.into());
        let (response, mut body) = client.send_request(request, false).unwrap();
        let mut response = response.await.unwrap();
        assert_eq!(script.seen.borrow()[1..], ["Refused true"]);
        assert_eq!(response.status(), 200);
        body.send_data(Bytes::from_static(b"sixteen bytes is"), true).unwrap();
        assert_eq!(read(response.body_mut()).await.unwrap().0, b"sixteen bytes is");
    });
}

#[test]
fn a_body_beyond_the_replay_cap_is_not_sent_again() {
    on_worker(async {
        let script = Script::new();
        retry_if_possible(&script);
        upstream(&script, |request, mut response| async move {
            let mut body = request.into_body();
            let mut left = 16;
            while left > 0 {
                let bytes = body.data().await.unwrap().unwrap();
                body.flow_control().release_capacity(bytes.len()).unwrap();
                left -= bytes.len();
            }
            response.send_reset(Code::REFUSED_STREAM);
        })
        .await;
        let limits = HttpLimits { replay_cap: 10, ..HttpLimits::default() };
        let (near, _) = proxy(&script, limits);
        let mut client = client(near).await;
        let (response, mut body) = client.send_request(post("/"), false).unwrap();
        body.send_data(Bytes::from_static(b"eight by"), false).unwrap();
        body.send_data(Bytes::from_static(b"tes more"), false).unwrap();
        assert_eq!(response.await.unwrap().status(), 503);
        assert_eq!(script.seen.borrow()[1..], ["Refused false"]);
    });
}

#[test]
fn a_status_may_be_retried_before_it_is_forwarded() {
    on_worker(async {
        let script = Script::new();
        script.retry_status.set(Some(503));
        let first = Rc::new(Cell::new(true));
        upstream(&script, move |request, mut response| {
            let first = first.replace(false);
            async move {
                if first {
                    let head = Response::builder().status(503).body(()).unwrap();
                    response.send_response(head, true).unwrap();
                } else {
                    echo(request, response).await;
                }
            }
        })
        .await;
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        let (response, mut body) = client.send_request(post("/"), false).unwrap();
        body.send_data(Bytes::from_static(b"again"), true).unwrap();
        let mut response = response.await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(read(response.body_mut()).await.unwrap().0, b"again");
    });
}

#[test]
fn a_goaway_below_the_stream_counts_as_refused() {
    on_worker(async {
        let script = Script::new();
        retry_if_possible(&script);
        let (near, far) = tokio::io::duplex(64 << 10);
        // A raw upstream: SETTINGS, then GOAWAY with last stream 0 once the request came.
        tokio::task::spawn_local(async move {
            use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
            let mut far = far;
            far.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
            let mut seen = Vec::new();
            while !seen.windows(9).any(|frame| frame[3] == 1 && frame[5..] == [0, 0, 0, 1]) {
                assert!(far.read_buf(&mut seen).await.unwrap() > 0);
            }
            far.write_all(&[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).await.unwrap();
            while far.read_buf(&mut seen).await.unwrap() > 0 {}
        });
        let (handle, connection) = client_handshake(near, &HttpLimits::default()).await.unwrap();
        tokio::task::spawn_local(connection);
        script.upstreams.borrow_mut().push_back(handle);
        upstream(&script, echo).await;
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        let (response, _) = client.send_request(get("/"), true).unwrap();
        assert_eq!(response.await.unwrap().status(), 200);
        assert_eq!(script.seen.borrow()[1..], ["Refused true"]);
    });
}

#[test]
fn a_lost_connection_before_the_head_is_a_reset_after_the_request_was_sent() {
    on_worker(async {
        let script = Script::new();
        let (near, far) = tokio::io::duplex(64 << 10);
        tokio::task::spawn_local(async move {
            let mut connection = ::h2::server::handshake(far).await.unwrap();
            let _stream = connection.accept().await;
        });
        let (handle, connection) = client_handshake(near, &HttpLimits::default()).await.unwrap();
        tokio::task::spawn_local(connection);
        script.upstreams.borrow_mut().push_back(handle);
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        let (response, _) = client.send_request(get("/"), true).unwrap();
        assert_eq!(response.await.unwrap().status(), 503);
        assert_eq!(script.seen.borrow()[1..], ["Reset { reused: false, request_sent: true } true"]);
    });
}

#[test]
fn no_connection_gives_the_reply_of_the_call() {
    on_worker(async {
        let script = Script::new();
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        let (response, _) = client.send_request(get("/"), true).unwrap();
        let response = response.await.unwrap();
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()[crate::worker::reason::HEADER], "UF");
    });
}

/// An upstream that never answers.
async fn silent(script: &Script) {
    upstream(script, |request, mut response| async move {
        let (_parts, _body) = request.into_parts();
        let _ = std::future::poll_fn(|cx| response.poll_reset(cx)).await;
    })
    .await;
}

#[test]
fn limits_of_time_end_an_exchange_with_their_reason() {
    on_worker(async {
        let script = Script::new();
        silent(&script).await;
        let limits = HttpLimits { stream_idle: Some(Duration::from_millis(40)), ..HttpLimits::default() };
        let (near, _) = proxy(&script, limits);
        let mut client = client(near).await;

        script.deadline.set(Some(Duration::from_millis(20)));
        let (response, _) = client.send_request(get("/"), true).unwrap();
        let response = response.await.unwrap();
        assert_eq!(response.status(), 504);
        assert_eq!(response.headers()[crate::worker::reason::HEADER], "DT");

        let (response, _) = client.send_request(grpc("/s/m"), true).unwrap();
        assert_eq!(response.await.unwrap().headers()["grpc-status"], "4");

        script.deadline.set(None);
        script.per_try.set(Some(Duration::from_millis(10)));
        let (response, _) = client.send_request(get("/"), true).unwrap();
        assert_eq!(response.await.unwrap().headers()[crate::worker::reason::HEADER], "UT");

        script.per_try.set(None);
        let (response, _) = client.send_request(get("/"), true).unwrap();
        assert_eq!(response.await.unwrap().headers()[crate::worker::reason::HEADER], "SI");
    });
}

#[test]
fn a_deadline_in_the_body_resets_or_gives_a_grpc_status() {
    on_worker(async {
        let script = Script::new();
        upstream(&script, |_, mut response| async move {
            let mut out = response.send_response(ok(), false).unwrap();
            let _ = std::future::poll_fn(|cx| out.poll_reset(cx)).await;
        })
        .await;
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        script.deadline.set(Some(Duration::from_millis(20)));
        let (response, _) = client.send_request(get("/"), true).unwrap();
        let mut response = response.await.unwrap();
        assert_eq!(read(response.body_mut()).await.unwrap_err().reason(), Some(Code::CANCEL));
        let (response, _) = client.send_request(grpc("/s/m"), true).unwrap();
        let mut response = response.await.unwrap();
        assert_eq!(read(response.body_mut()).await.unwrap().1.unwrap()["grpc-status"], "4");
        for outcome in script.ended(2).await {
            assert!(outcome.reasons.has(Reason::DurationTimeout));
        }
    });
}

#[test]
fn a_drain_lets_open_streams_finish_and_then_closes() {
    on_worker(async {
        let script = Script::new();
        upstream(&script, echo).await;
        let (near, end) = proxy(&script, HttpLimits::default());
        let (handle, connection) = ::h2::client::handshake(near).await.unwrap();
        let connection = tokio::task::spawn_local(connection);
        let mut client = handle.ready().await.unwrap();
        let (response, mut body) = client.send_request(post("/"), false).unwrap();
        let mut response = response.await.unwrap();
        script.closing.send_replace(true);
        // The GOAWAY has arrived when no stream can be opened any more.
        while let Ok(ready) = client.ready().await {
            client = ready;
            let Ok((extra, _)) = client.send_request(get("/extra"), true) else { break };
            // Until then requests are still served: none is lost.
            match extra.await {
                Ok(extra) => assert_eq!(extra.status(), 200),
                Err(error) => {
                    assert!(error.is_go_away(), "{error}");
                    break;
                }
            }
        }
        body.send_data(Bytes::from_static(b"still here"), true).unwrap();
        assert_eq!(read(response.body_mut()).await.unwrap().0, b"still here");
        assert!(matches!(end.await.unwrap(), ConnectionEnd::Complete));
        connection.await.unwrap().unwrap();
    });
}

#[test]
fn an_upstream_that_answers_early_is_not_cut_short_by_a_long_request() {
    on_worker(async {
        let script = Script::new();
        upstream(&script, |_request, mut response| async move {
            let mut out =
                response.send_response(Response::builder().status(413).body(()).unwrap(), false).unwrap();
            out.send_data(Bytes::from_static(b"too large"), true).unwrap();
        })
        .await;
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        let (response, mut body) = client.send_request(post("/"), false).unwrap();
        body.send_data(Bytes::from_static(b"the first of many"), false).unwrap();
        let mut response = response.await.unwrap();
        assert_eq!(response.status(), 413);
        assert_eq!(read(response.body_mut()).await.unwrap().0, b"too large");
        let outcome = script.ended(1).await[0];
        assert_eq!(outcome.status, 413);
        assert!(outcome.reasons.is_empty());
    });
}
