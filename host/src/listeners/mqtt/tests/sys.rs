//! `$SYS` topics and the gauges: what the broker says of itself.

use std::collections::BTreeMap;

use super::*;

const PAGE: &str = include_str!("../../../../docs/from-mosquitto.md");

/// What a new subscriber gets at once: payload by topic.
async fn all(client: &mut Client) -> BTreeMap<String, String> {
    assert_eq!(client.subscribe("$SYS/#", QOS1).await, SubscribeAckReason::GrantedQos1);
    let mut found = BTreeMap::new();
    while !found.contains_key("$SYS/broker/load/sockets/15min") {
        let publish = client.received().await;
        assert!(publish.retain, "{}", publish.topic);
        found.insert(publish.topic.to_string(), String::from_utf8(publish.payload.to_vec()).unwrap());
    }
    found
}

async fn host(interval: Duration) -> (Host, Arc<dyn Stream>) {
    let stream = MemoryStream::new("s", 1);
    let streams = Streams::new(vec![], stream.clone());
    let sys = |config: &mut Config| config.sys_interval = crate::units::Period(interval);
    (Host::start(streams, MemoryStream::new("broker", 1), sys).await, stream)
}

#[tokio::test]
async fn every_sys_topic_of_the_page_is_there_and_the_page_has_every_one() {
    let (host, _) = host(Duration::from_secs(3_600)).await;
    let found = all(&mut host.clean("c").await).await;
    let rows = PAGE.lines().filter_map(|line| line.strip_prefix("| `$SYS/")?.split_once('`'));
    let rows: Vec<_> = rows.map(|(topic, _)| TopicFilter::new(&format!("$SYS/{topic}")).unwrap()).collect();
    for row in &rows {
        assert!(found.keys().any(|topic| row.matches(topic)), "{row} is not there");
    }
    for topic in found.keys() {
        assert!(rows.iter().any(|row| row.matches(topic)), "{topic} is not in the page");
    }
    host.stop().await;
}

#[tokio::test]
async fn sys_topics_count_what_happened() {
    let (host, stream) = host(Duration::from_secs(3_600)).await;
    let mut keeper = host.client(resuming("keeper")).await.0;
    keeper.subscribe("kept/#", QOS1).await;
    let mut publisher = host.clean("p").await;
    drop(keeper);
    for packet_id in 1..=2 {
        let topic = ["kept/a", "b"][usize::from(packet_id) - 1];
        publisher.send(Publish { retain: true, ..publish(topic, QoS::AtLeastOnce, packet_id) }).await;
        assert_eq!(publisher.receive().await, puback(packet_id));
    }
    let found = all(&mut publisher).await;
    let value = |name: &str| found[&format!("$SYS/broker/{name}")].as_str();
    // The keeper's CONNECT and SUBSCRIBE; CONNECT, twice PUBLISH, SUBSCRIBE of the other.
    for (name, wanted) in [
        ("clients/maximum", "2"),
        ("clients/total", "2"),
        ("messages/received", "6"),
        ("publish/messages/received", "2"),
        ("publish/bytes/received", "4"),
        ("publish/messages/dropped", "0"),
        ("retained messages/count", "2"),
        ("subscriptions/count", "2"),
    ] {
        assert_eq!(value(name), wanted, "{name}");
    }
    assert_eq!(value("clients/active"), value("clients/connected"));
    assert_eq!(value("clients/inactive"), value("clients/disconnected"));
    assert!(value("version").starts_with("headworks version ") && value("uptime").ends_with(" seconds"));
    assert!(value("bytes/received").parse::<u64>().unwrap() > 50);
    assert_eq!(stream.bounds().end, Offset(2), "nothing of $SYS is in the log");
    host.stop().await;
}

#[tokio::test]
async fn sys_topics_are_published_when_they_change_and_not_for_a_wildcard_at_the_front() {
    let (host, _) = host(Duration::from_millis(20)).await;
    let mut all = host.clean("all").await;
    all.subscribe("#", QOS1).await;
    let mut client = host.clean("c").await;
    client.subscribe("$SYS/broker/clients/connected", QOS1).await;
    let mut heard = String::new();
    for (more, wanted) in [(None, "2"), (Some("x"), "3"), (Some("y"), "4")] {
        if let Some(more) = more {
            std::mem::forget(host.clean(more).await);
        }
        while heard != wanted {
            let publish = client.received().await;
            heard = String::from_utf8(publish.payload.to_vec()).unwrap();
        }
    }
    all.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn without_an_interval_there_is_no_sys() {
    let (host, _) = host(Duration::ZERO).await;
    let mut client = host.clean("c").await;
    client.subscribe("$SYS/#", QOS1).await;
    client.nothing_but_ping().await;
    host.stop().await;
}

#[tokio::test]
async fn acks_that_wait_are_counted_until_they_are_sent_or_their_client_is_gone() {
    let stream = MemoryStream::with_manual_commit("s", 1);
    let host = Host::with(stream.clone()).await;
    let broker = host.handle.clients.0.clone();
    let waiting = || broker.counters.acks_waiting.load(Ordering::Relaxed);
    let mut client = host.clean("c").await;
    for packet_id in 1..=3 {
        client.send(publish("a", QoS::AtLeastOnce, packet_id)).await;
    }
    client.nothing_but_ping().await;
    assert_eq!(waiting(), 3);
    stream.commit();
    for packet_id in 1..=3 {
        assert_eq!(client.receive().await, puback(packet_id));
    }
    assert_eq!(waiting(), 0);
    client.send(publish("a", QoS::AtLeastOnce, 4)).await;
    client.nothing_but_ping().await;
    assert_eq!(waiting(), 1);
    host.shutdown.cancel();
    drop(client);
    timeout(HUNG_AFTER, host.handle.join()).await.expect("the listener ends");
    assert_eq!(waiting(), 0);
}
