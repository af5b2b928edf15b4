//! When a will is published.

use super::*;

#[tokio::test]
async fn a_will_is_published_when_its_client_is_lost_and_only_then() {
    let host = Host::with(MemoryStream::new("s", 1)).await;
    let mut watcher = host.clean("w").await;
    watcher.subscribe("will/+", QOS1).await;
    let with_will = |client_id: &'static str, topic: &'static str| Connect {
        last_will: Some(LastWill {
            qos: QoS::AtLeastOnce,
            retain: false,
            topic: topic.into(),
            message: "gone".into(),
            will_delay_interval_sec: None,
            correlation_data: None,
            message_expiry_interval: None,
            content_type: None,
            user_properties: vec![],
            is_utf8_payload: None,
            response_topic: None,
        }),
        ..clean(client_id)
    };
    let (mut polite, _) = host.client(with_will("polite", "will/polite")).await;
    polite.send(Packet::Disconnect(Disconnect::new(Reason::NormalDisconnection))).await;
    assert_eq!(polite.try_receive().await, None);
    drop(host.client(with_will("lost", "will/lost")).await);
    assert_eq!(&*watcher.received().await.topic, "will/lost");
    host.stop().await;
}
