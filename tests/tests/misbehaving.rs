//! A thousand clients misbehave, each in another way; a hundred honest ones
//! beside them notice nothing.

use std::sync::atomic::{AtomicBool, Ordering};

use headworks_tests::host::Host;
use headworks_tests::misbehaving::{Crowd, raise_open_files, scripts};
use headworks_tests::mqtt::Version;
use headworks_tests::packets::{Client, Publish};

/// Each has a publisher and a subscriber.
const PAIRS: usize = 50;
const DRIVERS: usize = 4;
/// At least, while the others misbehave.
const MESSAGES_MIN: u64 = 100;
const RSS_BYTES_MAX: u64 = 1 << 30;
const LAST: &str = "last";

#[test]
fn a_thousand_misbehaving_clients_cost_the_honest_ones_no_connection_and_no_message() {
    raise_open_files();
    let mut host = Host::start("misbehaving", "");
    let addr = host.mqtt();
    let crowd_is_done = AtomicBool::new(false);
    let scripts = scripts();
    let published: u64 = std::thread::scope(|scope| {
        let pairs: Vec<_> = (0..PAIRS)
            .map(|pair| {
                let version = [Version::V311, Version::V5][pair % 2];
                let topic = format!("honest/{pair}");
                let mut subscriber = Client::clean(addr, version, &format!("subscriber-{pair}"));
                assert_eq!(subscriber.subscribe(&topic, 1), 1);
                let publisher = Client::clean(addr, version, &format!("publisher-{pair}"));
                let heard = scope.spawn(move || hear(subscriber));
                let until = &crowd_is_done;
                (scope.spawn(move || publish(publisher, &topic, until)), heard)
            })
            .collect();
        let drivers: Vec<_> = (0..DRIVERS)
            .map(|driver| {
                let own = scripts.iter().skip(driver).step_by(DRIVERS).cloned().collect();
                scope.spawn(move || {
                    let mut pace = Client::clean(addr, Version::V5, &format!("pace-{driver}"));
                    let mut crowd = Crowd::new(addr, own);
                    // As fast as an honest client is answered in between.
                    while crowd.step() {
                        pace.ping();
                    }
                    (crowd, pace)
                })
            })
            .collect();
        let crowds: Vec<_> = drivers.into_iter().map(|driver| driver.join().expect("a driver")).collect();
        crowd_is_done.store(true, Ordering::Relaxed);
        let mut published = 0;
        for (publisher, subscriber) in pairs {
            let count = publisher.join().expect("a publisher");
            assert_eq!(subscriber.join().expect("a subscriber"), count, "heard as many as were acknowledged");
            published += count;
        }
        for (_crowd, mut pace) in crowds {
            pace.ping();
        }
        published
    });
    assert!(published >= PAIRS as u64 * MESSAGES_MIN);
    // They did reach the host, and it told them apart.
    let ended = |cause| host.metric("headworks_mqtt_disconnects_total", &[("cause", cause)]);
    let refused = host.metric("headworks_mqtt_refused_connects_total", &[("cause", "malformed")]);
    for (what, count, least) in [
        ("malformed", ended("malformed"), 300.0),
        ("lost", ended("lost"), 50.0),
        ("taken over", ended("taken_over"), 30.0),
        ("refused", refused, 30.0),
    ] {
        println!("{what}: {count}");
        assert!(count >= least, "{what}: {count}");
    }
    assert!(!host.log().contains("panicked"));
    let rss = host.process().rss_bytes();
    assert!(rss < RSS_BYTES_MAX, "{rss} bytes");
    let mut late = Client::clean(addr, Version::V5, "late");
    assert_eq!(late.subscribe("late", 1), 1);
    late.publish(&Publish::new("late", 1, 1, "served"));
    let (one, other) = (late.receive(), late.receive());
    assert!([one.first >> 4, other.first >> 4].contains(&3), "its ack and its message: {one:?}, {other:?}");
}

/// One message at a time, each acknowledged; how many.
fn publish(mut client: Client, topic: &str, until: &AtomicBool) -> u64 {
    let mut count = 0;
    while count < MESSAGES_MIN || !until.load(Ordering::Relaxed) {
        client.publish_through(&Publish::new(topic, 1, packet_id(count), &count.to_string()));
        count += 1;
    }
    client.publish_through(&Publish::new(topic, 1, packet_id(count), LAST));
    client.leave();
    count
}

/// Every message in order, up to the last; how many.
fn hear(mut client: Client) -> u64 {
    let mut count = 0;
    loop {
        let message = client.delivered();
        if message.text() == LAST {
            client.leave();
            return count;
        }
        assert_eq!(message.text(), count.to_string());
        count += 1;
    }
}

fn packet_id(count: u64) -> u16 {
    (count % 65_535) as u16 + 1
}
