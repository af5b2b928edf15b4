use super::*;
use crate::stream::memory::MemoryStream;
use crate::topic::TopicFilter;

fn ingest() -> (Ingest, Arc<MemoryStream>) {
    let alarms = MemoryStream::with_manual_commit("alarms", 3);
    let filters = vec![TopicFilter::new("acme/+/+/+/alarm").unwrap()];
    let rest = MemoryStream::new("rest", 1);
    let routes = Streams::new(vec![(filters, alarms.clone())], rest);
    (Ingest::new(routes, Arc::default()), alarms)
}

fn draft<'m>(topic: &'m str, device: &'m str) -> Draft<'m> {
    Draft { topic, payload: b"21", properties: b"", device, flags: 1, received_us: 7 }
}

#[test]
fn a_topic_has_the_stream_and_device_of_its_messages_and_else_the_client_is_the_device() {
    let (ingest, _) = ingest();
    let fits = "acme/site/meter/m-1/alarm";
    let place = ingest.place(fits);
    assert_eq!(
        (place.stream, place.device_of(fits, "client"), place.flags()),
        (0, "m-1", flags::FITS_NAMESPACE)
    );
    let long = "ü".repeat(200);
    let place = ingest.place("other");
    assert_eq!((place.stream, place.device_of("other", &long), place.flags()), (1, &*"ü".repeat(128), 0));
    assert_eq!(ingest.streams()[place.stream].name(), "rest");
}

#[test]
fn messages_of_one_device_share_a_partition_of_their_stream() {
    let (ingest, _) = ingest();
    let message = ingest.message(0, draft("acme/site/meter/m-1/alarm", "m-1"));
    assert_eq!(message.partition, partition_of("m-1", 3));
    assert_eq!(ingest.message(1, draft("other", "m-1")).partition, partition_of("m-1", 1));
}

#[tokio::test]
async fn an_append_is_durable_when_its_stream_says_so_and_never_of_one_that_stopped() {
    let (ingest, alarms) = ingest();
    let message = ingest.message(0, draft("acme/site/meter/m-1/alarm", "m-1"));
    let appended = ingest.append(0, &[message], &[]).unwrap();
    let mut durable = Box::pin(ingest.durable(0, appended.ticket));
    assert!(futures_util::FutureExt::now_or_never(durable.as_mut()).is_none());
    alarms.commit();
    assert_eq!(durable.await, Ok(()));
    let appended = ingest.append(0, &[message], &[]).unwrap();
    alarms.fail("the disk is gone");
    assert_eq!(ingest.durable(0, appended.ticket).await, Err(Stopped));
    assert_eq!(ingest.append(0, &[message], &[]), Err(Rejected::Stopped("the disk is gone".into())));
}

#[test]
fn what_stalled_is_the_same_message_when_there_is_room() {
    let (ingest, _) = ingest();
    let message = ingest.message(0, draft("acme/site/meter/m-1/alarm", "m-1"));
    let owned = Owned::of(&message);
    assert_eq!(format!("{:?}", owned.message(&ingest, 0)), format!("{message:?}"));
    assert!(owned.bytes() > message.topic.len() + message.payload.len());
    let taken = Taken::of(&[message, ingest.message(1, Draft { flags: 2, ..draft("other", "c") })]);
    assert_eq!(taken, Taken { by_qos: [0, 1, 1], bytes: 4, outside_namespace: 2 });
}
