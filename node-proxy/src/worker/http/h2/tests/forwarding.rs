//! Requests and answers that go through.

use super::*;

#[test]
fn a_get_is_answered_with_headers_edited_and_counted() {
    on_worker(async {
        let script = Script::new();
        upstream(&script, echo).await;
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        let mut request = get("/a?b=c");
        request.headers_mut().insert("x-remove-me", "1".parse().unwrap());
        let (response, _) = client.send_request(request, true).unwrap();
        let mut response = response.await.unwrap();
        assert_eq!(response.headers()["x-request"], "GET http://web.test/a?b=c");
        assert_eq!(response.headers()["x-saw-x-added"], "yes");
        assert!(!response.headers().contains_key("x-saw-x-remove-me"));
        assert_eq!(read(response.body_mut()).await.unwrap(), (Vec::new(), None));
        let outcomes = script.ended(1).await;
        assert_eq!(outcomes[0].status, 200);
        assert!(outcomes[0].reasons.is_empty());
        assert!(outcomes[0].request_bytes > 0 && outcomes[0].response_bytes > 0);
    });
}

#[test]
fn bodies_and_trailers_pass_both_ways() {
    on_worker(async {
        let script = Script::new();
        upstream(&script, echo).await;
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        let (response, mut body) = client.send_request(grpc("/pkg.Service/Bidi"), false).unwrap();
        let mut response = response.await.unwrap();
        // Ping-pong: each message comes back before the next is sent.
        for message in ["one", "two", "three"] {
            body.send_data(Bytes::from(message), false).unwrap();
            let back = response.body_mut().data().await.unwrap().unwrap();
            assert_eq!(back, message);
        }
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        body.send_trailers(trailers.clone()).unwrap();
        assert_eq!(read(response.body_mut()).await.unwrap(), (Vec::new(), Some(trailers)));
        let outcomes = script.ended(1).await;
        assert_eq!(outcomes[0].grpc_status, Some(0));
        assert!(outcomes[0].reasons.is_empty());
    });
}

/// A stream that counts its writes.
struct Counted(DuplexStream, Rc<Cell<usize>>);

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let written = std::task::ready!(Pin::new(&mut self.0).poll_write(cx, buf))?;
        self.1.set(self.1.get() + 1);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl Transport for Counted {
    fn abort(&mut self) {}
}

#[test]
fn a_small_request_body_leaves_with_its_head_in_one_write() {
    on_worker(async {
        let script = Script::new();
        let writes = Rc::new(Cell::new(0));
        let (near, far) = tokio::io::duplex(64 << 10);
        upstream_over(&script, Counted(near, Rc::clone(&writes)), Counted(far, Rc::default()), echo).await;
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        // The first one also brings the acknowledgement of the upstream's settings.
        for first in [true, false] {
            let before = writes.get();
            let (response, mut body) = client.send_request(grpc("/pkg.Service/Unary"), false).unwrap();
            body.send_data(Bytes::from_static(b"question"), true).unwrap();
            let mut response = response.await.unwrap();
            assert_eq!(read(response.body_mut()).await.unwrap().0, b"question");
            assert!(first || writes.get() - before == 1, "{} writes", writes.get() - before);
        }
    });
}

#[test]
fn a_large_body_passes_a_slow_reader_with_little_memory_in_between() {
    on_worker(async {
        const SIZE: usize = 2 << 20;
        let script = Script::new();
        let sent = Rc::new(Cell::new(0));
        let counter = Rc::clone(&sent);
        let (near, far) = tcp_pair().await;
        upstream_over(&script, near, far, move |_, mut response| {
            let sent = Rc::clone(&counter);
            async move {
                let mut out = response.send_response(ok(), false).unwrap();
                for _ in 0..SIZE / 16384 {
                    send_all(&mut out, Bytes::from_static(&[7; 16384]), false).await.unwrap();
                    sent.set(sent.get() + 16384);
                }
                out.send_data(Bytes::new(), true).unwrap();
            }
        })
        .await;
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        let (response, _) = client.send_request(get("/"), true).unwrap();
        let mut response = response.await.unwrap();
        let mut read = 0;
        while let Some(bytes) = response.body_mut().data().await {
            let bytes = bytes.unwrap();
            // Give everything else every chance to run ahead.
            for _ in 0..50 {
                tokio::task::yield_now().await;
            }
            read += bytes.len();
            // Windows of both connections, and what their send buffers hold: nothing that grows with the body.
            assert!(sent.get() <= read + (512 << 10), "{} sent when {read} were read", sent.get());
            response.body_mut().flow_control().release_capacity(bytes.len()).unwrap();
        }
        assert_eq!(read, SIZE);
        assert_eq!(script.ended(1).await[0].response_bytes, SIZE as u64);
    });
}

