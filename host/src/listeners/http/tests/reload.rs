//! A configuration that changes while the listener runs.

use super::*;
use crate::listeners::transport::config::Endpoint;
use crate::units::{ByteSize, Period};

async fn prepare(host: &Host, change: impl FnOnce(&mut Config)) -> Result<Prepared, Error> {
    let mut config = Config::clone(&host.handle.config());
    change(&mut config);
    host.handle.prepare(&config).await
}

async fn reload(host: &Host, change: impl FnOnce(&mut Config)) {
    prepare(host, change).await.unwrap().commit();
}

fn free_address() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

#[tokio::test]
async fn an_address_that_is_gone_ends_its_connections_once_their_requests_are_answered() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let patient = |config: &mut Config, _: &mut Option<access::Config>, _: &mut Limits| {
        config.drain_timeout = Period(HUNG_AFTER);
    };
    let host = Host::start(Streams::new(vec![], stream.clone()), patient).await;
    let (mut busy, mut idle) = (host.client().await, TcpStream::connect(host.address).await.unwrap());
    let mut answer = Box::pin(busy.send("/messages/a", &[], "1"));
    stream.awaited().await;
    assert!(futures_util::FutureExt::now_or_never(answer.as_mut()).is_none());
    let new = free_address();
    let prepared = prepare(&host, |config| config.listeners[0].bind = Bind::Tcp(new)).await.unwrap();
    let gone = "http: no longer listens on 127.0.0.1:0; connections through it end".to_owned();
    assert_eq!(prepared.changes(), [format!("http: listens on {new}"), gone]);
    prepared.commit();
    let ended = timeout(HUNG_AFTER, idle.read(&mut [0; 1])).await.unwrap();
    assert!(!matches!(ended, Ok(1..)));
    stream.commit();
    assert_eq!(answer.await.0, 204);
    let ended = async {
        while !busy.0.is_closed() {
            tokio::task::yield_now().await;
        }
    };
    timeout(HUNG_AFTER, ended).await.unwrap();
    let mut after = Client::over(TcpStream::connect(new).await.unwrap()).await;
    let answer = after.send("/messages/a", &[], "2");
    stream.awaited().await;
    stream.commit();
    assert_eq!(answer.await.0, 204);
    host.stop().await;
}

#[tokio::test]
async fn bounds_of_a_connection_are_those_of_its_beginning_and_an_address_that_stays_keeps_it() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let mut before = host.client().await;
    assert_eq!(before.post("/messages/a", &[], "123").await.0, 204);
    let prepared = prepare(&host, |config| {
        config.max_message_size = ByteSize(2);
        config.partial_bodies_bytes_max = ByteSize::mib(8);
        config.idempotency_window = Period(Duration::from_secs(60));
        config.listeners.push(Endpoint::at("127.0.0.1:0".parse().unwrap()));
    });
    let prepared = prepared.await.unwrap();
    assert_eq!(prepared.needs_restart(), ["http.partial_bodies_bytes_max"]);
    prepared.commit();
    assert_eq!(host.handle.config().partial_bodies_bytes_max, Config::default().partial_bodies_bytes_max);
    assert_eq!(before.post("/messages/a", &[], "123").await.0, 204);
    for address in host.handle.addresses() {
        let io = TcpStream::connect(address.tcp().unwrap()).await.unwrap();
        assert_eq!(Client::over(io).await.post("/messages/a", &[], "123").await.0, 413);
    }
    host.stop().await;
}

#[tokio::test]
async fn what_cannot_be_prepared_changes_nothing_and_frees_what_it_has_bound() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let (taken, new) = (std::net::TcpListener::bind("127.0.0.1:0").unwrap(), free_address());
    let before = host.handle.config();
    let failed = prepare(&host, |config| {
        let addresses = [new, taken.local_addr().unwrap()];
        config.listeners.extend(addresses.map(|address| Endpoint::at(Bind::Tcp(address))));
    });
    assert!(matches!(failed.await, Err(Error::Listen(transport::Error::Bind { .. }))));
    drop(std::net::TcpListener::bind(new).unwrap());
    assert!(Arc::ptr_eq(&before, &host.handle.config()));
    assert_eq!(host.post("/messages/a", &[], "1").await.0, 204);
    host.stop().await;
}

#[tokio::test]
async fn requests_of_an_open_connection_are_judged_by_the_access_control_in_force() {
    let host = Host::start(Streams::new(vec![], MemoryStream::new("s", 1)), |_, access, _| {
        *access = Some(rules("a"));
    })
    .await;
    let mut client = host.client().await;
    assert_eq!(client.post("/messages/a", &[], "1").await.0, 204);
    let current = &host.handle.http.access;
    let failures = Failures::default();
    let deps = access::Deps { secret: &[0; 32], plugins: None, wait_max: HUNG_AFTER, failures: &failures };
    let next = current.get().reopen(Some(&rules("b")), &Limits::default(), &deps).unwrap();
    current.replace(next);
    assert_eq!(client.post("/messages/a", &[], "1").await.0, 403);
    assert_eq!(client.post("/messages/b", &[], "1").await.0, 204);
    reload(&host, |config| config.listeners[0].allow_anonymous = false).await;
    assert_eq!(client.post("/messages/b", &[], "1").await.0, 401);
    host.stop().await;
}

/// Everybody may publish to one topic.
fn rules(topic: &str) -> access::Config {
    let rule = serde_json::json!({ "effect": "allow", "topics": [topic] });
    access::Config { rules: vec![serde_json::from_value(rule).unwrap()], ..access::Config::default() }
}
