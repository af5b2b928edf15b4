//! rumqttc, the client that most Rust programs use, in both versions.

use std::time::Duration;

use headworks_tests::host::Host;
use rumqttc::Outgoing;
use tokio::time::timeout;

const HUNG_AFTER: Duration = Duration::from_secs(30);
const QUEUE: usize = 10;

/// The two versions of the client have the same calls and other types.
macro_rules! tests_of {
    ($version:ident, $($client:ident)::+, $clean:ident, $keep:expr) => {
        mod $version {
            use $($client)::+::mqttbytes::QoS;
            use $($client)::+::{AsyncClient, Event, EventLoop, Incoming, MqttOptions};

            use super::*;

            struct Rumqttc {
                client: AsyncClient,
                events: EventLoop,
            }

            impl Rumqttc {
                /// Connected; whether its session was there.
                async fn connect(host: &Host, id: &str, clean: bool) -> (Self, bool) {
                    let address = host.mqtt();
                    let mut options = MqttOptions::new(id, address.ip().to_string(), address.port());
                    options.$clean(clean);
                    let keep: fn(&mut MqttOptions) = $keep;
                    keep(&mut options);
                    let (client, events) = AsyncClient::new(options, QUEUE);
                    let mut connected = Self { client, events };
                    match connected.next().await {
                        Incoming::ConnAck(ack) => (connected, ack.session_present),
                        other => panic!("{other:?}"),
                    }
                }

                /// What comes next; an error is the test's end.
                async fn next(&mut self) -> Incoming {
                    let incoming = async {
                        loop {
                            if let Event::Incoming(incoming) = self.events.poll().await.expect("connected") {
                                return incoming;
                            }
                        }
                    };
                    timeout(HUNG_AFTER, incoming).await.expect("the host answers")
                }

                async fn subscribe(&mut self, filter: &str) {
                    self.client.subscribe(filter, QoS::ExactlyOnce).await.expect("room in its queue");
                    assert!(matches!(self.next().await, Incoming::SubAck(_)));
                }

                /// Seen through to the last packet of its QoS.
                async fn publish(&mut self, topic: &str, qos: QoS, payload: &str) {
                    let payload = payload.as_bytes().to_vec();
                    self.client.publish(topic, qos, false, payload).await.expect("room in its queue");
                    let last = loop {
                        let event = timeout(HUNG_AFTER, self.events.poll()).await.expect("the host answers");
                        match event.expect("connected") {
                            // Sent: nothing comes back.
                            Event::Outgoing(Outgoing::Publish(_)) if qos == QoS::AtMostOnce => return,
                            Event::Outgoing(_) => {}
                            Event::Incoming(incoming) => break incoming,
                        }
                    };
                    match qos {
                        QoS::AtLeastOnce => assert!(matches!(last, Incoming::PubAck(_)), "{last:?}"),
                        _ => {
                            assert!(matches!(last, Incoming::PubRec(_)), "{last:?}");
                            assert!(matches!(self.next().await, Incoming::PubComp(_)));
                        }
                    }
                }

                /// QoS and payload of the next delivery, acknowledged to its end.
                async fn hear(&mut self) -> (u8, String) {
                    let Incoming::Publish(publish) = self.next().await else { panic!("a message") };
                    if publish.qos == QoS::ExactlyOnce {
                        assert!(matches!(self.next().await, Incoming::PubRel(_)));
                    }
                    (publish.qos as u8, String::from_utf8(publish.payload.to_vec()).expect("a text"))
                }
            }

            const EACH: [(u8, QoS); 3] =
                [(0, QoS::AtMostOnce), (1, QoS::AtLeastOnce), (2, QoS::ExactlyOnce)];

            #[tokio::test]
            async fn publishes_and_hears_at_each_qos() {
                let host = Host::start(concat!("rumqttc-", stringify!($version)), "");
                let (mut subscriber, _) = Rumqttc::connect(&host, "subscriber", true).await;
                subscriber.subscribe("t/#").await;
                let (mut publisher, _) = Rumqttc::connect(&host, "publisher", true).await;
                for (number, qos) in EACH {
                    publisher.publish("t/1", qos, &format!("at {number}")).await;
                    assert_eq!(subscriber.hear().await, (number, format!("at {number}")));
                }
            }

            #[tokio::test]
            async fn goes_on_with_its_session_after_the_connection_was_cut() {
                let host = Host::start(concat!("rumqttc-session-", stringify!($version)), "");
                let (mut kept, present) = Rumqttc::connect(&host, "kept", false).await;
                assert!(!present);
                kept.subscribe("t/#").await;
                drop(kept);
                let (mut publisher, _) = Rumqttc::connect(&host, "publisher", true).await;
                for (number, qos) in EACH {
                    publisher.publish("t/1", qos, &number.to_string()).await;
                }
                let (mut kept, present) = Rumqttc::connect(&host, "kept", false).await;
                assert!(present, "the session is there");
                // QoS 0 is not kept for who is away.
                assert_eq!(kept.hear().await, (1, "1".to_owned()));
                assert_eq!(kept.hear().await, (2, "2".to_owned()));
                publisher.publish("t/1", QoS::AtLeastOnce, "live").await;
                assert_eq!(kept.hear().await, (1, "live".to_owned()));
            }
        }
    };
}

tests_of!(v4, rumqttc, set_clean_session, |_| {});
tests_of!(v5, rumqttc::v5, set_clean_start, |options| {
    options.set_session_expiry_interval(Some(600));
});