#[test]
fn a_large_upload_arrives_whole_over_tcp() {
    on_worker(async {
        const SIZE: usize = 8 << 20;
        let script = Script::new();
        let (near, far) = tcp_pair().await;
        upstream_over(&script, near, far, |request, mut response| async move {
            let (all, _) = read(&mut request.into_body()).await.unwrap();
            let mut out = response.send_response(ok(), false).unwrap();
            send_all(&mut out, all.len().to_string().into(), true).await.unwrap();
        })
        .await;
        let (near, far) = tcp_pair().await;
        proxy_over(&script, far, HttpLimits::default());
        let mut client = client(near).await;
        let (response, mut body) = client.send_request(post("/"), false).unwrap();
        send_all(&mut body, vec![1; SIZE].into(), true).await.unwrap();
        let mut response = response.await.unwrap();
        assert_eq!(read(response.body_mut()).await.unwrap().0, SIZE.to_string().into_bytes());
        let outcomes = script.ended(1).await;
        assert!(outcomes[0].request_bytes >= SIZE as u64);
    });
}

#[test]
fn interim_responses_reach_the_client() {
    on_worker(async {
        let script = Script::new();
        upstream(&script, |_, mut response| async move {
            let mut early = Response::builder().status(103).body(()).unwrap();
            early.headers_mut().insert("link", "</a.css>".parse().unwrap());
            response.send_informational(early).unwrap();
            response.send_response(ok(), true).unwrap();
        })
        .await;
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        let (mut response, _) = client.send_request(get("/"), true).unwrap();
        let early = std::future::poll_fn(|cx| response.poll_informational(cx)).await.unwrap().unwrap();
        assert_eq!(early.status(), 103);
        assert_eq!(early.headers()["link"], "</a.css>");
        assert_eq!(response.await.unwrap().status(), 200);
    });
}

#[test]
fn an_upstream_that_only_talks_is_not_valid() {
    on_worker(async {
        let script = Script::new();
        upstream(&script, |_, mut response| async move {
            for _ in 0..40 {
                if response.send_informational(Response::builder().status(102).body(()).unwrap()).is_err() {
                    return;
                }
            }
            let _ = std::future::poll_fn(|cx| response.poll_reset(cx)).await;
        })
        .await;
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        let (response, _) = client.send_request(get("/"), true).unwrap();
        assert_eq!(response.await.unwrap().status(), 502);
        assert!(script.ended(1).await[0].reasons.has(Reason::UpstreamProtocolError));
    });
}

#[test]
fn a_hundred_streams_share_a_connection() {
    on_worker(async {
        let script = Script::new();
        upstream(&script, echo).await;
        let (near, _) = proxy(&script, HttpLimits::default());
        let mut client = client(near).await;
        let mut waiting = Vec::new();
        for number in 0..100 {
            client = client.ready().await.unwrap();
            let (response, mut body) = client.send_request(post("/"), false).unwrap();
            body.send_data(format!("body {number}").into(), true).unwrap();
            waiting.push((number, response));
        }
        for (number, response) in waiting {
            let mut response = response.await.unwrap();
            assert_eq!(read(response.body_mut()).await.unwrap().0, format!("body {number}").into_bytes());
        }
        assert_eq!(script.ended(100).await.len(), 100);
    });
}

#[test]
fn the_preface_is_told_from_its_first_bytes() {
    assert_eq!(looks_like_preface(b""), Sniff::NeedMore);
    assert_eq!(looks_like_preface(b"PRI * HTTP/2.0\r\n"), Sniff::NeedMore);
    assert_eq!(looks_like_preface(b"PRI * HTTP/1.1\r\n"), Sniff::No);
    assert_eq!(looks_like_preface(b"GET / HTTP/1.1\r\n"), Sniff::No);
    let mut more = PREFACE.to_vec();
    more.extend_from_slice(b"rest");
    assert_eq!(looks_like_preface(&more), Sniff::Yes);
}

#[test]
fn a_stream_takes_little_memory() {
    on_worker(async {
        let script = Script::new();
        let (near, far) = tokio::io::duplex(64 << 10);
        let mut client = tokio::task::spawn_local(client(near));
        let mut server = ::h2::server::Builder::new().handshake::<_, Piece>(far).await.unwrap();
        let mut client =
            tokio::select! { client = &mut client => client.unwrap(), _ = server.accept() => panic!() };
        let _response = client.send_request(get("/"), true).unwrap();
        let (request, response) = server.accept().await.unwrap().unwrap();
        let shared = Rc::new(Shared {
            exchange: Rc::new(TestExchange(script)),
            limits: HttpLimits::default(),
            gauges: buffered::Gauges::default(),
            watch: Rc::default(),
        });
        let future = stream::serve(shared, request, response);
        let size = std::mem::size_of_val(&future);
        assert!(size <= 3 << 10, "{size} bytes");
    });
}

#[test]
fn what_applications_read_in_different_ways_passes_unless_the_node_refuses_it() {
    on_worker(async {
        for (refuse_ambiguous, status) in [(false, 200), (true, 400)] {
            let script = Script::new();
            upstream(&script, echo).await;
            let (near, _) = proxy(&script, HttpLimits { refuse_ambiguous, ..HttpLimits::default() });
            let mut client = client(near).await;
            let mut named = get("/a");
            named.headers_mut().insert("x_a", "1".parse().unwrap());
            for request in [get("/a/../b"), named] {
                let (response, _) = client.send_request(request, true).unwrap();
                assert_eq!(response.await.unwrap().status(), status);
            }
        }
    });
}
